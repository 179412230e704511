"""The cache manager driven at random: many sequences at once, any windows, pools, tiers and switches.

After each step its own invariants hold, events add up to what is held, and the pages hold what a model would
have written there: each sequence sees its own prefix in every group.
"""

from __future__ import annotations

import sys

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from vswa_plugins.gemma3_cpu.cache.spec import GroupSpec
from vswa_plugins.gemma3_cpu.cache.v2 import CacheManager, CacheSequence

from tests.gemma3_v2_helpers import Announced, Memory, reusable
from tests.properties import examples
from vswa_plugin.errors import InvalidRequest

MAX_SEQ_LEN = 32
OUTPUT = 1000


class Running:
    """One open sequence, its tokens, and what was agreed for it."""

    def __init__(self, cache: CacheSequence, prompt: list[int], new: int, salt: str | None) -> None:
        self.cache, self.prompt, self.salt = cache, prompt, salt
        self.tokens = prompt + [OUTPUT + id(self) % 1000] * new
        self.lacking: tuple[range, ...] | None = None


@st.composite
def group_specs(draw: st.DrawFn) -> tuple[int, list[GroupSpec]]:
    bs = draw(st.integers(1, 4))
    shapes = [("s", "g"), ("g", "s"), ("s", "s", "g"), ("g",), ("s",), ("g", "g", "s")]
    shape = draw(st.sampled_from(shapes))
    # With a window of one token nothing that was computed before is ever needed: anything could be resumed.
    smallest = 2 if bs == 1 else 1
    windows = [None if kind == "g" else bs * draw(st.integers(smallest, 3)) for kind in shape]
    ids = draw(st.permutations(range(len(shape))))
    # Sliding pools are the tighter ones: that is what makes holes below blocks that are still there.
    sizes = [draw(st.integers(8, 32) if w is None else st.integers(5, 12)) for w in windows]
    layers = [draw(st.integers(1, 2)) for _ in shape]
    host = [draw(st.integers(0, 8)) if draw(st.booleans()) else 0 for _ in shape]
    return bs, [GroupSpec(*group) for group in zip(ids, windows, sizes, layers, host, strict=True)]


class CacheMachine(RuleBasedStateMachine):
    @initialize(
        specs=group_specs(), chunk=st.integers(1, 7), off=st.sampled_from(["", "", "partial", "reuse"])
    )
    def start(self, specs: tuple[int, list[GroupSpec]], chunk: int, off: str) -> None:
        self.bs, self.groups = specs
        self.chunk = chunk
        self.memory = Memory(self.groups, self.bs)
        self.manager = CacheManager(
            self.groups,
            self.bs,
            MAX_SEQ_LEN,
            max_chunk_tokens=chunk,
            enable_block_reuse=off != "reuse",
            enable_partial_reuse=off != "partial",
            mover=self.memory.move,
        )
        self.announced = Announced()
        self.running: list[Running] = []
        self.prompts: list[list[int]] = [[]]

    @rule(
        earlier=st.integers(0, 50),
        keep=st.integers(0, MAX_SEQ_LEN),
        more=st.lists(st.integers(0, 2), max_size=12),
        new=st.integers(1, 6),
        salt=st.sampled_from([None, None, None, "tenant"]),
    )
    def open(self, earlier: int, keep: int, more: list[int], new: int, salt: str | None) -> None:
        prompt = [*self.prompts[earlier % len(self.prompts)][:keep], *more] or [0]
        expected = reusable(self.manager, prompt, salt)
        at_boundary = reusable(self.manager, prompt, salt, inside=False)
        try:
            cache = self.manager.open(prompt, new, salt)
        except InvalidRequest:
            self.manager.check_fits(1, 1)
            return
        if cache is None:
            assert self.running, "what fits at all is admitted once nothing else runs"
            return
        if not self.manager._store.reuse:
            expected = 0
        elif expected % self.bs and self.copy_overfills(expected, len(prompt) + new):
            expected = at_boundary
        assert expected == cache.cached_tokens == cache.computed_tokens < len(prompt)
        self.prompts.append(prompt)
        self.running.append(Running(cache, prompt, new, salt))

    @rule(earlier=st.integers(0, 50), keep=st.integers(0, MAX_SEQ_LEN), seed=st.integers(0, 5))
    def whole(self, earlier: int, keep: int, seed: int) -> None:
        """A request from start to end: fills the cache quickly."""
        more = [(seed >> i) % 2 for i in range(MAX_SEQ_LEN - 4)]
        before = len(self.running)
        self.open(earlier, keep, more[: max(0, MAX_SEQ_LEN - 3 - keep)], 3, None)
        if len(self.running) > before:
            while self.running[-1].cache.computed_tokens < len(self.running[-1].tokens) - 1:
                self.compute(before, self.chunk)
                self.it_all_agrees()
            self.close(before)

    def copy_overfills(self, at: int, total: int) -> bool:
        """Whether a request that goes on inside a block would need more than a pool has, were it alone."""
        store, needed = self.manager._store, [0] * len(self.manager._store.device)
        for g, group in enumerate(self.groups):
            most = group.most_held(total, self.bs, self.chunk)
            copying = -(-at // self.bs) - group.stale_end(at, self.bs) + 1
            needed[store.pool_of[g]] += max(most, copying)
        return any(n > pool.num_pages for n, pool in zip(needed, store.device, strict=True))

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 50), step=st.integers(1, 7))
    def compute(self, which: int, step: int) -> None:
        run = self.running[which % len(self.running)]
        cache = run.cache
        if run.lacking is not None:
            self.receive(run)
            return
        end = len(run.prompt) if cache.computed_tokens < len(run.prompt) else len(run.tokens)
        upto = min(end, cache.computed_tokens + min(step, self.chunk))
        cache.reserve(upto)
        self.memory.write(cache, run.tokens, range(cache.computed_tokens, upto), run.salt)
        cache.advance(upto - cache.computed_tokens)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 50))
    def transfer(self, which: int) -> None:
        run = self.running[which % len(self.running)]
        if run.cache.reserved_tokens != run.cache.cached_tokens or run.lacking is not None:
            return
        run.lacking = run.cache.reserve_transfer()
        # Written at once: nobody may touch the pages before the transfer is received.
        for g, blocks in enumerate(run.lacking):
            last = min(blocks.stop * self.bs, len(run.prompt))
            positions = range(blocks.start * self.bs, last)
            self.memory.write_group(g, run.cache, run.tokens, positions, run.salt)

    def receive(self, run: Running) -> None:
        run.cache.receive()
        run.lacking = None
        assert len(run.prompt) == run.cache.computed_tokens

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 50))
    def close(self, which: int) -> None:
        self.running.pop(which % len(self.running)).cache.close()

    @invariant()
    def it_all_agrees(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check()
        self.announced.apply(self.manager.flush_events())
        assert self.announced.held == self.manager.resident()
        for run in [run for run in self.running if run.lacking is None]:
            self.memory.check_sequence(run.cache, run.tokens, run.salt)
        self.memory.check_tree(self.manager)

    def teardown(self) -> None:
        if not hasattr(self, "manager"):
            return
        for run in self.running:
            run.cache.close()
        self.running = []
        self.it_all_agrees()
        stats = self.manager.stats()
        assert not any(count for name, count in stats.items() if name.startswith("blocks_used"))


TestCacheMachine = CacheMachine.TestCase
# Shrinking a long run costs more than it shows while the tests are traced for coverage.
TestCacheMachine.settings = examples(50 if sys.gettrace() is None else 20, stateful_step_count=40)
