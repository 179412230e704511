"""Scorers with one planted fault each: their tests must fail. test_scorers.py runs them apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
from hypothesis import Phase, settings

from vswa_plugin.accuracy.scorers import Approximate, Exact
from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.engine.contract import BlocksStored, Node
from vswa_plugin.engine.predicted import Prompt, Scorer
from vswa_plugin.testing.scorers import NewScorer, ScorerConformance
from vswa_plugin.wire.events import Cleared, Event, Moved, Removed, Stored

settings.register_profile("faulty", phases=[Phase.generate], database=None, derandomize=True)
settings.load_profile("faulty")


class _Suite(ScorerConformance):
    kind: type[Any] = Exact

    @pytest.fixture
    def new_scorer(self) -> NewScorer:
        return lambda layout: self.kind()


class TestSound(_Suite):
    """As the others, without a fault."""


class TestNamedAfterTheLayout(_Suite):
    @pytest.fixture
    def new_scorer(self) -> NewScorer:
        def named(layout: CacheLayout) -> Scorer:
            scorer = Exact()
            scorer.name = f"exact of {len(layout.groups)} groups"
            return scorer

        return named


class TestShared(_Suite):
    @pytest.fixture
    def new_scorer(self) -> NewScorer:
        shared = Exact()
        return lambda layout: shared


class TestSharedMemory(_Suite):
    class kind(Approximate):
        memory: ClassVar[dict[int, int]] = {}

        def begin(self, layout: CacheLayout) -> None:
            super().begin(layout)
            self._last = self.memory


class TestPastThePrompt(_Suite):
    class kind(Exact):
        def predict(self, prompt: Prompt) -> int:
            predicted = super().predict(prompt)
            return predicted and predicted + 4


class TestWholeBlocksOnly(_Suite):
    class kind(Exact):
        def predict(self, prompt: Prompt) -> int:
            return super().predict(prompt) if prompt.sequence_hashes else len(prompt.token_ids)


class TestDeafToBegin(_Suite):
    class kind(Exact):
        begun = False

        def begin(self, layout: CacheLayout) -> None:
            if not self.begun:
                super().begin(layout)
            self.begun = True


class TestDeafToClear(_Suite):
    class kind(Exact):
        def apply(self, event: Event) -> None:
            if not isinstance(event, Cleared):
                super().apply(event)


class TestOneGroupIsNotCleared(_Suite):
    class kind(Exact):
        def apply(self, event: Event) -> None:
            if not isinstance(event, Cleared) or event.group_id is None:
                super().apply(event)


class TestDeafToRemovals(_Suite):
    class kind(Exact):
        def apply(self, event: Event) -> None:
            if not isinstance(event, Removed):
                super().apply(event)


class TestKeepsItsLayout(_Suite):
    class kind(Exact):
        layout: CacheLayout | None = None

        def begin(self, layout: CacheLayout) -> None:
            self.layout = self.layout or layout
            super().begin(self.layout)


class TestFailsAtUnknownRemovals(_Suite):
    class kind(Exact):
        def __init__(self) -> None:
            super().__init__()
            self.held: set[int] = set()

        def apply(self, event: Event) -> None:
            if isinstance(event, Stored):
                self.held.update(event.sequence_hashes)
            elif isinstance(event, Removed) and not self.held.issuperset(event.sequence_hashes):
                raise KeyError(event.sequence_hashes)
            super().apply(event)


class TestForgetsAtUnknownRemovals(TestFailsAtUnknownRemovals):
    class kind(TestFailsAtUnknownRemovals.kind):
        def apply(self, event: Event) -> None:
            try:
                super().apply(event)
            except KeyError:
                super().apply(Cleared())


class TestFailsAtMoves(_Suite):
    class kind(Exact):
        def apply(self, event: Event) -> None:
            if isinstance(event, Moved):
                raise NotImplementedError("tiers")
            super().apply(event)


class TestFailsAtPartialBlocks(_Suite):
    class kind(Exact):
        def learn(self, stored: BlocksStored, nodes: Sequence[Node]) -> None:
            list(zip(stored.blocks, nodes, strict=True))
