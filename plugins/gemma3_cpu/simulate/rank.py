"""A rank for routing simulations: manager V2 without a model, step by step."""

from __future__ import annotations

from collections.abc import Sequence

from vswa_plugin.engine import RankSetup, RawEvent
from vswa_plugin.errors import InvalidRequest, InvariantError

from ..cache.spec import GroupSpec
from ..cache.v2 import CacheManager
from ..cache.v2.sequence import CacheSequence

#: Far more than a step can bring: events that are not taken are lost.
_MAX_EVENTS = 1_000_000


class SimulatedRank:
    """The contract is ``vswa_plugin.engine.predicted.SimulatedRank``."""

    event_format = "trtllm"

    def __init__(self, setup: RankSetup) -> None:
        groups = [
            GroupSpec(group.group_id, group.window_size, blocks, layers)
            for group, blocks, layers in zip(setup.layout.groups, setup.blocks, setup.layers, strict=True)
        ]
        self._block_size = setup.layout.block_size
        self._chunk_tokens = setup.chunk_tokens
        self._manager = CacheManager(
            groups,
            self._block_size,
            setup.max_seq_len,
            max_chunk_tokens=setup.chunk_tokens,
            event_buffer_max_size=_MAX_EVENTS if setup.events else 0,
        )

    def fits(self, prompt_len: int, output_len: int) -> bool:
        try:
            self._manager.check_fits(prompt_len, output_len)
        except InvalidRequest:
            return False
        return True

    def would_reuse(self, prompt: Sequence[int]) -> int:
        return self._manager.would_reuse(prompt)

    def open(self, prompt: Sequence[int], output_len: int) -> SimulatedSequence | None:
        sequence = self._manager.open(prompt, output_len)
        if sequence is None:
            return None
        return SimulatedSequence(sequence, len(prompt), self._block_size, self._chunk_tokens)

    def take_events(self) -> list[RawEvent]:
        return list(self._manager.flush_events())


class SimulatedSequence:
    """The contract is ``vswa_plugin.engine.predicted.RankSequence``."""

    def __init__(self, sequence: CacheSequence, prompt_len: int, block_size: int, chunk_tokens: int) -> None:
        self._sequence = sequence
        self._prompt_len = prompt_len
        self._block_size = block_size
        self._chunk_tokens = chunk_tokens
        self.cached_tokens = sequence.cached_tokens

    def compute_prompt(self) -> None:
        self._compute(self._prompt_len)

    def finish(self, output: Sequence[int]) -> None:
        if self._sequence.computed_tokens < self._prompt_len:
            raise InvariantError("a request ended whose prompt was not computed")
        # The last token is never computed. Blocks at a time take and give back what tokens at a time do.
        last = self._prompt_len + len(output) - 1
        while self._sequence.computed_tokens < last:
            block_end = (self._sequence.computed_tokens // self._block_size + 1) * self._block_size
            self._compute(min(block_end, last))
        self._sequence.close(output)

    def _compute(self, upto: int) -> None:
        sequence = self._sequence
        while sequence.computed_tokens < upto:
            step = min(self._chunk_tokens, upto - sequence.computed_tokens)
            sequence.reserve(sequence.computed_tokens + step)
            sequence.advance(step)
