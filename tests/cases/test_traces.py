"""Short engine traces, replayed: what is predicted exactly, what is refused, what shows as a mistake."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.accuracy_helpers import adapter_for
from vswa_plugin.accuracy.replay import replay
from vswa_plugin.accuracy.trace import open_trace
from vswa_plugin.errors import ConfigError

BLOCK = 16
FULL = {"kind": "full"}
HEADER: dict[str, Any] = {"type": "header", "format": "vllm", "block_size": BLOCK, "groups": [FULL]}


def tokens(count: int, start: int = 0) -> list[int]:
    return [start + 31 * n for n in range(count)]


def names(count: int, start: int = 0) -> list[int]:
    """Block hashes; what they are does not matter where an event lists a hash for each block."""
    return [(start + n + 1) * 0x9E3779B97F4A7C15 % (1 << 64) for n in range(count)]


def request(count: int, cached_tokens: int, start: int = 0, **more: Any) -> dict[str, Any]:
    return {"type": "request", "token_ids": tokens(count, start), "cached_tokens": cached_tokens, **more}


def stored(count: int, group: int = 0, start: int = 0, **more: Any) -> dict[str, Any]:
    """The blocks of the first ``count`` tokens."""
    event = {
        "type": "BlockStored",
        "block_hashes": names(count // BLOCK, start),
        "parent_block_hash": None,
        "token_ids": tokens(count, start),
        "block_size": BLOCK,
        "lora_id": None,
        "medium": "GPU",
        "group_idx": group,
        **more,
    }
    return {"type": "event", "event": event}


def removed(*hashes: int, group: int = 0) -> dict[str, Any]:
    event = {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU", "group_idx": group}
    return {"type": "event", "event": event}


CLEARED = {"type": "event", "event": {"type": "AllBlocksCleared"}}


def written(tmp_path: Path, *lines: dict[str, Any], groups: list[dict[str, Any]] | None = None) -> Path:
    header = {**HEADER, "groups": groups or HEADER["groups"]}
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (header, *lines)))
    return path


def predicted(path: Path) -> list[int] | str:
    """Tokens promised per request, or why the trace is refused."""
    try:
        report = replay(open_trace(path), adapter_for)
    except ConfigError as error:
        return str(error).replace(str(path), "the trace")
    return [each.predicted["exact"] for each in report.outcomes]


def test_blocks_that_are_announced_or_removed_twice_count_as_the_engine_counts_them(tmp_path: Path) -> None:
    _, second, third, last = names(4)
    path = written(
        tmp_path,
        request(64, 0),
        stored(64),
        stored(64),
        removed(last),
        request(64, 48),
        removed(last),
        request(64, 48),
        removed(second, third, last),
        removed(second, third, last),
        request(64, 16),
    )

    assert [0, 48, 48, 16] == predicted(path)


def test_a_removal_that_comes_after_everything_was_cleared_takes_nothing_that_was_stored_since(
    tmp_path: Path,
) -> None:
    path = written(
        tmp_path, request(64, 0), stored(64), CLEARED, removed(*names(4)), stored(64), request(64, 48)
    )

    assert [0, 48] == predicted(path)


def test_an_event_may_be_an_array_as_well_as_an_object(tmp_path: Path) -> None:
    event = stored(64, start=7000)["event"]
    fields = ("type", "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium")
    array = [*(event[field] for field in fields), None, [None] * 4, 0, "full_attention"]
    path = written(
        tmp_path,
        request(64, 0),
        stored(64),
        {"type": "event", "event": array},
        request(64, 48),
        request(64, 48, start=7000),
    )

    assert [0, 48, 48] == predicted(path)


def mixed_blocks(tmp_path: Path) -> Path:
    (*_, last) = names(4)
    larger = stored(64, block_hashes=[last], block_size=64)
    return written(tmp_path, request(64, 0), stored(64), request(64, 48), larger, request(64, 48))


def test_a_block_of_another_size_than_the_groups_is_refused_with_its_line_and_both_sizes(
    tmp_path: Path,
) -> None:
    refusal = predicted(mixed_blocks(tmp_path))

    assert isinstance(refusal, str)
    assert "line 5" in refusal
    assert "16" in refusal
    assert "64" in refusal


def test_a_group_with_blocks_of_two_sizes_is_called_that(tmp_path: Path) -> None:
    refusal = predicted(mixed_blocks(tmp_path))

    assert isinstance(refusal, str)
    assert re.search("mix|two|differ", refusal, re.IGNORECASE)


def test_an_event_without_a_group_is_refused_where_there_are_several_groups(tmp_path: Path) -> None:
    event = stored(64, kv_cache_spec_kind="full_attention")
    del event["event"]["group_idx"]
    sliding = {"kind": "swa", "window": 32}
    refusal = predicted(written(tmp_path, request(64, 0), event, request(64, 48), groups=[FULL, sliding]))

    assert isinstance(refusal, str)
    assert "line 3" in refusal
    assert "group_idx" in refusal


def test_a_header_with_a_layout_that_is_not_supported_is_refused_with_its_line(tmp_path: Path) -> None:
    refusal = predicted(written(tmp_path, request(64, 0), groups=[{"kind": "chunked", "chunk": 40}, FULL]))

    assert isinstance(refusal, str)
    assert refusal.startswith("the trace, line 1: cache group 0: expected chunks of a multiple of the block")


def test_a_window_that_is_no_multiple_of_the_block_size_is_predicted_exactly(tmp_path: Path) -> None:
    window = {"kind": "swa", "window": 500}
    path = written(
        tmp_path,
        request(1013, 0),
        *(stored(1008, group) for group in range(3)),
        request(1008, 992),
        # What the last 500 tokens before 992 need is 32 blocks, from block 30 on.
        *(removed(*names(30), group=group) for group in (0, 1)),
        request(1000, 992),
        *(removed(names(31)[30], group=group) for group in (0, 1)),
        request(1000, 0),
        groups=[window, window, FULL],
    )

    assert [0, 992, 992, 0] == predicted(path)


# -- requests for which vLLM does not look its cache up ------------------------------------------------

SLIDING_AND_FULL = [{"kind": "swa", "window": 128}, FULL]


@pytest.mark.parametrize(
    "field", [{"prompt_logprobs": 1}, {"prompt_logprobs": 0}, {"skip_reading_prefix_cache": True}], ids=str
)
def test_nothing_is_promised_to_a_request_for_which_the_engine_does_not_read_its_cache(
    tmp_path: Path, field: dict[str, Any]
) -> None:
    """The field stands in the request's line under the name that vLLM gives it."""
    path = written(
        tmp_path,
        request(1000, 0),
        stored(992, 0),
        stored(992, 1),
        request(1000, 992),
        request(1000, 0, **field),
        request(1000, 992),
        groups=SLIDING_AND_FULL,
    )

    assert [0, 992, 0, 992] == predicted(path)


def test_a_request_for_which_the_engine_announces_what_it_does_not_hold_is_refused_with_its_line(
    tmp_path: Path,
) -> None:
    path = written(tmp_path, request(1000, 0), request(1000, 0, kv_cache_report_mode="full"))
    refusal = predicted(path)

    assert isinstance(refusal, str)
    assert "line 3" in refusal
    assert "expected a request without kv_cache_report_mode, got 'full'" in refusal


def test_without_such_a_field_the_promise_that_is_not_kept_is_reported_with_its_line(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        request(1000, 0),
        stored(992, 0),
        stored(992, 1),
        request(1000, 992),
        request(1000, 0),
        groups=SLIDING_AND_FULL,
    )
    (mistake,) = replay(open_trace(path), adapter_for).mistakes

    assert (6, 992, 0) == (mistake.line, mistake.predicted["exact"], mistake.actual)


def test_blocks_that_are_announced_again_without_being_held_show_as_a_promise_that_is_not_kept(
    tmp_path: Path,
) -> None:
    """As with vLLM's kv_cache_report_mode "full": the announcement looks like any other."""
    listed = names(62)[-8:]
    path = written(
        tmp_path,
        request(1000, 0),
        stored(992, 0, block_hashes=listed),
        stored(992, 1),
        request(1000, 992),
        stored(992, 0),
        stored(992, 1),
        request(512, 0),
        groups=SLIDING_AND_FULL,
    )
    report = replay(open_trace(path), adapter_for)

    assert [0, 992, 496] == [each.predicted["exact"] for each in report.outcomes]
    assert [8] == [each.line for each in report.mistakes]
