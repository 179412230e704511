"""What is compared with an engine: predictions of what it reuses, and its cache without a model.

The contracts of the hooks ``vswa_accuracy_scorers`` and ``vswa_simulated_rank``. A simulated rank computes
nothing: what it reuses, stores and evicts, and its events, are its engine's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.engine.contract import BlocksStored, Node, RawEvent

if TYPE_CHECKING:
    from vswa_plugin.wire.events import Event


class Prompt(NamedTuple):
    """A request as a scorer sees it.

    :ivar sequence_hashes: the names of its prefixes in units of the layout's ``hash_block_size``: in plain
        layouts those of its whole blocks.
    """

    token_ids: Sequence[int]
    sequence_hashes: Sequence[int]


class Scorer(Protocol):
    """Predicts requests one after the other, from the events before each. One engine, one rank."""

    @property
    def name(self) -> str:
        """What reports call it; unique among the scorers of a replay."""

    def begin(self, layout: CacheLayout) -> None:
        """Nothing is resident: the start, or an engine that lost events or corrected its layout.

        :raises ConfigError: the layout cannot be used.
        """

    def learn(self, stored: BlocksStored, nodes: Sequence[Node]) -> None:
        """Token ids of announced blocks, before :meth:`apply` gets the change.

        :param nodes: names of the leading blocks of ``stored``; the others could not be named.
        """

    def apply(self, event: Event) -> None:
        """One change, as it came over the wire; never a layout."""

    def predict(self, prompt: Prompt) -> int:
        """Tokens of the prompt that the engine will reuse. Called once per request, in order of arrival."""


class RankSetup(msgspec.Struct, frozen=True):
    """The cache of one rank.

    :param blocks: on the device, per group of ``layout``.
    :param layers: that keep their blocks in it, per group.
    :param max_seq_len: the longest sequence, in tokens.
    :param chunk_tokens: prompt tokens that one step computes.
    :param events: False: the rank need not keep them.
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

    :ivar event_format: format of its events, as ``vswa_event_adapter`` gets it.
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
