"""The attention of models that are simulated, and the cache of a rank that serves one."""

from __future__ import annotations

import msgspec

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.predicted import RankSetup
from vswa_plugin.errors import ConfigError


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
