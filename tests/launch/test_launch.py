"""One command for a whole deployment: what it keeps alive, and that it leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Brokers, Run
from tests.e2e_helpers import eventually, own_namespace
from tests.launch_helpers import children_of, launched, running
from vswa_plugin.launch.__main__ import main
from vswa_plugin.launch.processes import free_port, python_module


def test_a_port_that_is_taken_is_said_with_its_option(
    capsys: pytest.CaptureFixture[str], model_dir: Path, brokers: Brokers, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in brokers.env.items():
        monkeypatch.setenv(name, value)
    taken = brokers.nats_server.rpartition(":")[2]

    assert main(["agg", "--model-path", str(model_dir), "--http-port", taken]) == 2
    assert f"--http-port: expected a port of 127.0.0.1 that is free, got {taken}" in capsys.readouterr().err


def test_disagg_serves_on_embedded_brokers_and_sigterm_ends_requests_well_and_leaves_no_child(
    run: Run[Any], tmp_path: Path, model_dir: Path
) -> None:
    slow = ("--", "--override-engine-args", json.dumps({"step_s": 0.04}))

    async def body() -> tuple[tuple[int, Any], tuple[int, Any], list[str], int]:
        async with launched(tmp_path, model_dir, "disagg", *slow) as it:
            await it.serving()
            answer, children = await it.ask(), it.children
            under_way = asyncio.create_task(it.ask(40))
            await asyncio.sleep(0.3)
            code = await it.child.stop(30)
            return answer, await under_way, sorted(children), code

    (status, answer), (late_status, late), children, code = run(body())
    goodbyes = [(tmp_path / f"{name}.log").read_text() for name in ("prefill-0", "decode-0")]

    assert (status, answer["choices"][0]["text"]) == (200, " there there there")
    assert (late_status, late["usage"]["completion_tokens"]) == (200, 40)
    assert children == ["decode", "etcd", "nats-server", "prefill", "vswa_plugin.frontend"]
    assert code == 0
    assert not [log for log in goodbyes if "could not leave" in log], "brokers outlive workers"


def test_a_worker_and_a_frontend_that_are_killed_come_back_and_serve(
    run: Run[Any], tmp_path: Path, model_dir: Path, brokers: Brokers
) -> None:
    async def body() -> tuple[list[str], str]:
        options = ("--namespace", own_namespace("launched"))
        async with launched(tmp_path, model_dir, "agg", *options, env=brokers.env) as it:
            await it.serving()
            before = it.children
            os.kill(before["agg"], signal.SIGKILL)
            os.kill(before["vswa_plugin.frontend"], signal.SIGKILL)
            await eventually(lambda: it.child.log().count("again in 1 s") == 2, "both are missed")
            await eventually(it.answered, "a request is served again", 40)
            it.children = {**before, **children_of(it.child.pid)}
            return sorted(before), it.child.log()

    before, log = run(body())

    assert before == ["agg", "vswa_plugin.frontend"], "brokers are those of the environment"
    assert re.search(r"worker-0 was ended by SIGKILL, its last words: .+; starting it again in 1 s\n", log)
    assert "frontend was ended by SIGKILL" in log


def test_options_that_the_engine_refuses_end_it_at_once_with_the_engines_message(
    run: Run[Any], tmp_path: Path, model_dir: Path, brokers: Brokers
) -> None:
    file = tmp_path / "prefill.yaml"
    file.write_text("beam: 3\n")

    async def body() -> tuple[int, str]:
        options = ("--namespace", own_namespace("refused"))
        env = {**brokers.env, "PREFILL_ENGINE_ARGS": str(file)}
        async with launched(tmp_path, model_dir, "disagg", *options, env=env) as it:
            code = await asyncio.wait_for(it.child.wait(), 20)
            return code, it.child.log()

    code, log = run(body())

    assert code == 2, log
    assert log.endswith(f"vswa launch: error: prefill-0: unknown option ['beam'] in {file}\n")
    assert "starting it again" not in log


def test_sigterm_before_it_serves_leaves_no_child(run: Run[Any], tmp_path: Path, model_dir: Path) -> None:
    nowhere = {"NATS_SERVER": f"nats://127.0.0.1:{free_port()}", "ETCD_ENDPOINTS": "http://127.0.0.1:9"}

    async def body() -> int:
        async with launched(tmp_path, model_dir, "agg", env=nowhere) as it:
            await eventually(lambda: "starting worker-0" in it.child.log(), "it starts a worker")
            it.children = children_of(it.child.pid)
            return await it.child.stop(30)

    assert run(body()) == 0


def test_a_second_signal_does_not_wait_for_requests_under_way(
    run: Run[Any], tmp_path: Path, model_dir: Path, brokers: Brokers
) -> None:
    slow = json.dumps({"step_s": 0.5})

    async def body() -> str:
        options = ("--namespace", own_namespace("hurried"), "--", "--override-engine-args", slow)
        async with launched(tmp_path, model_dir, "agg", *options, env=brokers.env) as it:
            await it.serving()
            asked = asyncio.create_task(it.ask(60))
            log = tmp_path / "worker-0.log"
            await asyncio.sleep(0.3)
            it.child.terminate()
            await eventually(lambda: "waiting for 1 under way" in log.read_text(), "it drains")
            it.child.terminate()
            assert await asyncio.wait_for(it.child.wait(), 20) == 0
            await asyncio.gather(asked, return_exceptions=True)
            return log.read_text()

    assert "1 requests are cancelled: not done in time" in run(body())


def test_an_embedded_broker_that_dies_ends_everything_and_is_named(
    run: Run[Any], tmp_path: Path, model_dir: Path
) -> None:
    async def body() -> tuple[int, str]:
        async with launched(tmp_path, model_dir, "agg") as it:
            await it.serving()
            os.kill(it.children["etcd"], signal.SIGKILL)
            return await asyncio.wait_for(it.child.wait(), 40), it.child.log()

    code, log = run(body())

    assert code == 1
    assert "vswa launch: failed: etcd was ended by SIGKILL" in log


def test_vswa_serve_does_the_same_with_a_model_of_its_own(run: Run[Any], tmp_path: Path) -> None:
    async def body() -> tuple[tuple[int, Any], list[str], int]:
        options = ("serve", "--topology", "disagg", "--http-port", "0", "--log-dir", str(tmp_path / "logs"))
        async with running(tmp_path, python_module("vswa_plugin", *options)) as it:
            await it.serving()
            return await it.ask(), sorted(it.children), await it.child.stop(30)

    (status, _), children, code = run(body())

    assert (status, code) == (200, 0)
    assert {"prefill", "decode"} < set(children)
