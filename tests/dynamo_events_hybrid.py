"""A worker whose groups have blocks of several sizes, up to its projection, and what that should be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import TypeAlias

from vswa_plugins.dynamo_events.projection import Projection
from vswa_plugins.vllm_events import VllmEventAdapter

from tests.hybrid_manager import HybridManager
from vswa_plugin.blocks.hashing import prefix_names
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout, Resumption
from vswa_plugin.blocks.reuse import resumable, rule_named
from vswa_plugin.engine.contract import BlocksStored, EngineEvent
from vswa_plugin.publishing.residency import Residency
from vswa_plugin.wire.events import Event

#: One sequence's tokens.
Tokens: TypeAlias = Sequence[int]

#: Blocks of Dynamo's are those of the recurrent state; the others have half of that, or a quarter.
MIXED = CacheLayout(
    (
        CacheGroup(0, 3, 1),
        CacheGroup(1, None, 2),
        CacheGroup(2, None, 2, "chunked", 8),
        CacheGroup(3, None, 4, "recurrent"),
    ),
    "vllm_hybrid",
    "m",
    resumption=Resumption(4, 1),
)


class HybridWorker:
    """A random cache, and the worker's side of one rank; whoever has it tells Dynamo of the projection."""

    def __init__(self, layout: CacheLayout, seed: int) -> None:
        self.layout, self._random = layout, Random(seed)
        self.manager = HybridManager(layout, self._random)
        self.adapter, self.residency = VllmEventAdapter(layout), Residency(layout)
        self.projection = Projection("boundary", layout)
        self.served: list[list[int]] = [[0]]

    def serve(self, show: Callable[[Event], None] | None = None) -> None:
        """One request, which shares the beginning of an earlier one."""
        random, size = self._random, self.layout.block_size
        before = random.choice(self.served)
        prompt = [*before[: random.randint(0, len(before))], *(random.randrange(3) for _ in range(2 * size))]
        answer = [random.randrange(3) for _ in range(random.randint(1, size))]
        self.adapter.prompt(prompt, None, None)
        for event in self._events(prompt, answer):
            changes = self.residency.apply(event)
            if isinstance(event, BlocksStored):
                nodes = [self.residency.nodes.get(block.hash) for block in event.blocks]
                self.projection.learn(event, [node for node in nodes if node is not None])
            for change in changes:
                (show or self.projection.apply)(change)
        self.served.append(prompt + answer)

    def _events(self, prompt: list[int], answer: list[int]) -> Iterator[EngineEvent]:
        for raw in self.manager.serve(prompt, answer):
            yield from self.adapter.feed(raw)
        yield from self.adapter.settle()

    def published(self) -> set[tuple[int, ...]]:
        """The definition: all of Dynamo's blocks at or above one behind which a prompt could be resumed."""
        size = self.layout.block_size
        return {
            tuple(each[: block * size])
            for each in self.served
            for block in range(1, max(self._resumable(each), default=0) + 1)
        }

    def match(self, tokens: Tokens, published: set[tuple[int, ...]]) -> int:
        """Blocks that a router should find."""
        size = self.layout.block_size
        blocks = range(len(tokens) // size, 0, -1)
        return next((n for n in blocks if tuple(tokens[: n * size]) in published), 0)

    def _resumable(self, tokens: Tokens) -> list[int]:
        """The boundaries of a sequence, in blocks of Dynamo's, at which one that goes on could be resumed."""
        rule, size = rule_named(self.layout.rule), self.layout.block_size
        held = self.residency.resident()
        found = []
        for boundary in range(1, len(tokens) // size + 1):
            names = prefix_names(tokens[: boundary * size], self.layout.hash_block_size)
            holds = {group_id: [name in of_group for name in names] for group_id, of_group in held.items()}
            if resumable(rule, self.layout, holds, boundary * size + 1) == boundary * size:
                found.append(boundary)
        return found
