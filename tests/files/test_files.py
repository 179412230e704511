"""Files that others wrote: refused in a line where they are too large, too deep or something else."""

from __future__ import annotations

import io
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from vswa_plugin.errors import ConfigError, unknown_choice
from vswa_plugin.files import (
    MAX_JSON_DEPTH,
    MAX_JSON_LINE,
    json_depth,
    parse_json,
    parse_json_object,
    read_bounded,
    read_json_lines,
    read_json_object,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=30,
)


def depth_of(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


@given(JSON, st.sampled_from([None, 1]), st.booleans())
@examples(200)
def test_the_depth_of_a_text_is_that_of_its_value(value: Any, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode()

    assert depth_of(value) == json_depth(text)


@given(JSON)
@examples(100)
def test_what_json_writes_is_read(value: Any) -> None:
    assert value == parse_json(json.dumps(value), "here")


@given(st.binary(max_size=200) | st.text('[]{}",:\\n0a', max_size=60).map(str.encode))
@examples(400)
def test_whatever_a_text_holds_it_is_a_value_or_one_line(text: bytes) -> None:
    try:
        parse_json(text, "the file")
    except ConfigError as error:
        assert str(error).startswith("the file: expected JSON")
        assert len(str(error)) < 300
        assert "\n" not in str(error)


@pytest.mark.parametrize("open_, close", [("[", "]"), ('{"a":', "}")])
def test_a_text_may_be_nested_so_deep_and_no_deeper(open_: str, close: str) -> None:
    def nested(depth: int) -> str:
        return open_ * depth + "1" + close * depth

    parse_json(nested(MAX_JSON_DEPTH), "here")
    with pytest.raises(ConfigError, match=f"at most {MAX_JSON_DEPTH} levels deep, got {MAX_JSON_DEPTH + 1} "):
        parse_json(nested(MAX_JSON_DEPTH + 1), "here")


@pytest.mark.parametrize("text", ["[" * 1_000_000, '{"a":' * 1_000_000, '["' + '\\"[' * 1_000_000])
def test_a_text_of_a_million_brackets_is_refused_in_one_pass(text: str) -> None:
    with pytest.raises(ConfigError, match="here: expected JSON"):
        parse_json(text, "here")


def test_brackets_within_texts_do_not_count() -> None:
    assert 1 == json_depth(b'["[[[[", "\\"[[[", "\\\\"]')


def test_a_key_that_one_object_has_twice_is_named() -> None:
    with pytest.raises(ConfigError, match="the key 'a' twice"):
        parse_json('{"a": 1, "b": {"a": 1}, "a": 2}', "here")


@pytest.mark.parametrize("text", [r'["\ud800"]', r'{"\uDFFF": 1}', r'"\ud83d\ud83d"'])
def test_half_a_character_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"here: expected JSON, got: .*surrogates not allowed"):
        parse_json(text, "here")


def test_a_whole_character_may_be_written_in_halves() -> None:
    assert "😀" == parse_json(r'"\ud83d\ude00"', "here")


def test_a_value_that_is_no_object_is_refused_by_its_type() -> None:
    with pytest.raises(ConfigError, match="here: expected a JSON object, got list"):
        parse_json_object("[]", "here")


def test_lines_are_numbered_and_those_that_are_too_long_or_too_deep_are_refused_by_number() -> None:
    def read(content: bytes) -> list[tuple[int, bytes]]:
        return list(read_json_lines(io.BytesIO(content), "t.jsonl", "an event"))

    longest = b'"' + b"x" * (MAX_JSON_LINE - 3) + b'"\n'
    deep = b"[" * (MAX_JSON_DEPTH + 1) + b"]" * (MAX_JSON_DEPTH + 1)

    assert [(1, b"{}\n"), (3, longest), (4, b"[]")] == read(b"{}\n \n" + longest + b"[]")
    assert [1] == [number for number, _ in read(b"[" + b"[]," * 10_000 + b"[]]")], "wide is not deep"
    with pytest.raises(
        ConfigError, match=f"t.jsonl, line 2: expected an event of at most {MAX_JSON_LINE} bytes"
    ):
        read(b"{}\n" + b"x" + longest)
    with pytest.raises(
        ConfigError, match=r"t.jsonl, line 3: expected an event, nested at most 64 levels deep"
    ):
        read(b"{}\n{}\n" + deep)


def test_a_file_is_read_up_to_its_bound_and_refused_beyond(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"x" * 100)

    assert b"x" * 100 == read_bounded(file, "a file", most_bytes=100)
    with pytest.raises(ConfigError, match=f"{file}: expected a file of at most 99 bytes, got a larger file"):
        read_bounded(file, "a file", most_bytes=99)


def test_of_a_file_without_an_end_no_more_than_the_bound_is_read() -> None:
    with pytest.raises(ConfigError, match="at most 1000 bytes"):
        read_bounded("/dev/zero", "a file", most_bytes=1000)


def test_a_pipe_can_be_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b'{"a": 1}',))
    writer.start()

    assert {"a": 1} == read_json_object(pipe)
    writer.join()


def test_what_cannot_be_read_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path}: expected a JSON object, got: .*directory"):
        read_json_object(tmp_path)
    with pytest.raises(ConfigError, match="null"):
        read_json_object("a\0b")
    with pytest.raises(FileNotFoundError):
        read_json_object(tmp_path / "absent")


def test_a_choice_that_is_a_whole_file_is_cut() -> None:
    assert len(unknown_choice("mode", "x" * 1_000_000, ["agg"])) < 300
