"""The conformance suite of scorers: what a replay of an engine trace relies on, as tests to inherit.

class TestMyScorer(ScorerConformance):
    @pytest.fixture
    def new_scorer(self): return lambda layout: MyScorer(layout)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from vswa_plugin.blocks.hashing import sequence_hashes_of_tokens
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.contract import BlocksStored, EngineBlock, Node
from vswa_plugin.engine.predicted import Prompt, Scorer
from vswa_plugin.wire.events import TIERS, Cleared, Moved, Removed, Stored

try:
    import pytest
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError(
        "vswa_plugin.testing.scorers needs pytest and hypothesis: pip install 'vswa-plugin[test]'; most "
        "other modules of vswa_plugin.testing work without them"
    ) from error

__all__ = [
    "NewScorer",
    "ScorerConformance",
    "ScorerReplay",
    "scorer_layouts",
]

#: Returns a scorer of its own for each call, for an engine of that layout; ``begin`` has not been called.
NewScorer: TypeAlias = Callable[[CacheLayout], Scorer]

_STEPS = 40
_KINDS = ("store", "store", "store", "remove", "move", "clear", "begin", "predict", "predict", "predict")


def scorer_layouts(rule: str = "trtllm_v2", block_size: int = 4) -> list[CacheLayout]:
    """Layouts of one rule: with one and two sliding groups beside a global one, and without a global one."""
    windows = [(2, None), (1, 3, None), (1, 3)]
    return [
        CacheLayout(
            tuple(CacheGroup(n, w and w * block_size, block_size) for n, w in enumerate(each)), rule, "m"
        )
        for each in windows
    ]


class ScorerConformance:
    """What every scorer promises. An author subclasses it with a fixture.

    ``new_scorer``: a :data:`NewScorer`.
    ``layouts`` (optional): layouts of one rule and one block size, all of which each scorer takes.

    :cvar examples: random replays per test and layout.
    """

    examples = 60

    @pytest.fixture
    def layouts(self) -> Sequence[CacheLayout]:
        return scorer_layouts()

    def test_a_scorer_has_one_name_that_reports_can_show(
        self, new_scorer: NewScorer, layouts: Sequence[CacheLayout]
    ) -> None:
        names = {new_scorer(layout).name for layout in layouts}
        assert len(names) == 1 and all(names), f"expected one name for all layouts, got {sorted(names)}"

    def test_each_scorer_is_an_object_of_its_own_that_knows_nothing_of_others(
        self, new_scorer: NewScorer, layouts: Sequence[CacheLayout]
    ) -> None:
        for layout in layouts:
            first, second = ScorerReplay(new_scorer(layout), layout), ScorerReplay(new_scorer(layout), layout)
            assert first.scorer is not second.scorer, (
                "expected a new scorer for each call, got the same again"
            )
            tokens = _prompts(random.Random(1), layout)[0]
            for group in layout.groups:
                first.store(group.group_id, tokens)
            first.predict(tokens)
            for replay in (second, ScorerReplay(new_scorer(layout), layout)):
                _expect_nothing(replay, [tokens], "another scorer followed the engine")

    def test_predictions_are_within_the_prompt_in_any_order_of_a_replay(
        self, new_scorer: NewScorer, layouts: Sequence[CacheLayout]
    ) -> None:
        @settings(max_examples=self.examples * len(layouts), deadline=None)
        @given(st.sampled_from(list(layouts)), st.integers(0, 2**32 - 1))
        def check(layout: CacheLayout, seed: int) -> None:
            rng = random.Random(seed)
            replay = ScorerReplay(new_scorer(layout), layout)
            for step in range(_STEPS):
                _take_step(rng, replay, _prompts(rng, layout) if step % 20 == 0 else replay.prompts)

        check()

    def test_prompts_without_a_whole_block_are_predicted_as_well(
        self, new_scorer: NewScorer, layouts: Sequence[CacheLayout]
    ) -> None:
        for layout in layouts:
            replay = ScorerReplay(new_scorer(layout), layout)
            _expect_nothing(
                replay, [[], [7], [7] * (layout.block_size - 1)], "no whole block is in the prompt"
            )

    @pytest.mark.parametrize("how", ["begin", "clear", "clear groups", "remove"])
    def test_nothing_is_promised_where_nothing_is_resident(
        self, new_scorer: NewScorer, layouts: Sequence[CacheLayout], how: str
    ) -> None:
        """For prompts that are predicted for the first time: a scorer may remember requests."""
        for layout in layouts:
            prompts = _prompts(random.Random(2), layout)
            replay = ScorerReplay(new_scorer(layout), layout)
            _expect_nothing(replay, prompts[:1], "nothing was stored yet")
            for group in layout.groups:
                replay.store(group.group_id, prompts[-1])
            replay.empty(how)
            _expect_nothing(replay, prompts[-1:], f"all is gone by {how!r}")

    def test_an_engine_may_begin_again_with_another_layout(
        self, new_scorer: NewScorer, layouts: Sequence[CacheLayout]
    ) -> None:
        for layout in layouts:
            for other in layouts:
                prompts = _prompts(random.Random(3), layout)
                replay = ScorerReplay(new_scorer(layout), layout)
                for group in layout.groups:
                    replay.store(group.group_id, prompts[0])
                replay.begin(other)
                _expect_nothing(replay, prompts[:1], f"the engine began again as {other}")
                replay.store(other.groups[-1].group_id, prompts[1])
                replay.predict(prompts[1])

    def test_removals_of_what_was_never_stored_change_nothing(
        self, new_scorer: NewScorer, layouts: Sequence[CacheLayout]
    ) -> None:
        for layout in layouts:
            prompts = _prompts(random.Random(4), layout)
            plain, disturbed = (ScorerReplay(new_scorer(layout), layout) for _ in range(2))
            for number, tokens in enumerate(prompts):
                for group in layout.groups:
                    disturbed.scorer.apply(Removed(group.group_id, (2**64 - 1 - number,)))
                    disturbed.scorer.apply(Removed(group.group_id, tuple(disturbed.names(prompts[-1])[-1:])))
                    for replay in (plain, disturbed):
                        if tokens is not prompts[-1]:
                            replay.store(group.group_id, tokens)
                expected, predicted = plain.predict(tokens), disturbed.predict(tokens)
                assert expected == predicted, f"expected {expected} tokens as before, got {predicted}"


class ScorerReplay:
    """One engine, shown to a scorer as a replay shows it: the tokens of a stored block, then the change.

    :ivar layout: as the scorer was last given it.
    :ivar prompts: prompts that random steps choose from.
    """

    def __init__(self, scorer: Scorer, layout: CacheLayout) -> None:
        self.scorer = scorer
        self.prompts: list[list[int]] = []
        self._held: dict[int, list[int]] = {}
        self.begin(layout)

    def begin(self, layout: CacheLayout) -> None:
        """Nothing is resident, and this is the engine's layout."""
        self.layout = layout
        self._held = {group.group_id: [] for group in layout.groups}
        self.scorer.begin(layout)

    def names(self, tokens: Sequence[int]) -> list[int]:
        """Sequence hashes of the whole blocks of ``tokens``."""
        return list(sequence_hashes_of_tokens(tokens, self.layout.block_size))

    def store(self, group_id: int, tokens: Sequence[int], first: int = 0) -> None:
        """Block ``first`` and all after it become resident in one group; a partial tail is shown unnamed."""
        names, size, held = self.names(tokens), self.layout.block_size, self._held[group_id]
        keys = [tuple(tokens[at : at + size]) for at in range(first * size, len(tokens), size)]
        blocks = tuple(EngineBlock(first + n, key) for n, key in enumerate(keys))
        parents = [None, *names]
        nodes = [Node(name, at, parents[at]) for at, name in enumerate(names)][first:]
        self.scorer.learn(BlocksStored(group_id, first - 1 if first else None, blocks), nodes)
        for node in nodes:
            if node.sequence_hash not in held:
                held.append(node.sequence_hash)
                event = Stored(group_id, node.position, node.parent_hash, (node.sequence_hash,))
                self.scorer.apply(event)

    def remove(self, group_id: int, at: int) -> None:
        """The block that the group holds at index ``at``, in order of storing, leaves all tiers."""
        self.scorer.apply(Removed(group_id, (self._held[group_id].pop(at),)))

    def move(self, group_id: int, at: int, tier: str) -> None:
        """The block that the group holds at index ``at`` moves to another tier."""
        self.scorer.apply(Moved(group_id, (self._held[group_id][at],), tier))

    def held(self, group_id: int) -> int:
        """How many blocks the group holds."""
        return len(self._held[group_id])

    def empty(self, how: str) -> None:
        """Nothing is resident any more; ``how``: ``begin``, ``clear``, ``clear groups`` or ``remove``."""
        if how == "begin":
            self.begin(self.layout)
        elif how == "clear":
            self.clear(None)
        for group in self.layout.groups:
            if how == "clear groups":
                self.clear(group.group_id)
            while self._held[group.group_id]:
                self.remove(group.group_id, -1)

    def clear(self, group_id: int | None) -> None:
        """One group holds nothing any more; None: no group does."""
        for each in self._held if group_id is None else [group_id]:
            self._held[each] = []
        self.scorer.apply(Cleared(group_id))

    def predict(self, tokens: Sequence[int]) -> int:
        """The scorer's prediction, which must be a number of tokens of the prompt."""
        predicted = self.scorer.predict(Prompt(tokens, self.names(tokens)))
        expected = f"expected a prediction of 0 to {len(tokens)} tokens from {self.scorer.name!r}"
        assert isinstance(predicted, int) and 0 <= predicted <= len(tokens), f"{expected}, got {predicted!r}"
        return predicted


def _take_step(rng: random.Random, replay: ScorerReplay, prompts: list[list[int]]) -> None:
    replay.prompts = prompts
    group_id, tokens = rng.choice(replay.layout.groups).group_id, rng.choice(prompts)
    kind, held = rng.choice(_KINDS), replay.held(group_id)
    if kind == "store":
        replay.store(group_id, tokens, rng.randrange(len(replay.names(tokens)) or 1))
    elif kind == "predict":
        replay.predict(tokens)
    elif kind == "begin" and rng.random() < 0.3:
        replay.begin(replay.layout)
    elif kind == "clear" and rng.random() < 0.3:
        replay.clear(rng.choice((group_id, None)))
    elif held and kind == "remove":
        replay.remove(group_id, rng.randrange(held))
    elif held and kind == "move":
        replay.move(group_id, rng.randrange(held), rng.choice(TIERS))


def _prompts(rng: random.Random, layout: CacheLayout) -> list[list[int]]:
    """Prompts of up to eight blocks that share their beginnings; the last shares nothing with the others."""
    size = layout.block_size
    base = [rng.randrange(1000) for _ in range(rng.randint(3, 8) * size)]
    forks = [
        base[: rng.randrange(len(base))] + [rng.randrange(1000) for _ in range(rng.randint(1, 3 * size))]
        for _ in range(3)
    ]
    return [base, *forks, [1000 + rng.randrange(1000) for _ in range(4 * size + 1)]]


def _expect_nothing(replay: ScorerReplay, prompts: Iterable[Sequence[int]], why: str) -> None:
    for tokens in prompts:
        predicted = replay.predict(tokens)
        assert predicted == 0, f"expected a promise of 0 tokens, since {why}, got {predicted}"
