"""The cache manager, driven at random beside a naive model of the same rules.

The model has no pages, no tree and no queues: per group it maps a *prefix* (salt and tokens) to the
sequences that hold it and to when it was last let go, and it looks everything up from scratch.
"""

from __future__ import annotations

import sys
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from vswa_plugins.gemma3_cpu.cache import CacheManager, CacheSequence, GroupSpec
from vswa_plugins.trtllm_events.adapter import TrtllmEventAdapter

from vswa_plugin.engine import BlocksRemoved, BlocksStored, GroupCreated
from vswa_plugin.errors import InvalidRequest
from vswa_plugin.layout import CacheGroup, CacheLayout

MAX_SEQ_LEN = 32
Prefix = tuple[str | None, tuple[int, ...]]


class Held:
    """One block of the model in one group."""

    def __init__(self, holder: int) -> None:
        self.holders = {holder}
        self.let_go = 0


class Model:
    """What should be resident, by prefix."""

    def __init__(self, groups: list[GroupSpec], block_size: int) -> None:
        self.groups = groups
        self.bs = block_size
        self.clock = 0
        self.held: list[dict[Prefix, Held]] = [{} for _ in groups]
        self.private: list[dict[int, set[int]]] = [{} for _ in groups]

    def free(self, g: int) -> int:
        used = len(self.held[g]) + sum(map(len, self.private[g].values()))
        return self.groups[g].num_blocks - used

    def prefix(self, salt: str | None, prompt: list[int], block: int) -> Prefix:
        return salt, tuple(prompt[: (block + 1) * self.bs])

    def visible(self, g: int, position: int) -> range:
        """Earlier positions that the token at ``position`` attends to."""
        window = self.groups[g].window_size
        return range(0 if window is None else max(0, position - window + 1), position)

    def reusable(self, salt: str | None, prompt: list[int]) -> int:
        """Largest whole number of blocks, in tokens, before the last token, of which all is there."""
        ends = range(0, len(prompt), self.bs)
        return max(
            n
            for n in ends
            if all(
                self.prefix(salt, prompt, p // self.bs) in self.held[g]
                for g in range(len(self.groups))
                for p in self.visible(g, n)
            )
        )

    def open(self, seq: int, salt: str | None, prompt: list[int]) -> int:
        n = self.reusable(salt, prompt)
        for g in range(len(self.groups)):
            self.private[g][seq] = set()
            for block in {p // self.bs for p in self.visible(g, n)}:
                self.held[g][self.prefix(salt, prompt, block)].holders.add(seq)
        return n

    def reserve(self, seq: int, first: int, last: int) -> None:
        for g in range(len(self.groups)):
            blocks = set(range(first, last)) - self.private[g][seq]
            while self.free(g) < len(blocks):
                self.evict(g)
            self.private[g][seq] |= blocks

    def evict(self, g: int) -> None:
        (salt, tokens), _ = min(
            ((prefix, held) for prefix, held in self.held[g].items() if not held.holders),
            key=lambda item: item[1].let_go,
        )
        if self.groups[g].window_size is not None:
            del self.held[g][salt, tokens]
            return
        for group in self.held:
            for prefix in list(group):
                if prefix[0] == salt and prefix[1][: len(tokens)] == tokens:
                    del group[prefix]

    def commit(self, seq: int, prefix: Prefix, block: int) -> None:
        for g, group in enumerate(self.held):
            self.private[g][seq].remove(block)
            group.setdefault(prefix, Held(seq)).holders.add(seq)

    def let_go(self, g: int, seq: int, prefix: Prefix, block: int) -> None:
        self.private[g][seq].discard(block)
        held = self.held[g].get(prefix)
        if held is not None and seq in held.holders:
            held.holders.remove(seq)
            self.clock += 1
            held.let_go = self.clock


class Running:
    """One open sequence and what the model knows of it."""

    def __init__(self, seq: int, cache: CacheSequence, salt: str | None, prompt: list[int], new: int) -> None:
        self.seq, self.cache, self.salt, self.prompt = seq, cache, salt, prompt
        self.tokens = prompt + [100 + seq] * new
        self.computed = cache.cached_tokens
        self.committed = cache.cached_tokens


@st.composite
def group_specs(draw: st.DrawFn) -> tuple[int, list[GroupSpec]]:
    bs = draw(st.integers(1, 3))
    shapes = [("s", "g"), ("g", "s"), ("s", "s", "g"), ("g",), ("s",), ("g", "g", "s")]
    shape = draw(st.sampled_from(shapes))
    # With a window of one token nothing that was computed before is ever needed: anything could be resumed.
    smallest = 2 if bs == 1 else 1
    windows = [None if kind == "g" else bs * draw(st.integers(smallest, 3)) for kind in shape]
    ids = draw(st.permutations(range(len(shape))))
    # Sliding pools are the tighter ones: that is what makes holes below blocks that are still there.
    sizes = [draw(st.integers(8, 40) if w is None else st.integers(5, 12)) for w in windows]
    return bs, [GroupSpec(*group) for group in zip(ids, windows, sizes, strict=True)]


class CacheMachine(RuleBasedStateMachine):
    @initialize(specs=group_specs(), chunk=st.integers(1, 6))
    def start(self, specs: tuple[int, list[GroupSpec]], chunk: int) -> None:
        self.bs, self.groups = specs
        self.chunk = chunk
        self.manager = CacheManager(self.groups, self.bs, MAX_SEQ_LEN, max_chunk_tokens=chunk)
        self.model = Model(self.groups, self.bs)
        self.running: list[Running] = []
        self.prompts: list[list[int]] = [[]]
        self.count = 0
        # What each page holds, by position: the tokens up to there, as a stand-in for keys and values.
        self.memory: list[dict[tuple[int, int], Any]] = [{} for _ in self.groups]
        layout = CacheLayout(
            tuple(CacheGroup(g.group_id, g.window_size, self.bs) for g in self.groups), "trtllm_v2", "m"
        )
        self.adapter = TrtllmEventAdapter(layout)
        self.announced: dict[int, dict[int, Prefix]] = {g.group_id: {} for g in self.groups}
        self.names: dict[int, Prefix] = {}
        self.next_event_id = 0

    @rule(
        earlier=st.integers(0, 100),
        cut=st.one_of(st.just(MAX_SEQ_LEN), st.integers(0, MAX_SEQ_LEN)),
        more=st.one_of(st.integers(1, 12).map(lambda n: [0] * n), st.lists(st.integers(0, 1), min_size=1)),
        new=st.integers(1, 4),
        salt=st.sampled_from([None, None, None, None, "a", "b"]),
        at_once=st.booleans(),
    )
    def open(
        self, earlier: int, cut: int, more: list[int], new: int, salt: str | None, at_once: bool
    ) -> None:
        """Prompts grow out of earlier ones, so that many share prefixes; half of them run at once."""
        prompt = (self.prompts[earlier % len(self.prompts)][:cut] + more)[: MAX_SEQ_LEN - new]
        self.prompts.append(prompt)
        self._open(prompt, new, salt)
        if at_once and self.running:
            self.finish(len(self.running) - 1)

    def _open(self, prompt: list[int], new: int, salt: str | None) -> None:
        try:
            cache = self.manager.open(prompt, new, salt)
        except InvalidRequest:
            return
        if cache is None:
            assert self.running, "alone, a request that fits is admitted"
            return
        self.count += 1
        run = Running(self.count, cache, salt, prompt, new)
        self.running.append(run)
        expected = self.model.open(self.count, salt, prompt)

        assert expected == cache.cached_tokens == cache.computed_tokens

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 100), ahead=st.integers(1, 6), n=st.integers(0, 6))
    def compute(self, which: int, ahead: int, n: int) -> None:
        """Reserve, write keys and values, look at all that attention looks at, advance."""
        run = self.running[which % len(self.running)]
        ahead = min(ahead, self.chunk, len(run.tokens) - run.computed)
        n = min(n, ahead)
        self.model.reserve(run.seq, *self._blocks(run, ahead))
        run.cache.reserve(run.computed + ahead)
        for position in range(run.computed, run.computed + n):
            for g in range(len(self.groups)):
                self.memory[g][self._slot(run, g, position)] = self._content(run, position)
        for position in range(run.computed, run.computed + n):
            self._attend(run, position)
        run.cache.advance(n)
        self._advance_model(run, n)

        assert run.computed == run.cache.computed_tokens

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 100))
    def finish(self, which: int) -> None:
        run = self.running[which % len(self.running)]
        while run.computed < len(run.tokens):
            self.compute(which, 6, 6)
        self.close(which)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 100))
    def close(self, which: int) -> None:
        run = self.running.pop(which % len(self.running))
        for g in range(len(self.groups)):
            for block in reversed(range(len(run.tokens))):
                self.model.let_go(g, run.seq, self.model.prefix(run.salt, run.tokens, block), block)
        run.cache.close()
        run.cache.close()

    @rule()
    def flush(self) -> None:
        for raw in self.manager.flush_events():
            assert raw["event_id"] == self.next_event_id
            self.next_event_id += 1
            for event in self.adapter.feed(raw):
                self._apply(event)
        expected = {g.group_id: set(self.model.held[i]) for i, g in enumerate(self.groups)}

        assert expected == {group_id: set(held.values()) for group_id, held in self.announced.items()}
        assert {i: set(held) for i, held in self.announced.items()} == self.manager.resident()

    @invariant()
    def invariants(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check()
        for g, pool in enumerate(self.manager._store.pools):
            assert self.model.free(g) == pool.counts()["free"]
            assert sum(1 for held in self.model.held[g].values() if not held.holders) == len(pool.droppable)
            tables = [page for run in self.running for page in run.cache.tables[g] if page >= 0]
            for run in self.running:
                for page in run.cache.tables[g][run.computed // self.bs :]:
                    assert tables.count(page) == 1, "a page that will be written has one owner"

    def teardown(self) -> None:
        if not hasattr(self, "manager") or sys.exc_info()[0] is not None:
            return  # what failed is told, not what follows from it
        while self.running:
            self.close(0)
        self.flush()
        for g, group in enumerate(self.groups):
            store = self.manager._store
            for page in store.take(g, group.num_blocks):
                store.pools[g].release(page)
            assert group.num_blocks == store.pools[g].counts()["free"]
        for group in self.model.held:
            group.clear()
        self.flush()

        assert not self.manager._store.tree.roots

    def _blocks(self, run: Running, ahead: int) -> tuple[int, int]:
        first = -(-run.computed // self.bs)
        return first, -(-(run.computed + ahead) // self.bs)

    def _slot(self, run: Running, g: int, position: int) -> tuple[int, int]:
        page = run.cache.tables[g][position // self.bs]
        assert 0 <= page < self.groups[g].num_blocks
        return page, position % self.bs

    @staticmethod
    def _content(run: Running, position: int) -> Prefix:
        return run.salt, tuple(run.tokens[: position + 1])

    def _attend(self, run: Running, position: int) -> None:
        for g in range(len(self.groups)):
            for p in self.model.visible(g, position):
                assert self._content(run, p) == self.memory[g][self._slot(run, g, p)]

    def _advance_model(self, run: Running, n: int) -> None:
        before, run.computed = run.computed, run.computed + n
        while run.committed + self.bs <= min(run.computed, len(run.prompt)):
            block = run.committed // self.bs
            self.model.commit(run.seq, self.model.prefix(run.salt, run.prompt, block), block)
            run.committed += self.bs
        for g in range(len(self.groups)):
            old = {p // self.bs for p in self.model.visible(g, before)} | set(
                range(before // self.bs, -(-run.computed // self.bs))
            )
            seen = {p // self.bs for p in (*self.model.visible(g, run.computed), run.computed)}
            for block in sorted(old - seen):
                self.model.let_go(g, run.seq, self.model.prefix(run.salt, run.tokens, block), block)

    def _apply(self, event: object) -> None:
        if isinstance(event, BlocksStored):
            parent = event.parent_hash
            for block in event.blocks:
                above = () if parent is None else self.names[parent][1]
                self.names[block.hash] = (event.cache_salt, above + block.token_ids)
                assert block.hash not in self.announced[event.group_id], "stored twice"
                self.announced[event.group_id][block.hash] = self.names[block.hash]
                parent = block.hash
        elif isinstance(event, BlocksRemoved):
            for block_hash in event.hashes:
                del self.announced[event.group_id][block_hash]
        else:
            assert isinstance(event, GroupCreated)


CacheMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestCacheMachine = CacheMachine.TestCase
