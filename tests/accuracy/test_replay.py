"""Replays: recorded engines are predicted exactly; what is predicted when; what is excepted, and why."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import msgspec
import pytest

from tests.accuracy_helpers import DATA, HEADER, adapter_for, replayed, request, write
from tests.vllm_events_helpers import CLEARED, SIZE, removed, stored, tokens_of
from vswa_plugin.accuracy.exceptions import LAST_BLOCK, PARTIAL_MATCH
from vswa_plugin.accuracy.replay import replay
from vswa_plugin.accuracy.report import Report
from vswa_plugin.accuracy.scorers import GlobalOnly
from vswa_plugin.accuracy.trace import TraceHole, TraceRequest, TraceWriter, open_trace
from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.dynamo.runtime import namespaced_block_hash
from vswa_plugin.engine.contract import BlocksStored, Node
from vswa_plugin.engine.predicted import Prompt, Scorer
from vswa_plugin.errors import ConfigError
from vswa_plugin.wire.events import Event

RECORDED = {
    "trtllm-v2-gemma3-1b": 150,
    "trtllm-v2-host-tier": 100,
    "vllm-0.33-gptoss": 200,
    "vllm-0.33-gemma3-1b-dense": 120,
}


@cache
def recorded(trace: str) -> Report:
    return replayed(DATA / f"{trace}.jsonl.gz")


def predicted(path: Path, scorer: str = "exact", rule: str | None = None) -> list[int]:
    return [each.predicted[scorer] for each in replayed(path, rule=rule).outcomes]


# -- recorded engines ------------------------------------------------------------------------------


@pytest.mark.parametrize("trace", RECORDED)
def test_every_request_of_a_recorded_engine_is_predicted_in_whole_blocks(trace: str) -> None:
    report = recorded(trace)

    assert (RECORDED[trace], 1.0, []) == (report.requests, report.exact_share, report.mistakes)
    assert (0, 0, [], "run") == (report.restarts, report.unattributed, report.reasons(), report.provenance)


@pytest.mark.parametrize(
    ("trace", "exact_blocks"),
    [
        ("trtllm-v2-gemma3-1b", [150, 150, 98, 136, 150, 58, 82]),
        ("trtllm-v2-host-tier", [100, 100, 82, 95, 100, 32, 56]),
        ("vllm-0.33-gptoss", [200, 200, 110, 112, 200, 99, 57]),
        ("vllm-0.33-gemma3-1b-dense", [120, 120, 106, 116, 120, 49, 49]),
    ],
)
def test_what_others_know_is_not_enough(trace: str, exact_blocks: list[int]) -> None:
    """Ours, the forecast, global only, mixed groups, min of last boundaries, always 0, approximate."""
    assert exact_blocks == [score.exact_blocks for score in recorded(trace).scores]


@pytest.mark.parametrize("trace", RECORDED)
def test_the_global_group_alone_promises_too_much_and_never_too_little(trace: str) -> None:
    score = recorded(trace).score("global only")

    assert (0, score.requests) == (score.under, score.exact_blocks + score.over)


@pytest.mark.parametrize(("trace", "exact_tokens"), [("trtllm-v2-gemma3-1b", 80), ("vllm-0.33-gptoss", 200)])
def test_parts_of_blocks_are_not_predicted(trace: str, exact_tokens: int) -> None:
    assert exact_tokens == recorded(trace).score().exact_tokens


def test_another_rule_shows_on_the_same_trace() -> None:
    trace = DATA / "trtllm-v2-gemma3-1b.jsonl.gz"
    contiguous = replayed(trace, rule="trtllm_v1_contiguous")

    assert ("trtllm_v1_contiguous", "transcribed") == (contiguous.rule, contiguous.provenance)
    assert 0 < contiguous.score().under and contiguous.exact_share < 1


# -- when and what ---------------------------------------------------------------------------------


def test_a_request_is_predicted_before_the_events_that_it_causes(tmp_path: Path) -> None:
    stores = [stored("ab", group=0), stored("ab", group=1)]
    path = write(tmp_path / "t.jsonl", request("ab", 0, [1]), *stores, request("ab", 8, [1]))

    assert [0, 2 * SIZE] == predicted(path)


def test_all_groups_decide_and_what_goes_counts_no_more(tmp_path: Path) -> None:
    asked = request("abc", 0, [1])
    path = write(
        tmp_path / "t.jsonl",
        *(stored("abc"), stored("abc", group=1), asked),
        *(removed("a"), asked, removed("b", group=1), asked),
        *(removed("ab"), asked, CLEARED, asked),
    )

    assert [12, 12, 12, 0, 0] == predicted(path)
    assert [12, 12, 12, 12, 0] == predicted(path, "global only")


def test_scores_are_counted_in_blocks_and_in_tokens(tmp_path: Path) -> None:
    stores = [stored("abc"), stored("abc", group=1)]
    asked = [request("abc", n, [1]) for n in (12, 13, 11, 0)]
    report = replayed(write(tmp_path / "t.jsonl", *stores, *asked, request("abcd", 16, [1])))
    score = report.score()

    assert (5, 2, 1, 2, 1) == (
        score.requests,
        score.exact_blocks,
        score.exact_tokens,
        score.over,
        score.under,
    )
    assert (18 / 5, 13, 0.4) == (score.mean_abs_error, score.over_tokens, score.exact_share)
    assert [6, 7, 8] == [each.line for each in report.mistakes]
    assert (13 * 4 + 17, 52) == (report.prompt_tokens, report.cached_tokens)


def test_salted_and_lora_prompts_have_blocks_of_their_own(tmp_path: Path) -> None:
    tokens = (*tokens_of("a"), 1)
    keys = {"lora_id": 1, "lora_name": "l", "extra_keys": [["l", "s"]]}
    asked = [
        TraceRequest(tokens, SIZE, cache_salt="s", lora_name="l"),
        TraceRequest(tokens, 0, cache_salt="s"),
        TraceRequest(tokens, 0),
    ]
    path = write(tmp_path / "t.jsonl", stored("a", **keys), stored("a", group=1, **keys), *asked)

    assert [SIZE, 0, 0] == predicted(path)


def test_blocks_that_cannot_be_named_are_reported(tmp_path: Path) -> None:
    report = replayed(write(tmp_path / "t.jsonl", stored("abc", 1, group=1), request("abc", 12, [1])))

    assert (2, 0.0) == (report.unattributed, report.exact_share)
    assert "2 stored blocks could not be named" in report.reasons()[0]
    assert "1 requests differ and nothing above explains them (lines 3)" in report.reasons()[1]


def test_lost_events_leave_promises_too_low_and_are_counted(tmp_path: Path) -> None:
    with gzip.open(DATA / "trtllm-v2-gemma3-1b-head.jsonl.gz", "rt") as lines:
        said = lines.readlines()
    stores = [n for n, line in enumerate(said) if json.loads(line).get("event", {}).get("event_id") == 40]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(line for n, line in enumerate(said) if n != stores[0]))
    report = replayed(path)

    assert (1, 0) == (report.restarts, report.score().over)
    assert "1 times engine events were lost" in report.reasons()[0]


def test_events_that_are_missing_before_all_others_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with TraceWriter(path, HEADER) as writer:
        writer.hole(TraceHole(3, 0))
        writer.request(request("ab", 0))

    assert 1 == replayed(path).restarts


def test_a_layout_that_is_corrected_at_once_costs_nothing(tmp_path: Path) -> None:
    with gzip.open(DATA / "trtllm-v2-gemma3-1b-head.jsonl.gz", "rt") as lines:
        header, *said = lines.readlines()
    path = tmp_path / "t.jsonl"
    path.write_text("".join([json.dumps(json.loads(header) | {"max_attention_window": 1024}) + "\n", *said]))
    report = replayed(path)

    assert (("512", "global"), 1.0, 0) == (report.windows, report.exact_share, report.restarts)


# -- exceptions ------------------------------------------------------------------------------------


def held(sliding: Sequence[str], everywhere: str) -> list[dict[str, object]]:
    """The sliding group holds those blocks, the global one all of ``everywhere``."""
    full = stored(everywhere, group=1)
    return [full, *(stored(path, len(path) - 1) for path in sliding)]


@pytest.mark.parametrize(
    ("sliding", "actual", "exception"),
    [
        (["abc"], 15, PARTIAL_MATCH),
        (["abc"], 14, None),
        (["abc"], 12, None),
        ([], 15, None),
        (["abc"], 11, None),
    ],
)
def test_a_partial_match_up_to_a_token_short_of_its_edge_is_excepted(
    tmp_path: Path, sliding: list[str], actual: int, exception: str | None
) -> None:
    """At 15 the window of 8 begins at token 8: block 1 is not needed, which it is at 12."""
    asked = request("abc", actual, [1, 2, 3, 4, 5])
    report = replayed(write(tmp_path / "t.jsonl", *held(sliding, "abc"), asked), rule="trtllm_v2")

    assert [(0, exception)] == [(each.predicted["exact"], each.exception) for each in report.outcomes]
    assert int(exception is not None) == report.exceptions[PARTIAL_MATCH]
    assert 0.0 == report.exact_share, "what is excepted is not exact"
    assert int(exception is None) == len(report.mistakes)


@pytest.mark.parametrize(
    ("path", "sliding", "actual", "exception"),
    [
        ("abc", ["ab", "abc"], 0, LAST_BLOCK),
        ("abc", ["ab", "abc"], 3, LAST_BLOCK),
        ("abc", ["ab", "abc"], 4, None),
        ("abc", ["a", "ab", "abc"], 0, None),
    ],
)
def test_a_last_block_that_is_not_matched_is_excepted(
    tmp_path: Path, path: str, sliding: list[str], actual: int, exception: str | None
) -> None:
    """At 11 the window begins at token 4; at 8 it would have begun at token 1, in block 0."""
    report = replayed(
        write(tmp_path / "t.jsonl", *held(sliding, path), request(path, actual)), rule="trtllm_v2"
    )

    assert [(11, exception)] == [(each.predicted["exact"], each.exception) for each in report.outcomes]
    assert int(exception is not None) == report.exceptions[LAST_BLOCK]


def test_promising_too_much_of_a_longer_prompt_is_no_exception(tmp_path: Path) -> None:
    asked = request("abc", 0, [1])
    report = replayed(write(tmp_path / "t.jsonl", *held(["ab", "abc"], "abc"), asked), rule="trtllm_v2")

    assert [(12, None)] == [(each.predicted["exact"], each.exception) for each in report.outcomes]


def test_engines_of_whole_blocks_have_no_exceptions(tmp_path: Path) -> None:
    asked = [request("abc", 15, [1, 2, 3, 4, 5]), request("abc", 0)]
    report = replayed(write(tmp_path / "t.jsonl", *held(["ab", "abc"], "abc"), *asked), rule="vllm")

    assert {PARTIAL_MATCH: 0, LAST_BLOCK: 0} == report.exceptions


def test_what_is_right_is_no_exception(tmp_path: Path) -> None:
    report = replayed(
        write(tmp_path / "t.jsonl", *held(["ab", "abc"], "abc"), request("abc", 11)), rule="trtllm_v2"
    )

    assert [None] == [each.exception for each in report.outcomes]


# -- what is refused -------------------------------------------------------------------------------


def test_an_event_that_cannot_be_read_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", stored("a"), stored("a", group=9))

    with pytest.raises(ConfigError, match=r"t\.jsonl, line 3: BlockStored: expected a group_idx"):
        replayed(path)


def test_more_cached_tokens_than_there_are_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", request("a", 5))

    with pytest.raises(ConfigError, match=r"line 2: expected cached_tokens of at most the prompt's 4, got 5"):
        replayed(path)


def test_an_unknown_rule_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown reuse rule 'trtlm_v2': did you mean 'trtllm_v2'"):
        replayed(write(tmp_path / "t.jsonl"), rule="trtlm_v2")


def test_events_of_several_ranks_are_refused(tmp_path: Path) -> None:
    with gzip.open(DATA / "trtllm-v2-gemma3-1b-head.jsonl.gz", "rt") as lines:
        header, first, *_ = map(json.loads, lines)
    first["event"]["attention_dp_rank"] = 1
    path = tmp_path / "t.jsonl"
    path.write_text(f"{json.dumps(header)}\n{json.dumps(first)}\n")

    with pytest.raises(ConfigError, match="line 2: expected events of one rank"):
        replayed(path)


# -- other scorers ---------------------------------------------------------------------------------


class Tokens:
    """Knows blocks by their tokens: what a plugin's scorer may need."""

    name = "tokens"

    def __init__(self) -> None:
        self.begun: list[CacheLayout] = []
        self.known: dict[int, tuple[int, ...]] = {}
        self.seen: list[int] = []

    def begin(self, layout: CacheLayout) -> None:
        self.begun.append(layout)

    def learn(self, stored: BlocksStored, nodes: Sequence[Node]) -> None:
        for node, block in zip(nodes, stored.blocks, strict=False):
            self.known[node.sequence_hash] = block.token_ids

    def apply(self, event: Event) -> None:
        self.seen += [each for each in event.sequence_hashes if each in self.known]  # type: ignore[union-attr]

    def predict(self, prompt: Prompt) -> int:
        return len(self.seen)


def test_a_scorer_of_a_plugin_learns_tokens_before_it_is_told_of_the_block(tmp_path: Path) -> None:
    scorer: Scorer = Tokens()
    path = write(tmp_path / "t.jsonl", stored("ab", group=1), stored("b", group=0), request("ab", 0))
    report = replay(open_trace(path), adapter_for, scorers=[scorer])

    assert ["exact", "tokens"] == [score.scorer for score in report.scores]
    assert [3] == [each.predicted["tokens"] for each in report.outcomes]
    assert isinstance(scorer, Tokens)
    assert [open_trace(path).layout()] == scorer.begun
    assert namespaced_block_hash(tokens_of("a")) in scorer.known


def test_two_scorers_of_one_name_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl")

    with pytest.raises(ConfigError, match="expected each scorer once, got exact, global only, global only"):
        replayed(path, scorers=[GlobalOnly(), GlobalOnly()])


def test_a_trace_without_requests_is_exact_by_default(tmp_path: Path) -> None:
    report = replayed(write(tmp_path / "t.jsonl", header=msgspec.structs.replace(HEADER, engine="e")))

    assert (0, 1.0, "e") == (report.requests, report.exact_share, report.engine)
