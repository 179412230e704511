"""A reuse rule that fails costs the ranks under it alone, at the prompts at which it fails."""

from __future__ import annotations

from typing import Any

import pytest

from tests.index_helpers import BLOCK, BOTH_PATHS, EveryOther, HalfTokens, groups
from vswa_plugin.blocks.hashing import block_hashes, sequence_hashes
from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.blocks.reuse import RULES, ReuseRule
from vswa_plugin.errors import InvariantError, PluginFailed, VswaError
from vswa_plugin.index import WindowIndex
from vswa_plugin.wire.events import Moved, Rank, Stored

FAILING, SOUND = Rank(1), Rank(2)
TOKENS = list(range(1_000, 1_017))
PROMPT = sequence_hashes(block_hashes(TOKENS, BLOCK))
#: At prompts of more tokens a failing rule fails.
LIMIT = 5 * BLOCK
SHORT = 4 * BLOCK + 1
SAYS = "reuse rule mine of plugin theirs: ZeroDivisionError"


class Failing:
    """A rule as another one, but for one method, which fails at long prompts."""

    name = "mine"
    provenance = "read"

    def __init__(self, rule: ReuseRule, method: str) -> None:
        self._rule = rule
        self._method = method

    def __getattr__(self, method: str) -> Any:
        asked = getattr(self._rule, method)

        def answer(about: Any, *rest: int) -> Any:
            if method == self._method and rest[-1] > LIMIT:
                raise PluginFailed(SAYS)
            return asked(about, *rest)

        return answer


#: By numbers, and by asking at every boundary: which methods each asks for a score.
ASKED = [
    *((HalfTokens(), method) for method in ("boundaries", "tokens", "needs")),
    *((EveryOther(), method) for method in ("boundaries", "tokens", "needs", "first_needed")),
]
both_paths = pytest.mark.parametrize("kernel", BOTH_PATHS)
every_method = pytest.mark.parametrize(
    ("rule", "method"), ASKED, ids=[f"{rule.name} {method}" for rule, method in ASKED]
)


def layout(rule: str) -> CacheLayout:
    return CacheLayout(groups(4, None), rule, "gemma")


def two_ranks(kernel: bool, rule: ReuseRule, method: str) -> WindowIndex:
    """One under the rule that fails, one under a sound one; both hold all of the prompt."""
    index = WindowIndex(kernel=kernel, rules={**RULES, "mine": Failing(rule, method)})
    for rank, name in ((FAILING, "mine"), (SOUND, "trtllm_v2")):
        index.join(rank, layout(name))
        for group in (0, 1):
            index.apply(rank, Stored(group, 0, None, tuple(PROMPT)))
    return index


@both_paths
@every_method
def test_ranks_whose_rule_fails_are_left_out_and_the_others_scored(
    kernel: bool, rule: ReuseRule, method: str
) -> None:
    index = two_ranks(kernel, rule, method)

    for _ in range(2):
        assert {SOUND: 16} == index.score(PROMPT, len(TOKENS)) == index.score(PROMPT, len(TOKENS), "gemma")
        assert {SOUND: 16} == index.score_tokens(TOKENS)
    index.drop(SOUND)
    assert {} == index.score(PROMPT, len(TOKENS)) == index.score_tokens(TOKENS)


@both_paths
@every_method
def test_at_prompts_at_which_the_rule_does_not_fail_its_ranks_are_scored(
    kernel: bool, rule: ReuseRule, method: str
) -> None:
    index = two_ranks(kernel, rule, method)
    sound = WindowIndex(kernel=kernel, rules={**RULES, "mine": rule})
    sound.join(FAILING, layout("mine"))
    for group in (0, 1):
        sound.apply(FAILING, Stored(group, 0, None, tuple(PROMPT)))

    index.score(PROMPT, len(TOKENS))
    expected = {**sound.score(PROMPT[:4], SHORT), SOUND: 8}
    assert FAILING in expected
    assert expected == index.score(PROMPT[:4], SHORT)
    assert [None, None] == [each.failed for each in index.explain(PROMPT[:4], SHORT)]


@both_paths
@every_method
def test_an_explanation_says_what_the_rule_said_and_what_is_held(
    kernel: bool, rule: ReuseRule, method: str
) -> None:
    explained = two_ranks(kernel, rule, method).explain(PROMPT, len(TOKENS))
    failing, sound = sorted(explained, key=lambda each: each.rank)

    assert (FAILING, SAYS, True, 0, 0) == (
        failing.rank,
        failing.failed,
        failing.scored,
        failing.boundary,
        failing.cached_tokens,
    )
    assert [(((0, 8),), None, None)] * 2 == [(g.held, g.needed, g.spoilt) for g in failing.groups]
    assert (SOUND, None, 16) == (sound.rank, sound.failed, sound.cached_tokens)


@both_paths
def test_tiers_under_a_rule_that_fails_are_not_known(kernel: bool) -> None:
    index = two_ranks(kernel, HalfTokens(), "first_needed")
    for rank in (FAILING, SOUND):
        index.apply(rank, Moved(1, tuple(PROMPT[:2]), "host"))

    assert {FAILING: 8, SOUND: 16} == index.score(PROMPT, len(TOKENS)), "numbers do not ask for it"
    assert {} == index.tiers(FAILING, PROMPT, 16)
    assert {"host": 2, "device": 2} == index.tiers(FAILING, PROMPT[:4], 8)
    assert {"host": 2, "device": 6} == index.tiers(SOUND, PROMPT, 16)


@both_paths
@pytest.mark.parametrize("error", [PluginFailed("theirs"), VswaError("theirs"), InvariantError("theirs")])
def test_a_rank_whose_rule_fails_as_it_joins_is_refused_and_changes_nothing(
    kernel: bool, error: VswaError
) -> None:
    class Broken(HalfTokens):
        def needs(self, layout: CacheLayout, prompt_len: int) -> Any:
            raise error

    index = WindowIndex(kernel=kernel, rules={**RULES, "mine": Broken()})
    index.join(SOUND, layout("trtllm_v2"))

    with pytest.raises(type(error), match="theirs"):
        index.join(FAILING, layout("mine"))
    assert [SOUND] == list(index.ranks)
    index.check()
