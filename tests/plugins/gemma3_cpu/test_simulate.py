"""Simulated workers, the made-up requests, and ``vswa simulate``."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pytest
from vswa_plugins.gemma3_cpu.cache.api import CacheManager
from vswa_plugins.gemma3_cpu.cache.spec import GroupSpec
from vswa_plugins.gemma3_cpu.simulate.requests import (
    Request,
    SimulatedWorker,
    Simulation,
    Workload,
    answer,
    manager_for,
)

from vswa_plugin.cli.main import main
from vswa_plugin.errors import ConfigError, InvalidRequest

DATA = Path(__file__).parents[2] / "data"
RULES = ("trtllm_v2", "trtllm_v1", "trtllm_v1_contiguous")


def small(rule: str, **options: Any) -> CacheManager:
    groups = [GroupSpec(0, 64, 24, 5, host_blocks=6), GroupSpec(1, None, 40, 1, host_blocks=6)]
    return manager_for(rule, groups, 16, 4096, max_chunk_tokens=48, **options)


def simulated(*arguments: str) -> int:
    small_model = ("--blocks", "512=80,global=160", "--requests", "30", "--max-seq-len", "8192")
    return main(["simulate", *small_model, *arguments])


def lines_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        return [msgspec.json.decode(line) for line in lines]


@pytest.mark.parametrize("trace", ["gemma3-1b", "host-tier"])
def test_the_requests_of_a_recorded_engine_make_its_trace_again(trace: str) -> None:
    header, *records = lines_of(DATA / f"trtllm-v2-{trace}.jsonl.gz")
    host = header["host_blocks"] or {"swa": 0, "global": 0}
    groups = [
        GroupSpec(i, window, header["gpu_blocks"][kind], header["layers"].count(kind), host[kind])
        for i, (kind, window) in enumerate([("swa", header["max_attention_window"]), ("global", None)])
    ]
    size, chunk = header["tokens_per_block"], header["chunk_size"]
    manager = manager_for("trtllm_v2", groups, size, 8192, max_chunk_tokens=chunk)
    ours: list[dict[str, Any]] = []
    asked = [
        Request(tuple(record["token_ids"]), record["output_len"])
        for record in records
        if record["type"] == "request"
    ]
    Simulation([SimulatedWorker(manager, size, chunk)], ours.append).run(asked)

    assert records == msgspec.json.decode(msgspec.json.encode(ours))


@pytest.mark.parametrize("rule", RULES)
def test_a_block_decoded_at_once_does_what_its_tokens_do_one_by_one(rule: str) -> None:
    worker, manager = SimulatedWorker(small(rule), 16, 48), small(rule)
    theirs = manager.flush_events()
    ours = worker.take_events()
    for prompt, output_len in islice(Workload(3, mean_prompt_len=150), 60):
        prompt = prompt[:350]
        cached = worker.serve(prompt, output_len)
        ours += worker.take_events()
        sequence = manager.open(prompt, output_len)
        assert sequence is not None
        assert sequence.cached_tokens == cached
        while sequence.computed_tokens < len(prompt) + output_len - 1:
            decoding = sequence.computed_tokens >= len(prompt)
            step = 1 if decoding else min(48, len(prompt) - sequence.computed_tokens)
            sequence.reserve(sequence.computed_tokens + step)
            sequence.advance(step)
            theirs += manager.flush_events()
        sequence.close(answer(prompt, output_len))
        theirs += manager.flush_events()

    assert theirs == ours
    assert {"created", "stored", "removed", "updated"} == {event["data"]["type"] for event in ours}
    manager.check()


def test_the_same_seed_makes_the_same_requests() -> None:
    first, again, other = (list(islice(Workload(seed), 40)) for seed in (5, 5, 6))

    assert first == again
    assert first != other


def test_made_up_requests_are_conversations_documents_forks_and_repeats() -> None:
    requests = list(islice(Workload(1), 300))
    turns = [request.prompt + answer(*request) for request in requests]
    prompts = [request.prompt for request in requests]

    assert 500 < sum(map(len, prompts)) / 300 < 1500
    assert any(prompt in prompts[:i] for i, prompt in enumerate(prompts)), "sent again"
    assert any(
        len(prompt) > len(turn) and prompt[: len(turn)] == turn
        for i, prompt in enumerate(prompts)
        for turn in turns[:i]
    ), "a next turn has the answer"
    assert 3 < len({prompt[:200] for prompt in prompts if len(prompt) > 400}) < 100, "shared documents"


def test_workers_serve_in_turn_and_each_has_its_events() -> None:
    told: list[dict[str, Any]] = []
    workers = [SimulatedWorker(small("trtllm_v1", dp_rank=rank), 16, 48) for rank in range(2)]
    totals = Simulation(workers, told.append).run([Request(tuple(range(40)), 3)] * 4)

    assert [0, 1, 0, 1] == [line["dp_rank"] for line in told if line["type"] == "request"]
    assert [0, 0, 39, 39] == [line["cached_tokens"] for line in told if line["type"] == "request"]
    assert {0, 1} == {line["event"]["attention_dp_rank"] for line in told if line["type"] == "event"}
    assert (4, 160, 78) == (totals.requests, totals.prompt_tokens, totals.reused_tokens)


def test_a_request_that_can_never_run_is_named() -> None:
    simulation = Simulation([SimulatedWorker(small("trtllm_v2"), 16, 48)])

    with pytest.raises(InvalidRequest, match="request 2: 5000 prompt tokens"):
        simulation.run([Request((1, 2), 1), Request((1,) * 5000, 1)])


@pytest.mark.parametrize("rule", RULES)
def test_the_command_counts_what_its_trace_tells(
    rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "trace.jsonl.gz"

    assert 0 == simulated("--rule", rule, "--json", "--out", str(out))
    summary = json.loads(capsys.readouterr().out)
    header, *records = lines_of(out)
    requests = [record for record in records if record["type"] == "request"]
    stored = [
        len(record["event"]["data"]["blocks"])
        for record in records
        if record["type"] == "event"
        and record["event"]["data"]["type"] == "stored"
        and record["event"]["window_size"] == 512
    ]
    assert ("header", "trtllm", rule, 32, 512) == (
        header["type"],
        header["format"],
        header["rule"],
        header["tokens_per_block"],
        header["chunk_size"],
    )
    assert ({"swa": 80, "global": 160}, 22) == (header["gpu_blocks"], header["layers"].count("swa"))
    assert [512, None] == [window["window"] for window in summary["windows"]]
    assert (30, sum(request["cached_tokens"] for request in requests), sum(stored)) == (
        summary["requests"],
        summary["reused_tokens"],
        summary["windows"][0]["stored"],
    )


def test_a_trace_is_a_source_of_requests(tmp_path: Path) -> None:
    first, again = tmp_path / "first.jsonl.gz", tmp_path / "again.jsonl"
    simulated("--out", str(first))

    assert 0 == simulated("--from", str(first), "--out", str(again))
    assert lines_of(first) == lines_of(again)


def test_the_table_has_a_line_per_window(capsys: pytest.CaptureFixture[str]) -> None:
    assert 0 == main(["simulate", "--requests", "5", "--windows", "64,128,32768", "--layers", "3"])
    lines = capsys.readouterr().out.splitlines()

    assert ["64", "128", "global"] == [line.split()[0] for line in lines[-3:]]
    assert any(line.startswith("requests  ") and line.endswith(" 5") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--rule", "trtllm_v3"], "unknown reuse rule 'trtllm_v3'"),
        (["--windows", "512,wide"], "expected a window in tokens or 'global', got 'wide'"),
        (["--windows", "500,global", "--blocks", "99"], "multiple of the block size"),
        (["--blocks", "512=80"], "each of the windows 512 and global"),
        (["--blocks", "512:80"], "expected a number, or window=number for each, got '512:80'"),
        (["--blocks", "20"], "request 2: 999 prompt tokens"),
        (["--from", "/nowhere/requests.jsonl"], "expected a file that can be read"),
        (["--out", "/nowhere/trace.jsonl"], "expected a file that can be written"),
        (["--out", "/dev/full"], "/dev/full: expected room for the trace"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert 2 == simulated(*arguments)
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"token_ids": [1, 2]}', "line 2: expected"),
        ('{"token_ids": [1, -2], "output_len": 3}', "line 2: expected"),
        ('{"token_ids": [1, 2], "output_len": 0}', "line 2: expected"),
        ("[1, 2]", "line 2: expected"),
        ("{", "line 2: expected a JSON object"),
    ],
)
def test_a_line_that_is_no_request_is_named(
    text: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text('{"type": "header"}\n' + text + "\n")

    assert 2 == simulated("--from", str(path))
    assert complaint in capsys.readouterr().err


def test_a_file_that_is_not_compressed_is_told_from_one_that_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "requests.jsonl.gz"
    path.write_text('{"token_ids": [1, 2], "output_len": 1}\n')

    assert 2 == simulated("--from", str(path))
    assert "expected JSON Lines, plain or compressed" in capsys.readouterr().err


def test_a_file_whose_compressed_bytes_are_wrong_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "requests.jsonl.gz"
    path.write_bytes(gzip.compress(b"")[:10] + b"\xff" * 100)

    assert 2 == simulated("--from", str(path))
    assert "expected JSON Lines, plain or compressed" in capsys.readouterr().err


def test_a_trace_is_not_written_over_the_requests_that_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text('{"token_ids": [1, 2], "output_len": 1}\n')

    assert 2 == simulated("--from", str(path), "--out", f"{tmp_path}/../{tmp_path.name}/requests.jsonl")
    assert "--out: expected another file than --from" in capsys.readouterr().err
    assert 1 == len(lines_of(path))


def test_an_unknown_rule_has_no_manager() -> None:
    with pytest.raises(ConfigError, match="unknown reuse rule"):
        manager_for("vllm", [GroupSpec(0, None, 5)], 16, 64)


# -- models by name ----------------------------------------------------------------------------------


def test_a_model_of_the_same_engine_has_its_own_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "trace.jsonl"
    options = ("--requests", "5", "--blocks", "400", "--out", str(out))

    assert 0 == main(["simulate", "--model", "gemma-3-27b", "--rule", "trtllm_v1", *options])
    header = lines_of(out)[0]
    assert ("trtllm_v1", 1024, 52) == (
        header["rule"],
        header["max_attention_window"],
        header["layers"].count("swa"),
    )
    assert "1024          400" in capsys.readouterr().out


def test_a_model_of_vllm_is_simulated_by_its_own_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "trace.jsonl.gz"
    options = ("--requests", "40", "--blocks", "300", "--seed", "3")

    assert 0 == main(["simulate", "--model", "gemma-4-31b", *options, "--json", "--out", str(out)])
    summary = json.loads(capsys.readouterr().out)
    header, *records = lines_of(out)
    requests = [line for line in records if line["type"] == "request"]
    stored = [
        len(line["event"]["block_hashes"])
        for line in records
        if line["type"] == "event"
        and line["event"]["type"] == "BlockStored"
        and line["event"]["group_idx"] == 5
    ]
    assert ("vllm", "gemma-4-31b", "vllm_hybrid", 32, 16) == tuple(
        header[field] for field in ("format", "config", "rule", "alignment", "hash_block_size")
    )
    assert [{"kind": "swa", "window": 1024, "block_size": 16}] * 5 + [{"kind": "full"}] == header["groups"]
    assert (40, 300 + 5 * 300) == (summary["requests"], summary["pool_blocks"])
    assert sum(line["cached_tokens"] for line in requests) == summary["reused_tokens"] > 0
    assert sum(stored) == summary["groups"][5]["stored"] > 0
    assert summary["groups"][0]["removed"] > 0


def test_workers_of_a_model_serve_in_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "trace.jsonl"
    options = ("--requests", "6", "--workers", "2", "--out", str(out))

    assert 0 == main(["simulate", "--model", "qwen3.5-9b", *options])
    assert [0, 1] * 3 == [line["dp_rank"] for line in lines_of(out) if line["type"] == "request"]
    table = capsys.readouterr().out.splitlines()
    assert ["0", "recurrent", "528"] == table[-4].split()[:3]
    assert ["3", "global", "528"] == table[-1].split()[:3]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ["--model", "gema-4-31b"],
            "unknown model 'gema-4-31b': did you mean 'gemma-4-31b'? Known: deepseek",
        ),
        (
            ["--model", "gemma-4-31b", "--blocks", "9"],
            "request 1: 361 prompt tokens and 78 to generate: expected",
        ),
    ],
)
def test_a_model_that_cannot_be_simulated_is_refused(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert 2 == main(["simulate", *arguments])
    assert complaint in capsys.readouterr().err
