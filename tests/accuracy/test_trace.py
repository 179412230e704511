"""Engine traces: written, read, and refused with the line that is wrong."""

from __future__ import annotations

import gzip
import json
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.accuracy_helpers import DATA, HEADER, request, write
from tests.vllm_events_helpers import stored
from vswa_plugin.accuracy.trace import (
    Trace,
    TraceEvent,
    TraceHeader,
    TraceRequest,
    TraceWriter,
    open_trace,
)
from vswa_plugin.blocks.layout import CacheGroup
from vswa_plugin.errors import ConfigError

LINES = ['{"type":"header","format":"vllm","block_size":16,"groups":[{"kind":"full"}]}']


def lines(path: Path, *said: str) -> Path:
    path.write_text("\n".join(said))
    return path


def windows(**header: Any) -> list[int | None]:
    """Of a header as it stands in a file."""
    said = msgspec.convert({"format": "trtllm", "tokens_per_block": 32, **header}, TraceHeader)
    return [group.window_size for group in Trace(Path("t.jsonl"), said).layout().groups]


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_what_is_written_is_read(tmp_path: Path, name: str) -> None:
    told = [stored("a"), stored("a", group=1)]
    asked = [request("a", 0), TraceRequest((1, 2), 1, output_len=3, cache_salt="s", lora_name="l")]
    trace = open_trace(write(tmp_path / name, asked[0], *told, asked[1]))

    expected = [(2, asked[0]), (3, TraceEvent(told[0])), (4, TraceEvent(told[1])), (5, asked[1])]
    assert (HEADER, "t") == (trace.header, trace.name)
    assert expected == list(trace.records()) == list(trace.records()), "again and again"


def test_a_trace_is_its_owners_only(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl")

    assert 0o600 == stat.S_IMODE(path.stat().st_mode)


def test_a_trace_is_never_overwritten(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl")

    with pytest.raises(ConfigError, match=r"cannot write a trace to .*File exists"):
        TraceWriter(path, HEADER)


def test_what_is_zipped_shows_whatever_the_name(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(gzip.compress(LINES[0].encode()))

    assert "vllm" == open_trace(path).header.format


def test_fields_of_other_recorders_are_ignored(tmp_path: Path) -> None:
    header = json.loads(LINES[0]) | {"seed": 3}
    asked = {"type": "request", "token_ids": [1], "cached_tokens": 0, "arrival": 0.5}
    trace = open_trace(lines(tmp_path / "t.jsonl", json.dumps(header), "", json.dumps(asked)))

    assert [(3, TraceRequest((1,), 0))] == list(trace.records())


def test_progress_ends_within_the_file(tmp_path: Path) -> None:
    path, seen = write(tmp_path / "t.jsonl", *[request("a", 0)] * 2000), []
    for _ in open_trace(path).records(seen.append):
        pass

    assert seen == sorted(seen)
    assert 2 < len(seen) and 0 < seen[0] and seen[-1] <= path.stat().st_size


# -- layouts ---------------------------------------------------------------------------------------


def test_groups_are_counted_out_in_order() -> None:
    swa = {"kind": "swa", "window": 64, "count": 2}

    assert [64, 64, None, 128] == windows(groups=[swa, {"kind": "full"}, {"kind": "swa", "window": 128}])


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (["swa", "swa", "global"], [512, None]),
        (["global", "swa", "global"], [None, 512]),
        (["swa"], [512]),
        (["global"], [None]),
    ],
)
def test_layers_of_tensorrt_llm_fall_into_a_group_per_kind(
    layers: list[str], expected: list[int | None]
) -> None:
    assert expected == windows(layers=layers, max_attention_window=512)


def test_the_rule_is_the_users_then_the_traces_then_the_formats(tmp_path: Path) -> None:
    named = open_trace(write(tmp_path / "a.jsonl", header=msgspec.structs.replace(HEADER, rule="trtllm_v1")))
    trace = open_trace(write(tmp_path / "b.jsonl"))
    recorded = open_trace(DATA / "trtllm-v2-gemma3-1b-head.jsonl.gz")

    assert ["x", "trtllm_v1", "vllm", "trtllm_v2"] == [
        named.layout("x").rule,
        named.layout().rule,
        trace.layout().rule,
        recorded.layout().rule,
    ]
    assert (CacheGroup(0, 512, 32), CacheGroup(1, None, 32)) == recorded.layout().groups


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"format": "sglang", "block_size": 16, "groups": [{"kind": "full"}]}, "no reuse rule is known"),
        ({"format": "vllm", "groups": [{"kind": "full"}]}, "line 1: expected block_size"),
        ({"format": "vllm", "block_size": 16}, "line 1: expected block_size"),
        ({"format": "trtllm", "block_size": 16, "layers": ["swa"]}, "line 1: expected block_size"),
        ({"format": "vllm", "block_size": 16, "groups": [{"kind": "swa"}]}, "expected a window for swa"),
        ({"format": "vllm", "block_size": 16, "groups": [{"kind": "full", "window": 5}]}, "none for full"),
        (
            {"format": "vllm", "block_size": 16, "groups": [{"kind": "chunked", "chunk": 40}]},
            "line 1: cache group 0: expected chunks of a multiple of the block size",
        ),
        (
            {"format": "vllm", "block_size": 16, "groups": [{"kind": "chunked"}]},
            "expected a chunk for chunked",
        ),
        (
            {"format": "vllm", "block_size": 16, "groups": [{"kind": "full", "chunk": 64}]},
            "for no other kind",
        ),
        (
            {"format": "vllm", "block_size": 16, "groups": [{"kind": "full", "cacheable": False}]},
            "line 1: expected block_size",
        ),
    ],
)
def test_a_header_without_a_layout_says_what_it_lacks(
    tmp_path: Path, header: dict[str, Any], said: str
) -> None:
    trace = open_trace(lines(tmp_path / "t.jsonl", json.dumps({"type": "header", **header})))

    with pytest.raises(ConfigError, match=said):
        trace.layout()


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "said"),
    [
        ("", 'line 1: expected {"type": "header"'),
        ('{"type":"event","event":{}}', 'line 1: expected {"type": "header"'),
        ("hello", "line 1: expected a JSON object of the type header, event or request"),
        ('{"type":"header"}', "line 1: .*`format`"),
        ('{"type":"header","format":"vllm","block_size":0}', r"line 1: .*\$.block_size"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_at_once(tmp_path: Path, first: str, said: str) -> None:
    path = lines(tmp_path / "t.jsonl", *([first] if first else []))

    with pytest.raises(ConfigError, match=said):
        open_trace(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected an engine trace at .*absent\.jsonl: No such file"):
        open_trace(tmp_path / "absent.jsonl")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"type":"reques"}', "line 3: .*Invalid value 'reques'"),
        ('{"type":"request","token_ids":[1,-1],"cached_tokens":0}', r"line 3: .*\$.token_ids"),
        ('{"type":"request","token_ids":[1]}', "line 3: .*cached_tokens"),
        ('{"type":"event"', "line 3: "),
        (LINES[0], "line 3: expected one header, got a second"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    trace = open_trace(lines(tmp_path / "t.jsonl", *LINES, '{"type":"event","event":{}}', line))

    with pytest.raises(ConfigError, match=said):
        list(trace.records())


def test_a_file_that_is_cut_off_is_told_from_one_that_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl.gz", *[request("abc", n % 3) for n in range(5000)])
    path.write_bytes(path.read_bytes()[:-30])

    with pytest.raises(ConfigError, match=r"after line \d+: the file is cut off or damaged"):
        list(open_trace(path).records())


@pytest.mark.parametrize("count", [4_097, 2**31, 2**62, 2**64])
def test_more_cache_groups_than_any_model_has_are_refused_before_they_are_listed(
    tmp_path: Path, count: int
) -> None:
    groups = f'[{{"kind":"full","count":{count}}}]'
    path = lines(
        tmp_path / "t.jsonl", f'{{"type":"header","format":"vllm","block_size":16,"groups":{groups}}}'
    )

    with pytest.raises(ConfigError, match="line 1"):
        open_trace(path)


def test_many_groups_of_a_permitted_number_each_are_refused_too(tmp_path: Path) -> None:
    groups = ",".join(['{"kind":"full","count":4096}'] * 100)
    path = lines(
        tmp_path / "t.jsonl", f'{{"type":"header","format":"vllm","block_size":16,"groups":[{groups}]}}'
    )

    with pytest.raises(ConfigError, match="line 1, groups: expected at most 4096 groups"):
        open_trace(path).layout()
