"""The recorder as a plugin: its options, one recording for each host, and its end."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import vswa_plugins.recorder as plugin
from vswa_plugins.recorder.recorder import begin

from tests.plugins.recorder.test_recorder import SIZE, context, lines_of, only_file, record
from vswa_plugin.engine.options import Section
from vswa_plugin.errors import ConfigError
from vswa_plugin.host.host import PluginHost
from vswa_plugin.host.loading import load_host


@pytest.fixture
def hosts() -> Iterator[tuple[PluginHost, PluginHost]]:
    """Two workers in one process."""
    with PluginHost() as one, PluginHost() as other:
        for host in (one, other):
            host.register(plugin.RecorderPlugin, "recorder")
        yield one, other


def give(host: PluginHost, **options: Any) -> None:
    host.options({"recorder": Section({"recorder": options}, "FILE").section("recorder")})


def record_one(host: PluginHost, request_id: str, token_id: int) -> None:
    host.engine_events(0, [{"event_id": 0}])
    host.request_arrived(request_id, {"token_ids": [token_id] * SIZE})
    host.request_finished(record(request_id))


def test_nothing_is_recorded_unless_asked_for(
    hosts: tuple[PluginHost, PluginHost], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    host, _ = hosts
    give(host)
    host.worker_connected(context())
    record_one(host, "a", 1)
    host.stopping(10)

    assert ({}, []) == (host.failures(), list(tmp_path.iterdir()))


def test_the_options_say_where_and_how(hosts: tuple[PluginHost, PluginHost], tmp_path: Path) -> None:
    host, _ = hosts
    give(host, directory=str(tmp_path / "traces"))
    host.worker_connected(context())
    host.request_arrived("a", {"token_ids": [77_777] * SIZE})
    host.request_finished(record("a"))
    host.stopping(10)
    header, request, result = lines_of(only_file(tmp_path / "traces"))

    assert {
        "type": "header",
        "format": "trtllm",
        "block_size": SIZE,
        "rule": "trtllm_v2",
    }.items() <= header.items()
    assert 77_777 not in request["token_ids"]
    assert {"type": "result", "id": 1, "cached_tokens": 0, "output_len": 3, "seen": 0} == result


@pytest.mark.parametrize("environ", [{}, {"VSWA_RECORD": "", "VSWA_RECORD_TOKENS": ""}])
def test_without_a_directory_in_the_environment_nothing_is_recorded(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with load_host(environ=environ) as host:
        host.worker_connected(context())
        host.stopping(10)

    assert [] == list(tmp_path.iterdir())


def test_its_own_variables_still_say_where_and_how(tmp_path: Path) -> None:
    with load_host(environ={"VSWA_RECORD": str(tmp_path), "VSWA_RECORD_TOKENS": "plain"}) as host:
        host.worker_connected(context())
        record_one(host, "a", 77_777)
        host.stopping(10)

    assert [77_777] * SIZE in [line.get("token_ids") for line in lines_of(only_file(tmp_path))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": "hiden"}, "recorder.tokens: expected one of hidden, plain, got 'hiden' (in FILE)"),
        ({"directory": 7}, "recorder.directory: expected a string, got 7 (in FILE)"),
        ({"directry": "x"}, "unknown option 'recorder.directry' in FILE: did you mean 'recorder.directory'?"),
    ],
)
def test_options_that_cannot_be_used_are_refused(
    hosts: tuple[PluginHost, PluginHost], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        give(hosts[0], **options)


def test_two_workers_in_one_process_record_apart_and_end_apart(
    hosts: tuple[PluginHost, PluginHost], tmp_path: Path
) -> None:
    for number, host in enumerate(hosts, 1):
        give(host, directory=str(tmp_path / str(number)), tokens="plain")
        host.worker_connected(context())
    for number, host in enumerate(hosts, 1):
        record_one(host, f"r{number}", number)
    for host in hosts:
        host.stopping(10)
        record_one(host, "after the end", 9)

    assert [{}, {}] == [host.failures() for host in hosts]
    for number in (1, 2):
        requests = [line for line in lines_of(only_file(tmp_path / str(number))) if "token_ids" in line]
        assert [[number] * SIZE] == [line["token_ids"] for line in requests]


def test_the_end_closes_the_file_and_its_thread(hosts: tuple[PluginHost, PluginHost], tmp_path: Path) -> None:
    host, _ = hosts
    give(host, directory=str(tmp_path))
    host.worker_connected(context())
    name = f"record {only_file(tmp_path).name}"
    running = [thread for thread in threading.enumerate() if thread.name == name]
    host.stopping(10)

    assert [False] == [thread.is_alive() for thread in running]


def test_a_disk_that_holds_the_end_up_costs_no_more_than_the_budget_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = begin(context(2), str(tmp_path), "plain")
    let_go = threading.Event()
    monkeypatch.setattr(recorder.ranks[0]._writer, "event", lambda raw: let_go.wait(30))
    for rank in (0, 1):
        recorder.events(rank, [{"event_id": 0}])
    with pytest.raises(TimeoutError, match=r"within 2 s: \S+-0\.jsonl\.gz$"):
        recorder.close(2)

    let_go.set()
    recorder.close()
