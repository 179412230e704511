"""Sections of engine options: what is read, and what is said of what cannot be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vswa_plugin.engine.options import Section
from vswa_plugin.errors import ConfigError

KNOWN = {"tokens_per_block", "max_tokens", "dtype"}


def section(**data: Any) -> Section:
    return Section({"kv": data}, "FILE").section("kv")


def test_values_are_read_with_their_types() -> None:
    kv = section(number=3, many=[1, 2], flag=True, word="x", rule="B", delay=2)

    assert 3 == kv.integer("number", 7)
    assert (1, 2) == kv.positive_integers("many")
    assert kv.boolean("flag", False) is True
    assert "x" == kv.text("word", "y")
    assert "b" == kv.choice("rule", ("a", "b"), "a", any_case=True)
    assert (2.0, float) == (kv.seconds("delay", 1.0), type(kv.seconds("delay", 1.0)))


@pytest.mark.parametrize(
    "data", [{}, dict.fromkeys(["number", "many", "flag", "word", "rule", "delay", "in"])]
)
def test_missing_and_null_mean_the_default_which_is_not_checked(data: dict[str, None]) -> None:
    kv = section(**data)

    assert [-1, None] == [kv.integer("number", -1), kv.integer("number", None)]
    assert kv.positive_integers("many") is None
    assert kv.boolean("flag", True) is True
    assert ["", None] == [kv.text("word", ""), kv.text("word", None)]
    assert ["c", None] == [kv.choice("rule", ("a",), "c"), kv.choice("rule", ("a",), None)]
    assert -1.0 == kv.seconds("delay", -1.0)
    assert {} == kv.section("in").data
    kv.only("number", (1,))


def test_a_section_that_is_missing_or_null_is_empty() -> None:
    assert {} == Section(None, "FILE").data
    assert {} == Section({"kv": None}, "FILE").section("kv").data
    assert {} == Section({}, "FILE").section("kv").section("deeper").data


WRONG: list[tuple[dict[Any, Any], Callable[[Section], object], str]] = [
    ({"n": 0}, lambda kv: kv.integer("n", 1), "kv.n: expected an integer of at least 1, got 0"),
    ({"n": "1"}, lambda kv: kv.integer("n", 1), "kv.n: expected an integer of at least 1, got '1'"),
    ({"n": 9}, lambda kv: kv.integer("n", 1, low=0, high=8), "kv.n: expected an integer in [0, 8], got 9"),
    ({512: 0}, lambda kv: kv.integer(512, 1), "kv.512: expected an integer of at least 1, got 0"),
    (
        {"n": [1, 0]},
        lambda kv: kv.positive_integers("n", "(tokens)"),
        "kv.n: expected a list of positive integers (tokens), got [1, 0]",
    ),
    ({"n": []}, lambda kv: kv.positive_integers("n"), "kv.n: expected a list of positive integers, got []"),
    (
        {"n": [True]},
        lambda kv: kv.positive_integers("n"),
        "kv.n: expected a list of positive integers, got [True]",
    ),
    ({"n": 4}, lambda kv: kv.positive_integers("n"), "kv.n: expected a list of positive integers, got 4"),
    ({"b": 1}, lambda kv: kv.boolean("b", False), "kv.b: expected true or false, got 1"),
    ({"t": ""}, lambda kv: kv.text("t", None), "kv.t: expected a string, got ''"),
    ({"t": 5}, lambda kv: kv.text("t", None), "kv.t: expected a string, got 5"),
    ({"t": "B"}, lambda kv: kv.choice("t", ("a", "b"), None), "kv.t: expected one of a, b, got 'B'"),
    (
        {"t": 5},
        lambda kv: kv.choice("t", ("a", "b"), None, any_case=True),
        "kv.t: expected one of a, b, got 5",
    ),
    ({"s": -1}, lambda kv: kv.seconds("s", 1.0), "kv.s: expected seconds of at least 0, got -1"),
    ({"s": float("nan")}, lambda kv: kv.seconds("s", 1.0), "kv.s: expected seconds of at least 0, got nan"),
    ({"s": float("inf")}, lambda kv: kv.seconds("s", 1.0), "kv.s: expected seconds of at least 0, got inf"),
    ({"s": True}, lambda kv: kv.seconds("s", 1.0), "kv.s: expected seconds of at least 0, got True"),
    (
        {"s": 0},
        lambda kv: kv.seconds("s", 1.0, above_zero=True),
        "kv.s: expected seconds above 0, got 0",
    ),
    ({"v": True}, lambda kv: kv.only("v", (1, "auto")), "kv.v: expected 1 or 'auto', got True"),
    (
        {"v": {"a": 1}},
        lambda kv: kv.only("v", (), "leave it out"),
        "kv.v: expected no value, got {'a': 1}; leave it out",
    ),
    ({"in": [1]}, lambda kv: kv.section("in"), "kv.in: expected a mapping, got [1]"),
    ({"in": []}, lambda kv: kv.section("in"), "kv.in: expected a mapping, got []"),
]


@pytest.mark.parametrize(("data", "read", "message"), WRONG)
def test_a_value_that_cannot_be_used_is_named_with_what_was_expected_what_came_and_where(
    data: dict[Any, Any], read: Callable[[Section], object], message: str
) -> None:
    kv = Section({"kv": data}, "FILE").section("kv")
    with pytest.raises(ConfigError) as caught:
        read(kv)

    assert f"{message} (in FILE)" == str(caught.value)


def test_options_that_are_no_mapping_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"options: expected a mapping, got \[1\] \(in FILE\)"):
        Section([1], "FILE")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "did you mean 'kv.max_tokens'?"),
        ({"advice": "Say so."}, "did you mean 'kv.max_tokens'? Say so."),
        ({"with_path": False, "otherwise": "we read dtype"}, "did you mean 'max_tokens'?"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        section(dtype="auto", max_token=1).check(KNOWN, **more)

    assert f"unknown option 'kv.max_token' in FILE: {message}" == str(caught.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "known: dtype, max_tokens, tokens_per_block."),
        ({"advice": "Say so."}, "known: dtype, max_tokens, tokens_per_block. Say so."),
        ({"otherwise": "we read dtype"}, "we read dtype"),
    ],
)
def test_where_no_known_key_is_near_the_known_ones_are_listed(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Section({"zzz": 1}, "FILE").check(KNOWN, **more)

    assert f"unknown option 'zzz' in FILE: {message}" == str(caught.value)


def test_known_keys_pass_whatever_their_values() -> None:
    section(dtype=None, max_tokens="x").check(KNOWN)


def test_a_key_that_is_no_string_is_unknown_and_not_a_crash() -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'kv\.512' in FILE"):
        Section({"kv": {512: 1}}, "FILE").section("kv").check(KNOWN)


def test_what_is_given_is_told_by_its_path_null_or_not() -> None:
    assert ["kv.dtype", "kv.n"] == section(dtype=None, n=1, other=2).given(["dtype", "missing", "n"])


ANYTHING = st.one_of(st.integers(-3, 12), st.booleans(), st.floats(), st.text(max_size=2), st.none())


@given(value=ANYTHING, low=st.integers(-2, 5), high=st.none() | st.integers(0, 10))
def test_an_integer_is_taken_exactly_where_it_is_one_within_the_bounds(
    value: Any, low: int, high: int | None
) -> None:
    allowed = [*range(low, 20 if high is None else high + 1)]
    fits = value is None or (type(value) is int and value in allowed)
    try:
        taken: Any = section(n=value).integer("n", 77, low, high)
    except ConfigError:
        taken = "refused"

    assert ("refused" if not fits else 77 if value is None else value) == taken
