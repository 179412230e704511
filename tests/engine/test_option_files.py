"""Option files of users: what is read, and what is refused in one line before anything is built of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from vswa_plugin.engine import option_files
from vswa_plugin.engine.option_files import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_EXPANDED,
    MAX_VALUES,
    json_options,
    json_or_text,
    read_options,
)
from vswa_plugin.errors import MAX_LINE, MAX_SHOWN, ConfigError, one_line, shown


def read(tmp_path: Path, content: str | bytes, name: str = "o.yaml") -> dict[str, Any]:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_options(str(file), "--file")


def refusal(tmp_path: Path, content: str | bytes, name: str = "o.yaml") -> str:
    """Why the content is refused: a line that names option and file."""
    with pytest.raises(ConfigError) as refused:
        read(tmp_path, content, name)
    message = str(refused.value)
    assert message.startswith("--file")
    assert name in message
    assert "\n" not in message
    assert len(message) < MAX_LINE + 500
    return message


#: Content -> what the refusal says.
YAML = {
    "a: 1\nb: 2\na: 3\n": "got line 3: the key 'a' twice in one mapping: keep one of them",
    "a: {b: {c: 1, c: 1}}": "line 1: the key 'c' twice",
    "a: 1\n'a': 2\n": "the key 'a' twice",
    "x: &x {a: 1}\ny: {<<: *x, <<: *x}\n": "the key '<<' twice",
    "a: &a [*a]\n": "line 1: a value that holds itself through an alias",
    "a: &a {b: {<<: *a}}\n": "a value that holds itself",
    "? [1, 2]\n: 3\n": "expected a name as key, got a sequence",
    "1: 2\n": "got the key 1, which is no text",
    "a: {<<: 1}": "line 1: expected a mapping to merge, got a scalar",
    "a: {<<: [1]}": "expected a mapping to merge, got a scalar",
    "- 1\n": "expected a mapping of option names, got list",
    "a: 2026-99-99\n": "a value that cannot be read: ValueError",
    "a: !!int ''\n": "a value that cannot be read",
    "a: !!bool maybe\n": "a value that cannot be read",
    "a: !!timestamp soon\n": "a value that cannot be read",
    "a: 0b_\n": "a value that cannot be read",
    "a: !!python/object/apply:os.getcwd []\n": "could not determine a constructor for the tag",
    "a: *b\n": "undefined alias",
    "a: 1\n---\nb: 2\n": "expected a single document",
    "a: [1,\n": "while parsing a flow node (line 2, column 1)",
    "a: \x00": "unacceptable character",
    "a: " + "[" * 5_000: f"more than {MAX_DEPTH} levels",
    "a: " + "9" * 5_000: "a whole number beyond",
    "a: 0x" + "f" * 5_000: "a whole number beyond",
    # To base 60, the time to read one grows with the square of its length: this one took minutes.
    "a: 1" + ":1" * 500_000: "a whole number beyond",
    "a: 1.0e+999": "a number beyond the range of floats",
    'a: {b: "\\ud800"}': "half a character",
    '"a\\udfff": 1': "half a character",
    "a: &a 1\n" + "".join(f"b{n}: " + "[" * 2 + "]" * 2 + "\n" for n in range(9)) + "a: 2": "'a' twice",
}


@pytest.mark.parametrize("content", YAML, ids=[text[:20] for text in YAML])
def test_what_a_yaml_file_may_not_hold_is_refused_in_a_line(tmp_path: Path, content: str) -> None:
    assert YAML[content] in refusal(tmp_path, content)


def test_a_yaml_file_of_too_many_values_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_VALUES == option_files.MAX_VALUES >= 50_000
    monkeypatch.setattr(option_files, "MAX_VALUES", 1000)

    assert "more than 1000 values" in refusal(tmp_path, "a: [" + "1," * 2000 + "]")


def test_aliases_of_aliases_are_counted_as_what_they_stand_for(tmp_path: Path) -> None:
    def nested(levels: int) -> str:
        lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]\n"]
        return "".join(
            [*lines, *(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]\n" for n in range(1, levels))]
        )

    assert 10 == len(read(tmp_path, nested(5))["l4"])
    message = refusal(tmp_path, nested(40))
    assert f"more than {MAX_EXPANDED} values once its aliases are followed" in message
    assert "line 6: " in message


def test_aliases_do_not_hide_the_depth(tmp_path: Path) -> None:
    lines = ["l0: &l0 [x]\n", *(f"l{n}: &l{n} [*l{n - 1}]\n" for n in range(1, 2 * MAX_DEPTH))]

    assert f"more than {MAX_DEPTH} levels once its aliases are followed" in refusal(tmp_path, "".join(lines))


def test_a_merged_section_is_read_with_its_own_keys_over_the_merged_ones(tmp_path: Path) -> None:
    text = "base: &base {a: 1, b: 2}\nover: &over {<<: *base, b: 3}\nlast: {<<: [*over], a: 4}\n"

    assert {"a": 4, "b": 3} == read(tmp_path, text)["last"]  # PyYAML 6.0.4 alone says 2
    assert {"a": 1} == read(tmp_path, "x: &x {a: 1}\ny: &y {a: 2}\nz: {<<: [*x, *y]}\n")["z"]
    assert {"a": 1, "b": 3} == read(tmp_path, text)["over"]


JSON = {
    '{"a": 1, "a": 2}': "the key 'a' twice",
    '{"a": {"b": [{"c": 1, "c": 2}]}}': "the key 'c' twice",
    '{"a": NaN}': "NaN, which JSON does not have",
    '{"a": -Infinity}': "-Infinity, which JSON does not have",
    "[1]": "expected a mapping of option names, got list",
    "{": "line 1 column 2",
    '{"a": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}": f"more than {MAX_DEPTH} levels",
    '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}": f"more than {MAX_DEPTH} levels",
    '{"a": [' + "1," * MAX_VALUES + "1]}": f"more than {MAX_VALUES} values",
    '{"a": ' + "9" * 5_000 + "}": "a whole number beyond",
    '{"a": 18446744073709551617}': "a whole number beyond",
    '{"a": 1e999}': "a number beyond the range of floats",
    '{"a": ["\\ud800"]}': "half a character",
    '{"a": {"\\ud800": 1}}': "half a character",
    # The search for the key took minutes.
    "{" + "".join(f'"{n}": 0, ' for n in range(MAX_VALUES)) + '"z": 1, "z": 2}': "the key 'z' twice",
}


@pytest.mark.parametrize("content", JSON, ids=[text[:20] for text in JSON])
def test_what_a_json_object_may_not_hold_is_refused_in_a_line(tmp_path: Path, content: str) -> None:
    with pytest.raises(ConfigError) as refused:
        json_options(content, "--json", '{"a": 1}')

    assert JSON[content] in str(refused.value)
    assert len(str(refused.value)) < MAX_LINE + 500
    assert JSON[content] in refusal(tmp_path, content, "o.json")


def test_json_of_as_many_levels_as_may_be_is_read() -> None:
    text = '{"a": ' + "[" * (MAX_DEPTH - 2) + "1" + "]" * (MAX_DEPTH - 2) + "}"

    assert json.loads(text) == json_options(text, "--json", "{}")


@given(
    st.dictionaries(
        st.text(max_size=9),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-(2**64), 2**64)
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(),
            lambda below: st.lists(below) | st.dictionaries(st.text(), below),
            max_leaves=9,
        ),
    )
)
@examples(100)
def test_whatever_json_writes_is_read_again(options: dict[str, Any]) -> None:
    assert options == json_options(json.dumps(options), "--json", "{}")


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@examples(200)
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(content)
    try:
        assert isinstance(read_options(str(file), "--file"), dict)
    except ConfigError as error:
        assert "\n" not in str(error)


def test_a_file_that_cannot_be_read_is_refused_with_the_reason(tmp_path: Path) -> None:
    unreadable = {
        str(tmp_path / "none.yaml"): "No such file or directory",
        str(tmp_path): "Is a directory",
        "": "Is a directory",
        "x" * 5_000: "File name too long",
        "a\0b": "null",
        "/dev/zero": f"a file of at most {MAX_BYTES} bytes",
    }
    for path, reason in unreadable.items():
        with pytest.raises(ConfigError) as refused:
            read_options(path, "--file")
        assert reason in str(refused.value)
        assert len(str(refused.value)) < MAX_LINE + 500
    assert "expected text in UTF-8" in refusal(tmp_path, b"a: \xff\n")


@pytest.mark.parametrize("content", ["", "  \n", "# nothing\n", "{}", "---\n"])
def test_a_file_without_content_holds_no_options(tmp_path: Path, content: str) -> None:
    assert {} == read(tmp_path, content)


def test_an_infinite_number_of_yaml_is_read(tmp_path: Path) -> None:
    assert {"a": [float("inf"), float("-inf")]} == read(tmp_path, "a: [.inf, -.INF]")


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    assert {"a": 1} == read(tmp_path, b"\xef\xbb\xbfa: 1\n")


def test_a_json_file_follows_the_rules_of_json(tmp_path: Path) -> None:
    assert {"a": 1000.0, "b": "1:30"} == read(tmp_path, '{\t"a": 1e3,\n\t"b": "1:30"}', "o.json")


def test_a_text_that_is_no_json_is_a_text() -> None:
    assert "warm" == json_or_text("warm")
    assert [1, "a"] == json_or_text('[1, "a"]')
    assert "[" * 9 == json_or_text("[" * 9)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "[" * 100_000 + "]" * 100_000])
def test_json_that_may_not_be_is_not_taken_as_a_text(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a JSON value or a text"):
        json_or_text(text)


def test_a_value_is_shown_whole_where_it_is_short_and_cut_where_it_is_long() -> None:
    huge: Any = "x"
    for _ in range(40):
        huge = [huge] * 10

    assert "[512, 8192]" == shown([512, 8192])
    long = [list(range(10_000)), {"a": ["b" * 1_000] * 9}, dict.fromkeys(range(999), "y" * 99)]
    for value in (huge, "x" * 10**6, 10**3_000, 10**5_000, *long):
        assert len(shown(value)) <= MAX_SHOWN


def test_a_long_message_keeps_its_begin_and_its_end_on_one_line() -> None:
    text = one_line("begin\n" + "x" * 10**5 + "\r\n  the end")

    assert text.startswith("begin x")
    assert text.endswith("x the end")
    assert (1, True) == (len(text.splitlines()), len(text) <= MAX_LINE)
