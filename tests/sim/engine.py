"""An engine's cache, which is the truth, and what it says of it: two groups, evicted each on its own."""

from __future__ import annotations

import random
from typing import NamedTuple

from vswa_plugin.blocks.hashing import sequence_hashes_of_tokens
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.blocks.reuse import resumable, rule_named
from vswa_plugin.engine.contract import BlocksMoved, BlocksRemoved, BlocksStored, EngineBlock, EngineEvent

BLOCK = 2
SLIDING, GLOBAL = 0, 1
#: A window of two blocks, and global attention.
LAYOUT = CacheLayout((CacheGroup(SLIDING, 4, BLOCK), CacheGroup(GLOBAL, None, BLOCK)), "trtllm_v2", "m")
#: Blocks that each group holds at most.
CAPACITY = {SLIDING: 5, GLOBAL: 9}
DEEPEST = 4


class Request(NamedTuple):
    """:ivar mark: as the worker's handler takes it when the request arrives."""

    tokens: tuple[int, ...]
    cached_tokens: int
    mark: int


def name_of(tokens: tuple[int, ...]) -> str:
    return ",".join(map(str, tokens))


def a_prompt(rng: random.Random) -> tuple[int, ...]:
    """Some blocks and a token."""
    return (*(rng.randint(1, 2) for _ in range(rng.randint(1, DEEPEST) * BLOCK)), 9)


class Engine:
    """:ivar held: group -> name of a block -> tier."""

    def __init__(self) -> None:
        self.held: dict[int, dict[str, str]] = {SLIDING: {}, GLOBAL: {}}
        self.running: list[Request] = []

    def resident(self) -> dict[int, set[int]]:
        """Sequence hashes by group."""
        return {
            group: {sequence_hashes_of_tokens(tuple(map(int, name.split(","))), BLOCK)[-1] for name in blocks}
            for group, blocks in self.held.items()
        }

    def admit(self, tokens: tuple[int, ...], mark: int) -> None:
        """A request begins: what it reuses is what the rule gives of what is held now."""
        names = self._chain(tokens)
        held = {group: [name in blocks for name in names] for group, blocks in self.held.items()}
        self.running.append(
            Request(tokens, resumable(rule_named(LAYOUT.rule), LAYOUT, held, len(tokens)), mark)
        )

    def compute(self, tokens: tuple[int, ...], rng: random.Random) -> list[EngineEvent]:
        """A prompt's blocks are stored in both groups; what there is no room for is evicted first."""
        events: list[EngineEvent] = []
        names = self._chain(tokens)
        for group, blocks in self.held.items():
            missing = [at for at, name in enumerate(names) if name not in blocks]
            room = CAPACITY[group] - len(blocks) - len(missing)
            victims = [name for name in blocks if name not in names]
            rng.shuffle(victims)
            if room < 0 and (gone := victims[:-room]):
                events.append(self._remove(group, gone))
            events += self._store(group, tokens, missing)
        return events

    def evict(self, rng: random.Random) -> list[EngineEvent]:
        group = rng.choice([SLIDING, GLOBAL])
        blocks = list(self.held[group])
        gone = rng.sample(blocks, min(len(blocks), rng.randint(1, 2)))
        return [self._remove(group, gone)] if gone else []

    def move(self, rng: random.Random) -> list[EngineEvent]:
        group = rng.choice([SLIDING, GLOBAL])
        if not self.held[group]:
            return []
        name, tier = rng.choice(list(self.held[group])), rng.choice(["device", "host"])
        self.held[group][name] = tier
        return [BlocksMoved(group, (name,), tier)]

    def _remove(self, group: int, names: list[str]) -> EngineEvent:
        for name in names:
            del self.held[group][name]
        return BlocksRemoved(group, tuple(names))

    def _store(self, group: int, tokens: tuple[int, ...], missing: list[int]) -> list[EngineEvent]:
        events: list[EngineEvent] = []
        run: list[EngineBlock] = []
        for at in missing:
            name = name_of(tokens[: (at + 1) * BLOCK])
            self.held[group][name] = "device"
            run.append(EngineBlock(name, tokens[at * BLOCK : (at + 1) * BLOCK]))
            if at + 1 not in missing:
                first = at + 1 - len(run)
                parent = name_of(tokens[: first * BLOCK]) if first else None
                events.append(BlocksStored(group, parent, tuple(run)))
                run = []
        return events

    def _chain(self, tokens: tuple[int, ...]) -> list[str]:
        return [name_of(tokens[: end * BLOCK]) for end in range(1, len(tokens) // BLOCK + 1)]
