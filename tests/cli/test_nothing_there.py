"""The commands that look at a deployment say where there is none, or where it cannot be reached."""

from __future__ import annotations

from functools import partialmethod

import pytest

from tests.conftest import Brokers
from tests.e2e_helpers import own_namespace
from vswa_plugin.cli.main import main
from vswa_plugin.launch.processes import free_port
from vswa_plugin.wire.transport import Transport

LOOKS = [
    ["index"],
    ["index", "--once"],
    ["index", "--once", "--json"],
    ["explain", "railway"],
    ["explain", "--token-ids", "1", "--json"],
]


@pytest.fixture(autouse=True)
def environment(brokers: Brokers, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in brokers.env.items():
        monkeypatch.setenv(name, value)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said on the last line of standard error, with exit code 1."""
    assert 1 == main(arguments)
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", LOOKS, ids=" ".join)
def test_where_no_worker_is_they_say_so_and_what_to_do(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    namespace = own_namespace("nobody")
    said = refusal(capsys, *command, "--namespace", namespace)

    assert said.startswith(f"vswa: failed: expected a worker of namespace '{namespace}' in etcd at ")
    assert said.endswith(
        "got none; start one (`vswa worker --help`), or correct ETCD_ENDPOINTS, VSWA_REGISTRY or --namespace"
    )


@pytest.mark.parametrize("command", LOOKS, ids=" ".join)
@pytest.mark.parametrize("variable", ["NATS_SERVER", "ETCD_ENDPOINTS"])
def test_where_a_broker_is_away_they_name_it(
    command: list[str],
    variable: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv(variable, address)
    said = refusal(capsys, *command, "--timeout", "1.5")

    assert said.startswith("vswa: failed: ")
    assert f"{address} ({variable})" in said


def test_events_says_on_standard_error_that_it_waits_for_a_worker(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("VSWA_REGISTRY", f"file:{tmp_path}")
    monkeypatch.setenv("NATS_SERVER", "nats://127.0.0.1:1")
    monkeypatch.setattr(Transport, "connect", partialmethod(Transport.connect, timeout=0.5))

    assert 1 == main(["events"])
    assert "no worker is registered in" in capsys.readouterr().err


def test_a_table_in_json_is_not_written_where_nothing_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert 1 == main(["index", "--once", "--json", "--namespace", own_namespace("nobody")])
    assert "" == capsys.readouterr().out
