"""The V1 cache managers, driven at random: several sequences at once, a host tier, transfers.

Pages have contents here: each position holds the tokens up to it, as a stand-in for its keys and values, and
every token computed looks at all that its windows let it see.
"""

from __future__ import annotations

import sys
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from vswa_plugins.gemma3_cpu.cache.api import DEVICE, Slot
from vswa_plugins.gemma3_cpu.cache.spec import GroupSpec
from vswa_plugins.gemma3_cpu.cache.v1 import CacheManagerV1
from vswa_plugins.gemma3_cpu.cache.v1.sequence import CacheSequenceV1
from vswa_plugins.gemma3_cpu.cache.v1.window import Window

from tests.gemma3_v1_helpers import Mirror, misnamed, predicted, walked
from tests.properties import examples
from vswa_plugin.errors import InvalidRequest

MAX_SEQ_LEN = 32


class Running:
    """One open sequence and the tokens that it will have."""

    def __init__(
        self, cache: CacheSequenceV1, salt: str | None, prompt: list[int], output: list[int]
    ) -> None:
        self.cache, self.salt, self.prompt, self.output = cache, salt, prompt, output
        self.tokens = prompt + output

    @property
    def left(self) -> int:
        """Tokens still to be computed; the last one of the output never is."""
        return len(self.tokens) - 1 - self.cache.computed_tokens

    def known_output(self) -> list[int]:
        """What was sampled so far."""
        done = self.cache.computed_tokens - len(self.prompt)
        return self.output[: done + 1] if done >= 0 else []


@st.composite
def group_specs(draw: st.DrawFn) -> tuple[int, list[GroupSpec]]:
    bs = draw(st.integers(1, 3))
    shapes = [("s", "g"), ("g", "s"), ("s", "g", "s"), ("g",), ("s",)]
    shape = draw(st.sampled_from(shapes))
    sizes = draw(st.permutations(range(1, 4)))
    windows = [None if kind == "g" else bs * size for kind, size in zip(shape, sizes, strict=False)]
    host = draw(st.sampled_from([0, 0, 0, 1, 4]))
    ids = draw(st.permutations(range(len(shape))))
    blocks = [draw(st.integers(8, 40)) for _ in windows]
    return bs, [GroupSpec(i, w, n, host_blocks=host) for i, w, n in zip(ids, windows, blocks, strict=True)]


class V1Machine(RuleBasedStateMachine):
    contiguous: bool

    @initialize(specs=group_specs(), chunk=st.integers(1, 6), partial=st.booleans())
    def start(self, specs: tuple[int, list[GroupSpec]], chunk: int, partial: bool) -> None:
        self.bs, self.groups = specs
        self.chunk, self.partial = chunk, partial
        self.manager = CacheManagerV1(
            self.groups,
            self.bs,
            MAX_SEQ_LEN,
            contiguous=self.contiguous,
            enable_partial_reuse=partial,
            max_chunk_tokens=chunk,
            mover=self.move,
        )
        self.running: list[Running] = []
        self.texts: list[list[int]] = [[]]
        self.memory: list[dict[Slot, list[Any]]] = [{} for _ in self.groups]
        self.mirror = Mirror(self.groups, MAX_SEQ_LEN, subtrees=self.contiguous)

    def move(self, group: int, source: Slot, target: Slot) -> None:
        self.memory[group][target] = list(self.memory[group].get(source, [None] * self.bs))

    @rule(
        earlier=st.integers(0, 100),
        cut=st.one_of(st.just(MAX_SEQ_LEN), st.integers(0, MAX_SEQ_LEN)),
        more=st.one_of(st.integers(1, 12).map(lambda n: [0] * n), st.lists(st.integers(0, 1), min_size=1)),
        output=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        salt=st.sampled_from([None, None, None, None, "a", "b"]),
        how=st.sampled_from(["open", "finish", "finish", "transfer"]),
    )
    def request(
        self, earlier: int, cut: int, more: list[int], output: list[int], salt: str | None, how: str
    ) -> None:
        """Prompts grow out of earlier texts, answers included; most requests run to their end at once."""
        prompt = (self.texts[earlier % len(self.texts)][:cut] + more)[: MAX_SEQ_LEN - len(output)]
        self.texts.append(prompt + output)
        if not self.open(prompt, output, salt):
            return
        if how == "transfer":
            self.transfer(self.running[-1])
        elif how == "finish":
            self.finish(len(self.running) - 1)

    def open(self, prompt: list[int], output: list[int], salt: str | None) -> bool:
        expected = walked(self.manager, prompt, salt, self.partial)
        promised = predicted(self.manager, prompt, salt)
        excepted = misnamed(self.manager, prompt, salt)
        try:
            cache = self.manager.open(prompt, len(output), salt)
        except InvalidRequest:
            return False
        if cache is None:
            assert self.running, "alone, a request that fits is admitted"
            return False
        self.running.append(Running(cache, salt, prompt, output))

        assert cache.cached_tokens == cache.computed_tokens < len(prompt)
        assert promised // self.bs == expected // self.bs or excepted
        if self.contiguous and any(group.host_blocks for group in self.groups):
            # To bring back a block may cost the prompt a later one.
            assert cache.cached_tokens // self.bs <= expected // self.bs
        else:
            assert cache.cached_tokens // self.bs == expected // self.bs
        return True

    def transfer(self, run: Running) -> None:
        lacking = run.cache.reserve_transfer()
        for g, blocks in enumerate(lacking):
            for position in range(blocks.start * self.bs, min(blocks.stop * self.bs, len(run.prompt))):
                self.write(run, g, position)
        run.cache.receive()

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 100), ahead=st.integers(1, 6), n=st.integers(0, 6))
    def compute(self, which: int, ahead: int, n: int) -> None:
        """Reserve, write keys and values, look at all that attention looks at, advance."""
        run = self.running[which % len(self.running)]
        ahead = min(ahead, self.chunk, run.left)
        n = min(n, ahead)
        first = run.cache.computed_tokens
        run.cache.reserve(first + ahead)
        for position in range(first, first + n):
            for g in range(len(self.groups)):
                self.write(run, g, position)
        for position in range(first, first + n):
            self.attend(run, position)
        run.cache.advance(n)

        assert first + n == run.cache.computed_tokens

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 100))
    def finish(self, which: int) -> None:
        run = self.running[which % len(self.running)]
        while run.left:
            self.compute(which, 6, 6)
        self.close(which)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 100))
    def close(self, which: int) -> None:
        run = self.running.pop(which % len(self.running))
        run.cache.close(run.known_output())
        run.cache.close()
        self.flush()

    @rule()
    def flush(self) -> None:
        for event in self.manager.flush_events():
            self.mirror.read(event)

        assert self.mirror.covers(self.manager)

    @invariant()
    def invariants(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check()
        for g in range(len(self.groups)):
            tables = [page for run in self.running for page in run.cache.tables[g] if page >= 0]
            reusable = {page.slot.page for page in self.window_of(g).pool.pages if page.node is not None}
            for run in self.running:
                for page in run.cache.tables[g][run.cache.computed_tokens // self.bs :]:
                    again = page in reusable or self.contiguous
                    assert again or tables.count(page) <= 1, "a page that will be written has one owner"

    def teardown(self) -> None:
        if not hasattr(self, "manager") or sys.exc_info()[0] is not None:
            return  # what failed is told, not what follows from it
        while self.running:
            self.close(0)
        stats = self.manager.stats()
        assert not any(count for name, count in stats.items() if name.startswith("blocks_used"))
        for window in self.manager.windows:
            window.pool.queues[1].clear()  # no room on the host: blocks are lost, not moved
            window.pool.on_host = 0
            pages = [window.take() for _ in range(window.spec.num_blocks)]
            assert len(pages) == len(set(pages))
            for page in window.pool.pages:
                if page.node is not None:
                    window._lose(page)
        self.flush()

        assert {} == self.manager._tree.roots

    def write(self, run: Running, g: int, position: int) -> None:
        page = run.cache.tables[g][position // self.bs]
        assert 0 <= page < self.groups[g].num_blocks
        content = self.memory[g].setdefault(Slot(DEVICE, page), [None] * self.bs)
        owners = sum(page in other.cache.tables[g] for other in self.running)
        if owners > 1 or any(
            each.node and each.slot == (DEVICE, page) for each in self.window_of(g).pool.pages
        ):
            # A window may have more of a prompt than it is resumed at: that is computed again.
            assert content[position % self.bs] == self.content(run, position), "others need what lies there"
        content[position % self.bs] = self.content(run, position)

    def window_of(self, g: int) -> Window:
        return next(window for window in self.manager.windows if window.index == g)

    @staticmethod
    def content(run: Running, position: int) -> Any:
        return run.salt, tuple(run.tokens[: position + 1])

    def attend(self, run: Running, position: int) -> None:
        for g, group in enumerate(self.groups):
            first = 0 if group.window_size is None else max(0, position - group.window_size + 1)
            for p in range(first, position + 1):
                page = run.cache.tables[g][p // self.bs]
                assert page >= 0, "a token that can be seen has no page"
                assert self.content(run, p) == self.memory[g][Slot(DEVICE, page)][p % self.bs]


class V1LookingPastHoles(V1Machine):
    contiguous = False


class V1Contiguous(V1Machine):
    contiguous = True


V1LookingPastHoles.TestCase.settings = examples(100, stateful_step_count=30)
V1Contiguous.TestCase.settings = examples(100, stateful_step_count=30)
TestV1LookingPastHoles = V1LookingPastHoles.TestCase
TestV1Contiguous = V1Contiguous.TestCase
