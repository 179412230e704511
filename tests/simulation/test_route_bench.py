"""Workloads, simulations with real caches, and `vswa accuracy route`."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vswa_plugin.blocks.reuse import RULES
from vswa_plugin.cli.main import main
from vswa_plugin.engine.presets import PRESETS, TRTLLM, preset_named, rank_setup
from vswa_plugin.errors import ConfigError
from vswa_plugin.host.host import PluginHost
from vswa_plugin.host.loading import load_host
from vswa_plugin.simulation.policies import ORACLE
from vswa_plugin.simulation.sweep import DEFAULT_POLICIES, Bench, Case, Plan, cases
from vswa_plugin.simulation.workloads import WORKLOADS, Request, answer, made_up, mooncake, poisson

# -- workloads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKLOADS)
def test_made_up_requests_are_the_seeds_and_share_prefixes(name: str) -> None:
    first, again = (list(islice(made_up(name, 5), 60)) for _ in range(2))
    other = list(islice(made_up(name, 6), 60))

    assert first == again
    assert first != other
    assert all(each.prompt and each.output == answer(each.prompt, len(each.output)) for each in first)
    starts = [each.prompt[:100] for each in islice(made_up(name, 5), 400)]
    assert len(set(starts)) < len(starts) / 2


def test_the_next_turn_of_a_chat_holds_the_answer_to_the_last() -> None:
    requests = list(islice(made_up("chat", 1), 300))
    whole = {each.prompt + each.output for each in requests}

    assert sum(any(each.prompt[: len(w)] == w for w in whole) for each in requests[200:]) > 60


def test_times_are_as_dense_as_asked_for() -> None:
    requests = [Request((1,), (1,))] * 2_000
    times = [each.at_s for each in poisson(requests, 50.0, 3)]

    assert times == sorted(times)
    assert 36 < times[-1] < 44


def lines(path: Path, *records: dict[str, Any]) -> Path:
    path.write_bytes(b"".join(msgspec.json.encode(record) + b"\n" for record in records))
    return path


def line(timestamp: float, input_length: int, *hash_ids: int) -> dict[str, Any]:
    return {"timestamp": timestamp, "input_length": input_length, "output_length": 7, "hash_ids": hash_ids}


def test_a_mooncake_trace_gives_equal_prompts_for_equal_ids(tmp_path: Path) -> None:
    path = lines(tmp_path / "m.jsonl", line(0, 1000, 4, 5), line(1500, 1030, 4, 5, 6), line(1500, 3, 9))
    first, second, third = mooncake(path)

    assert (0, 1.5, 1.5) == (first.at_s, second.at_s, third.at_s)
    assert [1000, 1030, 3] == [len(each.request.prompt) for each in (first, second, third)]
    assert second.request.prompt[:1000] == first.request.prompt
    assert {4, 5, 6} == set(second.request.prompt)
    assert 7 == len(third.request.output)
    assert 2 == len(list(mooncake(path, 2)))


@pytest.mark.parametrize("length", [(1 << 24) + 1, 1 << 62, 1 << 64])
def test_an_answer_longer_than_any_is_refused_before_it_is_made(tmp_path: Path, length: int) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(f'{{"timestamp": 0, "input_length": 1, "output_length": {length}, "hash_ids": [1]}}\n')

    with pytest.raises(ConfigError, match="line 1: expected a request in Mooncake's format"):
        list(mooncake(path))


def test_a_mooncake_trace_may_be_zipped(tmp_path: Path) -> None:
    path = lines(tmp_path / "m.jsonl", line(0, 1000, 4, 5), line(1500, 1030, 4, 5, 6))
    zipped = tmp_path / "m.jsonl.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))

    assert list(mooncake(path)) == list(mooncake(zipped))
    zipped.write_bytes(zipped.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=r"m\.jsonl\.gz, after line \d+: the file is cut off"):
        list(mooncake(zipped))


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (line(0, 1000, 4), "line 2: expected a hash id for each of 2 blocks .* got 1 ids"),
        (line(-1, 10, 4), "line 2: .*timestamp"),
        (line(5, 10, 4) | {"hash_ids": "x"}, "line 2: .*hash_ids"),
        (line(1, 10, 4), "line 2: .* at least 2 ms"),
    ],
)
def test_a_line_that_is_no_request_is_named(tmp_path: Path, record: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        list(mooncake(lines(tmp_path / "m.jsonl", line(2, 10, 3), record)))


# -- with real caches --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host() -> Any:
    with load_host(environ={}) as host:
        yield host


PLAN = Plan("forks", requests=50)


#: One rank, so that all policies see the same cache; windows lose blocks that global attention keeps.
LOW_ON_WINDOWS = Plan("forks", requests=60, ranks=1, sliding_share=0.3)


@pytest.mark.parametrize("preset", [name for name, each in PRESETS.items() if each.engine == TRTLLM])
def test_exact_promises_are_true_and_the_others_of_one_cache_are_not(host: PluginHost, preset: str) -> None:
    bench = Bench(LOW_ON_WINDOWS, host)
    policies = ("global only", "boundary projection", "exact", ORACLE)
    found = [bench.run(Case(preset, 1_000, policy, 2)) for policy in policies]
    true = [each.true_promises or 0 for each in found]

    assert 1 == len({each.computed_tokens for each in found})
    assert true[0] <= true[1] < true[2]
    assert true[2] > 0.97
    assert 1 == true[3] == found[3].agreed


def test_with_memory_for_everything_exact_and_global_choose_alike(host: PluginHost) -> None:
    bench = Bench(msgspec.structs.replace(PLAN, sliding_share=1.0), host)
    exact, global_only = (bench.run(Case("gemma-3-1b", 20_000, each, 1)) for each in ("exact", "global only"))

    assert msgspec.structs.replace(global_only, case=exact.case) == exact


def test_the_same_seed_gives_the_same_run_and_the_same_requests_to_every_policy(host: PluginHost) -> None:
    bench = Bench(PLAN, host)
    first, again = (bench.run(Case("gpt-oss", 400, "exact", 3)) for _ in range(2))
    other = bench.run(Case("gpt-oss", 400, "random", 3))

    assert first == again
    assert (first.requests, first.prompt_tokens) == (other.requests, other.prompt_tokens)
    assert other.prompt_tokens != bench.run(Case("gpt-oss", 400, "random", 4)).prompt_tokens
    assert next(bench.arrivals(3)).at_s != pytest.approx(next(bench.arrivals(4)).at_s, rel=0.2)


def test_the_oracle_asks_without_leaving_a_trace(host: PluginHost) -> None:
    ranks = [host.simulated_rank(rank_setup("gemma-3-1b", 300, 0.5, 32, 8192)) for _ in range(2)]
    told: list[list[Any]] = [[], []]
    for each in islice(made_up("forks", 2), 25):
        reused = []
        for index, rank in enumerate(ranks):
            if index:
                expected = [rank.would_reuse(each.prompt) for _ in range(3)]
                rank.would_reuse((*each.prompt[:50], 1, 2, 3))
            sequence = rank.open(each.prompt, len(each.output))
            assert sequence is not None
            reused.append(sequence.cached_tokens)
            sequence.compute_prompt()
            sequence.finish(each.output)
            told[index] += rank.take_events()
        assert [reused[0]] * 4 == [reused[1], *expected]
    assert told[0] == told[1]


def test_the_load_sets_the_rate(host: PluginHost) -> None:
    slow, fast = (Bench(msgspec.structs.replace(PLAN, load=load), host).arrivals(0) for load in (0.5, 1.0))
    last = [list(each)[-1].at_s for each in (slow, fast)]

    assert last[0] == pytest.approx(2 * last[1])


def test_a_file_keeps_its_times_unless_a_rate_is_given(tmp_path: Path, host: PluginHost) -> None:
    path = lines(tmp_path / "m.jsonl", *(line(1000 * n, 10, n) for n in range(1, 5)))
    plan = Plan(str(path), requests=None).check()

    assert [1, 2, 3, 4] == [each.at_s for each in Bench(plan, host).arrivals(0)]
    faster = Bench(msgspec.structs.replace(plan, rate=4.0), host)
    assert [0.25, 0.5, 0.75, 1.0] == [each.at_s for each in faster.arrivals(0)]


def test_all_policies_are_compared_for_models_of_any_layout(host: PluginHost) -> None:
    assert {*DEFAULT_POLICIES} == {case.policy for case in cases(["gemma-4-31b"], [1], None, [0])}
    with pytest.raises(ConfigError, match="unknown model"):
        cases(["gemma-5"], [1], None, [0])
    for preset in PRESETS:
        layout = preset_named(preset).layout(preset)
        names = [scorer.name for scorer in host.accuracy_scorers(layout, RULES, [])]
        assert "boundary projection" in names, preset


def test_cells_have_all_combinations() -> None:
    assert 2 * 3 * 2 * 2 == len(set(cases(["a", "b"], [1, 2, 3], ["x", "y"], range(2))))


# -- the command -------------------------------------------------------------------------------------


SMALL = ("--requests", "25", "--blocks", "400", "--jobs", "1")


def test_the_command_prints_tables_and_conclusions(capsys: pytest.CaptureFixture[str]) -> None:
    assert 0 == main(["accuracy", "route", "forks", *SMALL])
    said = capsys.readouterr().out

    assert "gemma-3-1b, 400 blocks" in said
    for policy in ("random", "round robin", "global only", "boundary projection", "exact", "oracle"):
        assert f"\n{policy}" in said
    assert "One seed cannot tell a difference" in said
    assert any(f"{each} global only:" in said for each in ("compared with", "against", "than"))


def test_json_has_rows_of_every_workload(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = lines(tmp_path / "m.jsonl", *(line(100 * n, 600, n % 3, n) for n in range(10)))
    options = ["--policies", "exact,min of last boundaries", "--json", *SMALL]
    assert 0 == main(["accuracy", "route", str(path), "chat", *options])
    reports = json.loads(capsys.readouterr().out)["reports"]

    assert [str(path), "chat"] == [each["plan"]["workload"] for each in reports]
    assert [10, 25] == [each["requests"] for each in reports]
    assert ["exact", "min of last boundaries", "oracle"] == [row["policy"] for row in reports[1]["rows"]]


def test_several_processes_find_what_one_finds(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for jobs in ("1", "2"):
        options = ["--policies", "exact", "--json", *SMALL[:4], "--jobs", jobs]
        assert 0 == main(["accuracy", "route", "forks", *options])
        found.append(capsys.readouterr().out)

    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["nothing"], "expected a workload, chat, documents, agents, forks, burst, tenants or a file"),
        (["chat", "--blocks", "many"], "--blocks: expected numbers"),
        (["chat", "--model", "gema-3-1b"], "did you mean 'gemma-3-1b'"),
        (["chat", "--policies", "exakt"], "did you mean 'exact'"),
        (["chat", "--sliding-share", "0"], "--sliding-share"),
        (["chat", "--block-size", "48"], "--block-size: expected a block size that divides the windows"),
        (["chat", "--model", "gemma-4-31b", "--block-size", "32"], "expected none for gemma-4-31b"),
        (["chat", "--model", "gemma-4-32b"], "Known: deepseek-v4-flash, gemma-3-1b"),
        (["chat", "--plot", "p.jpeg"], "--plot: expected a file that ends in .png, .svg, .pdf, got p.jpeg"),
        (["chat", "--plot", "/nowhere/p.png"], "--plot: cannot write /nowhere/p.png: there is no directory"),
        (["chat", "--cost-per-token", "nan"], "per_token_s: expected a finite number"),
    ],
)
def test_wrong_options_say_what_was_expected(
    capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert 2 == main(["accuracy", "route", *options, "--jobs", "1"])
    assert said in capsys.readouterr().err
