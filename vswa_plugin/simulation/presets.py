"""What a routing simulation needs of an engine's cache: the contract of the hook ``vswa_simulated_rank``.

A simulated rank computes nothing: what it reuses, stores and evicts, and its events, are its engine's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.contract import RawEvent
from vswa_plugin.errors import ConfigError


class RankSetup(msgspec.Struct, frozen=True):
    """The cache of one rank.

    :param blocks: on the device, per group of ``layout``.
    :param layers: that keep their blocks in it, per group.
    :param max_seq_len: the longest sequence, in tokens.
    :param chunk_tokens: prompt tokens that one step computes.
    :param events: False: nobody will ask for them.
    """

    layout: CacheLayout
    blocks: tuple[int, ...]
    layers: tuple[int, ...]
    max_seq_len: int
    chunk_tokens: int = 512
    events: bool = True


class RankSequence(Protocol):
    """One request that was admitted.

    :ivar cached_tokens: of its prompt, what was reused.
    """

    cached_tokens: int

    def compute_prompt(self) -> None:
        """The prompt is computed; its blocks can be reused from here on."""

    def finish(self, output: Sequence[int]) -> None:
        """``output`` was generated, and the request has ended."""


class SimulatedRank(Protocol):
    """The cache of one engine rank.

    :ivar event_format: what ``vswa_event_adapter`` is asked for.
    """

    event_format: str

    def fits(self, prompt_len: int, output_len: int) -> bool:
        """Whether a request of that many tokens could run, were it alone."""

    def would_reuse(self, prompt: Sequence[int]) -> int:
        """Tokens of ``prompt`` that :meth:`open` would reuse now; changes nothing."""

    def open(self, prompt: Sequence[int], output_len: int) -> RankSequence | None:
        """Match a prompt that fits and hold what it reuses; None while there is no room."""

    def take_events(self) -> Sequence[RawEvent]:
        """The engine's own events since the last call, in order."""


class Preset(msgspec.Struct, frozen=True):
    """The attention of one model.

    :param windows: per cache group, in order of the groups' first layers; None: global.
    :param layers: per cache group.
    """

    windows: tuple[int | None, ...]
    layers: tuple[int, ...]


PRESETS = {
    "gemma-3-1b": Preset((512, None), (22, 4)),
    "gemma-3-27b": Preset((1024, None), (52, 10)),
    "gpt-oss": Preset((128, None), (12, 12)),
}


def rank_setup(
    preset: str, blocks: int, sliding_share: float, block_size: int, max_seq_len: int, events: bool = True
) -> RankSetup:
    """The cache of a model with ``blocks`` for global attention and that share of them for each window.

    :raises ConfigError: the windows are no multiples of the block size.
    """
    chosen, chunk = PRESETS[preset], 512
    groups = tuple(CacheGroup(i, window, block_size) for i, window in enumerate(chosen.windows))
    layout = CacheLayout(groups, "trtllm_v2", preset).check()
    if any(window is not None and window % block_size for window in chosen.windows):
        raise ConfigError(
            f"--block-size: expected a size that divides the windows of {preset}, got {block_size}"
        )
    counts = tuple(
        blocks
        if window is None
        # Less than one request can need would refuse requests.
        else max(round(blocks * sliding_share), -(-(window + chunk + block_size) // block_size))
        for window in chosen.windows
    )
    return RankSetup(layout, counts, chosen.layers, max_seq_len, chunk, events)
