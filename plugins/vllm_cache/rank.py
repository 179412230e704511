"""A rank for routing simulations: vLLM's cache manager without a model."""

from __future__ import annotations

from collections.abc import Sequence

from vswa_plugin.engine import RankSetup, RawEvent

from .manager import CacheManager, CacheSequence, Options


class SimulatedRank:
    """The contract is ``vswa_plugin.engine.SimulatedRank``.

    All groups take from one pool, so it has the blocks of all groups of ``setup`` together.
    """

    event_format = "vllm"

    def __init__(self, setup: RankSetup) -> None:
        options = Options(chunk_tokens=setup.chunk_tokens, events=setup.events)
        self._manager = CacheManager(setup.layout, sum(setup.blocks), options)
        self._max_seq_len = setup.max_seq_len

    def fits(self, prompt_len: int, output_len: int) -> bool:
        tokens = prompt_len + output_len
        return tokens <= self._max_seq_len and self._manager.most(tokens) <= self._manager.pool.blocks

    def would_reuse(self, prompt: Sequence[int]) -> int:
        return self._manager.match(prompt).length

    def open(self, prompt: Sequence[int], output_len: int) -> CacheSequence | None:
        return self._manager.open(prompt, output_len)

    def take_events(self) -> list[RawEvent]:
        return list(self._manager.pool.take_events())
