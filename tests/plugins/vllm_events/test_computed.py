"""Names computed from tokens: equal to those computed at once, whatever came before, in bounded memory."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from vswa_plugins.vllm_events.computed import Computed, Root

from tests.hybrid_manager import names_of
from tests.properties import examples

Prompt = tuple[list[int], str | None]


@st.composite
def prompts(draw: st.DrawFn) -> list[Prompt]:
    """Many begin as one before."""
    made: list[Prompt] = []
    for _ in range(draw(st.integers(1, 6))):
        tokens, salt = draw(st.sampled_from(made)) if made else ([], draw(st.sampled_from([None, "s"])))
        if draw(st.booleans()) and made:
            salt = draw(st.sampled_from([None, "s"]))
        kept = tokens[: draw(st.integers(0, len(tokens)))]
        seed = draw(st.integers(0, 3))
        made.append((kept + [(seed + n * n) % 7 for n in range(draw(st.integers(0, 90)))], salt))
    return made


@examples(300)
@given(prompts(), st.integers(1, 4), st.integers(0, 5), st.integers(1, 40))
def test_prompts_have_the_names_that_are_computed_at_once(
    made: list[Prompt], unit: int, lookahead: int, piece: int
) -> None:
    computed = Computed(unit, lookahead)
    for tokens, salt in made:
        computed.wait(tokens, salt)
        while not computed.go_on(piece):
            pass

    for tokens, salt in made:
        for end, name in names_of(tokens, salt, unit, lookahead).items():
            serial = computed.find(name)
            assert serial is not None
            path = computed.path(serial, lambda _: False)
            assert path is not None
            assert (None, Root(salt), end // unit) == (path.above, path.root, len(path.serials))
            assert tuple(tokens[:end]) == computed.tokens(path.serials)
            assert tuple(tokens[end : end + lookahead]) == computed.tokens_after(serial)


@examples(300)
@given(prompts(), st.integers(1, 3), st.integers(0, 2), st.integers(1, 60))
def test_in_little_room_a_prefix_has_its_own_tokens_or_no_path(
    made: list[Prompt], unit: int, lookahead: int, limit: int
) -> None:
    computed = Computed(unit, lookahead, limit)
    for tokens, salt in made:
        computed.wait(tokens, salt)
        assert computed.go_on(1 << 20)
        assert len(computed._names) <= limit
        assert len(computed._serials) <= limit
        names = names_of(tokens, salt, unit, lookahead)
        if len(names) <= limit:
            assert all(computed.find(name) is not None for name in list(names.values())[-1:])
        for other, other_salt in made:
            for end, name in names_of(other, other_salt, unit, lookahead).items():
                serial = computed.find(name)
                path = None if serial is None else computed.path(serial, lambda _: False)
                if path is not None:
                    assert tuple(other[:end]) == computed.tokens(path.serials)


def test_what_begins_as_an_earlier_prompt_is_hashed_from_there_on() -> None:
    computed = Computed(4, 1)
    shared = list(range(4_000))
    computed.wait(shared, None)
    computed.go_on(1 << 20)
    computed.fresh.clear()

    computed.wait([*shared, *range(100)], None)
    computed.go_on(1 << 20)
    assert 25 <= len(computed.fresh) <= 25 + 17

    computed.fresh.clear()
    computed.wait(shared, "salt")
    computed.go_on(1 << 20)
    assert 999 == len(computed.fresh)


def test_prompts_that_wait_are_bounded() -> None:
    computed = Computed(4, 0)
    for start in range(50):
        computed.wait(range(start, start + 200_000), None)

    assert computed._waiting_tokens <= 4_000_000
    assert 20 == len(computed._waiting)
    assert start == computed._waiting[-1].tokens[0], "the newest are kept"


def test_what_is_no_prompt_does_not_wait() -> None:
    computed = Computed(4, 0)
    for odd in (["a"] * 8, [1.5] * 8, [-1] * 8, [1 << 32] * 8, [1, 2]):
        computed.wait(odd, None)  # type: ignore[arg-type]

    assert not computed._waiting
