"""``vswa doctor``: what it finds, and what it says to do."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from tests.conftest import Brokers
from tests.registry_helpers import entry
from vswa_plugin.cli import doctor
from vswa_plugin.cli.doctor import FAULT, OK, WARNING, _streams
from vswa_plugin.cli.main import main
from vswa_plugin.following.fleet import RankStatus
from vswa_plugin.launch.cluster import Cluster
from vswa_plugin.launch.processes import free_port
from vswa_plugin.wire.events import Source


@pytest.fixture
def environ(brokers: Brokers, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in brokers.env.items():
        monkeypatch.setenv(name, value)


def findings(
    capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0
) -> dict[str, list[tuple[str, str]]]:
    """What was looked at -> state and text."""
    assert code == main(["doctor", "--json", *argv])
    found: dict[str, list[tuple[str, str]]] = {}
    for each in json.loads(capsys.readouterr().out):
        found.setdefault(each["what"], []).append((each["state"], each["text"]))
    return found


def test_a_machine_with_brokers_and_workers_has_no_fault(
    environ: None, cluster: Cluster, capsys: pytest.CaptureFixture[str], model_dir: Path
) -> None:
    options = ["--model-path", str(model_dir), "--engine", "gemma3_cpu", "--engine-config", "gemma3/vswa_agg"]
    found = findings(capsys, "--http-port", str(free_port()), "--", *options)

    assert FAULT not in {state for each in found.values() for state, _ in each}
    assert {"versions", "disk", "limits", "GPUs", "plugins", "port", "worker", "registry", "NATS"} <= set(
        found
    )
    (worker,) = found["worker"]
    assert "windows 512, global, block size 32, context 8192" in worker[1]
    assert "ranks are known exactly" in found["events"][-1][1]


def test_brokers_that_are_away_are_faults_each_by_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NATS_SERVER", f"nats://127.0.0.1:{free_port()}")
    monkeypatch.setenv("ETCD_ENDPOINTS", "http://127.0.0.1:9")
    found = findings(capsys, "--timeout", "0.3", code=1)

    assert FAULT == found["registry"][0][0] and "ETCD_ENDPOINTS" in found["registry"][0][1]
    assert FAULT == found["NATS"][0][0] and "NATS_SERVER" in found["NATS"][0][1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model-path", "/nonexistent"], "expected a model at /nonexistent"),
        (["--model-path", "MODEL", "--engine-config", "nothing"], "--engine-config: unknown configuration"),
        (["--model-path", "MODEL", "--override-engine-args", '{"max_seq_lenn": 1}'], "max_seq_lenn"),
        (["--model-path", "MODEL", "--engine", "nothing"], "unknown engine 'nothing'"),
        (["--model-path", "MODEL", "--modee", "agg"], "unrecognized arguments: --modee agg"),
        (
            [
                "--model-path",
                "MODEL",
                "--override-engine-args",
                '{"kv_cache_config": {"tokens_per_block": 7}}',
            ],
            "7",
        ),
    ],
    ids=["model", "config", "option", "engine", "word", "block size"],
)
def test_what_a_worker_would_refuse_is_a_fault(
    options: list[str], message: str, environ: None, capsys: pytest.CaptureFixture[str], model_dir: Path
) -> None:
    words = [str(model_dir) if word == "MODEL" else word for word in options]
    ((state, text),) = findings(capsys, "--", *words, code=1)["worker"]

    assert FAULT == state
    assert message in text


def test_ports_that_are_taken_are_faults(
    environ: None, brokers: Brokers, capsys: pytest.CaptureFixture[str], model_dir: Path
) -> None:
    taken = brokers.nats_server.rpartition(":")[2]
    options = ["--model-path", str(model_dir), "--status-port", taken]
    found = findings(capsys, "--http-port", taken, "--", *options, code=1)

    assert FAULT == found["port"][0][0]
    assert f"--status-port: expected a port of 127.0.0.1 that is free, got {taken}" in found["worker"][0][1]


def test_a_file_that_cannot_be_written_is_a_fault(
    environ: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("VSWA_TERMINATION_LOG", str(tmp_path / "missing" / "log"))

    assert FAULT == findings(capsys, code=1)["permissions"][0][0]


def test_a_folder_without_room_is_a_fault(
    environ: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", "/nonexistent")

    assert "TMPDIR: expected a directory" in findings(capsys, code=1)["disk"][0][1]


def test_few_open_files_are_worth_a_warning(
    environ: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (1024, 1024))

    assert WARNING == findings(capsys)["limits"][0][0]


def rank(state: str = "live", lag_ms: float | None = 20.0, reason: str = "") -> RankStatus:
    return RankStatus(Source("ns", "backend", 1, 0), "m", state, reason, True, 1, 1, lag_ms, {})


@pytest.mark.parametrize("lag_ms", [-101.0, -86_400_000.0, 5_001.0])
def test_clocks_that_do_not_agree_are_a_fault(lag_ms: float) -> None:
    first, last = _streams([rank(lag_ms=lag_ms)])

    assert ("clock", FAULT) == first[:2] and "NTP" in first.text
    assert ("events", OK) == last[:2]


@pytest.mark.parametrize("lag_ms", [None, -100.0, 0.0, 5_000.0])
def test_clocks_that_agree_are_not_spoken_of(lag_ms: float | None) -> None:
    assert ["events"] == [each.what for each in _streams([rank(lag_ms=lag_ms)])]


def test_ranks_whose_events_do_not_come_are_faults() -> None:
    found = list(_streams([rank(), rank("stale", reason="event 7 is missing")]))

    assert [FAULT, OK] == [each.state for each in found]
    assert "is stale (event 7 is missing)" in found[0].text
    assert "1 of 2 ranks" in found[1].text


def test_workers_of_another_version_are_worth_a_warning() -> None:
    versions = enumerate(("0.0.9", "0.1.0"))
    entries = {f"k{n}": msgspec.structs.replace(entry(n), version=version) for n, version in versions}
    fleet = SimpleNamespace(entries=entries, statuses=lambda _: [])
    found = list(doctor._workers(fleet))  # type: ignore[arg-type]

    assert [OK, WARNING] == [each.state for each in found]
    assert "0.0.9" in found[1].text


def test_findings_are_a_line_each(environ: None, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor"])
    said = capsys.readouterr().out.splitlines()

    assert code in (0, 1)
    assert all(line.split()[0] in (OK, WARNING, FAULT) for line in said)
