"""One command for a whole deployment: what it refuses and keeps alive, and that it leaves nothing behind."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.conftest import Brokers, Run
from tests.e2e_helpers import eventually
from vswa_plugin.cluster import Cluster, ClusterSettings, router_arguments, routing_environment
from vswa_plugin.errors import ConfigError
from vswa_plugin.launch import main, settings_from
from vswa_plugin.processes import BackOff, Child, ChildDied, free_port, python_module
from vswa_plugin.router.args import parse as router_parse
from vswa_plugin.topologies import (
    TOPOLOGIES,
    Routing,
    WorkerGroup,
    add_worker_counts,
    find_topology,
    worker_counts,
)

STANDIN = str(Path(__file__).with_name("standin_engine.py"))


# -- what is asked for ---------------------------------------------------------------------------------


def test_the_guides_environment_says_what_each_kind_of_worker_gets(
    monkeypatch: pytest.MonkeyPatch, model_dir: Path, tmp_path: Path
) -> None:
    environ = {"MODEL_PATH": str(model_dir), "SERVED_MODEL_NAME": "google/gemma", "VSWA_ENGINE": "standin"}
    for mode in ("agg", "prefill", "decode"):
        (tmp_path / f"{mode}.yaml").write_text("backend: pytorch\n")
        environ[f"{mode.upper()}_ENGINE_ARGS"] = str(tmp_path / f"{mode}.yaml")
    environ["DYN_HTTP_PORT"] = "8123"
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    agg, _ = settings_from(["agg"], os.environ)
    disagg, _ = settings_from(["disagg", "--decode-workers", "3", "--", "--heartbeat", "2"], os.environ)

    assert (agg.model_path, agg.served_model_name) == (str(model_dir), "google/gemma")
    assert (agg.engine, agg.http_port) == ("standin", 8123)
    assert [(g.mode, g.count, g.engine_args) for g in agg.groups] == [("agg", 1, str(tmp_path / "agg.yaml"))]
    assert [(g.mode, g.count, g.engine_args) for g in disagg.groups] == [
        ("prefill", 1, str(tmp_path / "prefill.yaml")),
        ("decode", 3, str(tmp_path / "decode.yaml")),
    ]
    assert disagg.worker_options == ("--heartbeat", "2")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["dsagg"], "unknown topology 'dsagg': did you mean 'disagg'? Known: agg, agg_router, disagg"),
        (["agg_router", "--router", "exect"], "--router: unknown router 'exect': did you mean 'exact'?"),
        (["agg", "--router", "stock"], "--router: topology 'agg' routes by no cache, expected no router"),
        (["agg_router", "--routers", "0"], "--routers: expected at least 1, got 0"),
        (["agg", "--routers", "2"], "--routers: only ROUTER=exact has routers of ours, got none"),
        (
            ["agg_router", "--router", "stock", "--routers", "2"],
            "--routers: only ROUTER=exact has routers of ours, got 'stock'",
        ),
        (["agg_router", "--router-mode", "kv"], "--router-mode: 'agg_router' has its own, got 'kv'"),
        (
            ["agg_router", "--", "--register", "frontend"],
            "--register (--register frontend): expected hidden workers behind our router",
        ),
        (
            ["agg", "--", "--register", "hidden"],
            "--register (--register hidden): expected workers that the frontend can see",
        ),
        (
            ["agg", "--model-path", "/nowhere"],
            "expected a model at /nowhere, got nothing there",
        ),
        (["agg", "--model-path", ""], "MODEL_PATH: expected the directory of a model, got nothing"),
        (["agg", "--workers", "0"], "--workers: expected at least 1, got 0"),
        (["disagg", "--workers", "2"], "--workers: topology 'disagg' has prefill and decode workers only"),
        (["agg", "--decode-workers", "2"], "--decode-workers: topology 'agg' has agg workers only"),
        (["agg", "--router-mode", "rnd"], "--router-mode: unknown mode 'rnd'"),
        (["agg", "--namespace", "a b"], "--endpoint, namespace: expected letters, digits"),
        (["agg", "--", "--heartbeat", "0"], "--heartbeat: expected more than 0 seconds"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_started(
    capsys: pytest.CaptureFixture[str], model_dir: Path, argv: list[str], message: str
) -> None:
    began = time.monotonic()
    code = main([argv[0], "--model-path", str(model_dir), *argv[1:]])

    assert (code, time.monotonic() - began < 2) == (2, True)
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_said_with_its_option(
    capsys: pytest.CaptureFixture[str], model_dir: Path, brokers: Brokers, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in brokers.env.items():
        monkeypatch.setenv(name, value)
    taken = brokers.nats_server.rpartition(":")[2]

    assert main(["agg", "--model-path", str(model_dir), "--http-port", taken]) == 2
    assert f"--http-port: expected a port of 127.0.0.1 that is free, got {taken}" in capsys.readouterr().err


def test_there_are_several_workers_by_default_where_one_of_them_has_to_be_chosen() -> None:
    parser = argparse.ArgumentParser()
    add_worker_counts(parser, several=2)
    counts = {name: worker_counts(parser.parse_args([]), find_topology(name)) for name in TOPOLOGIES}

    assert counts == {
        "agg": {"agg": 2},
        "agg_router": {"agg": 2},
        "disagg": {"prefill": 1, "decode": 1},
        "disagg_router": {"prefill": 2, "decode": 1},
    }


@pytest.mark.parametrize(
    ("argv", "environ", "expected"),
    [
        (["agg"], {}, Routing(None)),
        (["agg"], {"ROUTER": ""}, Routing(None)),
        (["agg_router"], {}, Routing("exact")),
        (["agg_router", "--routers", "3"], {}, Routing("exact", 3)),
        (["disagg_router"], {"ROUTER": "stock"}, Routing("stock")),
        (["disagg_router", "--router", "exact"], {"ROUTER": "stock"}, Routing("exact")),
    ],
)
def test_the_option_goes_before_the_environment_and_exact_is_the_default(
    model_dir: Path, argv: list[str], environ: dict[str, str], expected: Routing
) -> None:
    settings, _ = settings_from([*argv, "--model-path", str(model_dir)], environ)

    assert settings.routing == expected


def test_a_router_in_the_environment_of_a_topology_without_one_is_refused(model_dir: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^ROUTER: topology 'disagg' routes by no cache.*disagg_router has"
    ):
        settings_from(["disagg", "--model-path", str(model_dir)], {"ROUTER": "stock"})


def test_routers_are_told_what_they_must_know_as_their_workers_do(model_dir: Path) -> None:
    argv = ["agg_router", "--model-path", str(model_dir), "--served-model-name", "google/gemma", "--"]
    argv += ["--heartbeat", "0.5", "--registry", "file:/tmp/x", "--plugin", STANDIN, "--engine", "standin"]
    options = router_arguments(settings_from(argv, {})[0])
    args = router_parse(options)

    assert args.served_model_name == "google/gemma"
    assert re.fullmatch(r"dynamo\.router\.generate-google-gemma-[0-9a-f]{6}", str(args.endpoint))
    assert (args.heartbeat_s, args.registry, args.plugin) == (0.5, "file:/tmp/x", [STANDIN])


def test_workers_are_told_of_the_router_in_front_whatever_our_own_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VSWA_ROUTER", "exact")

    assert routing_environment(Routing(None)) == {"VSWA_ROUTER": ""}
    assert routing_environment(Routing("exact")) == {"VSWA_ROUTER": "exact"}
    assert routing_environment(Routing("stock")) == {"VSWA_ROUTER": "stock", "VSWA_DYNAMO_EVENTS": "boundary"}

    monkeypatch.setenv("VSWA_DYNAMO_EVENTS", "global")

    assert routing_environment(Routing("stock"))["VSWA_DYNAMO_EVENTS"] == "global"


def test_help_teaches_by_the_guides_environment(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out

    for part in ("MODEL_PATH", "PREFILL_ENGINE_ARGS", "ETCD_ENDPOINTS", "agg_router", "exit codes"):
        assert part in said


def test_a_cluster_is_ready_when_all_workers_are_known_and_a_request_is_served_not_when_the_model_is_listed(
    run: Run[Any], tmp_path: Path
) -> None:
    groups = (WorkerGroup("prefill", 1), WorkerGroup("decode", 2))
    known, refusals, asked = ["prefill", "backend"], 2, []

    async def health(_: web.Request) -> web.Response:
        instances = [{"component": c, "namespace": "dynamo", "endpoint": "generate"} for c in known]
        known.append("backend")
        return web.json_response({"instances": instances})

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "gemma"}]})

    async def completions(_: web.Request) -> web.Response:
        asked.append(len(known) - 1)
        return web.json_response({}, status=503 if len(asked) <= refusals else 200)

    async def body() -> None:
        app = web.Application()
        app.add_routes([web.get("/health", health), web.get("/v1/models", models)])
        app.add_routes([web.post("/v1/completions", completions)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        cluster = Cluster(ClusterSettings("m", "gemma", groups), tmp_path)
        cluster.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        cluster.frontend = await Child.start("frontend", ["sleep", "60"], tmp_path)
        await cluster.wait_for_model()
        await cluster.stop()
        await runner.cleanup()

    run(body())

    assert asked == [3, 4, 5], "asked once all three are known, until it is served"


# -- starting again ------------------------------------------------------------------------------------


def test_pauses_double_up_to_thirty_seconds_and_begin_anew_after_a_long_life() -> None:
    back_off = BackOff()

    assert [back_off.pause(0.5) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert [back_off.pause(lived) for lived in (59, 60, 5)] == [30, 1, 2]


#: Fails as often as the file says, with and without last words; then does what it is told.
_SCRIPT = """
import pathlib, sys, time
left = int(pathlib.Path({file!r}).read_text())
pathlib.Path({file!r}).write_text(str(left - 1))
print("attempt", left, flush=True)
if left == 2:
    print("vswa worker: failed: tried once\\nvswa worker: failed: no more", flush=True)
if left:
    sys.exit(1)
{then}
"""


async def kept(folder: Path, failures: int, then: str) -> tuple[Child, list[str]]:
    file = folder / "failures"
    file.write_text(str(failures))
    command = [sys.executable, "-c", _SCRIPT.format(file=str(file), then=then)]
    child = await Child.start("child", command, folder)
    said: list[str] = []
    child.keep(said.append, BackOff(0.01, 0.02))
    return child, said


def test_a_child_that_fails_is_started_again_and_each_time_its_reason_is_said(
    run: Run[Any], tmp_path: Path
) -> None:
    async def body() -> tuple[list[str], int]:
        child, said = await kept(tmp_path, 2, "time.sleep(60)")
        await eventually(lambda: "attempt 0" in child.log(), "the third life")
        child.check()
        return said, await child.stop()

    said, code = run(body())

    assert said == [
        "child ended with exit code 1: no more; starting it again in 0.01 s",
        "child ended with exit code 1: attempt 1; starting it again in 0.02 s",
    ]
    assert code == -signal.SIGTERM


def test_what_the_user_must_correct_is_not_tried_again(run: Run[Any], tmp_path: Path) -> None:
    async def body() -> None:
        then = "print('vswa worker: error: expected a model\\nand more'); sys.exit(2)"
        child, said = await kept(tmp_path, 0, then)
        with pytest.raises(ConfigError, match=r"^child: expected a model\nand more$"):
            await child.over()
        with pytest.raises(ConfigError):
            child.check()
        assert said == []
        await child.stop()

    run(body())


def test_a_child_that_somebody_stopped_stays_down(run: Run[Any], tmp_path: Path) -> None:
    async def body() -> list[str]:
        child, said = await kept(tmp_path, 0, "")
        await child.over()
        with pytest.raises(ChildDied):
            child.check()
        return said

    assert run(body()) == ["child ended as it was asked to, and is not started again"]


@pytest.mark.parametrize("attempt", range(5))
def test_a_child_that_is_stopped_while_it_is_started_again_leaves_no_process(
    run: Run[Any], tmp_path: Path, attempt: int
) -> None:
    async def body() -> None:
        child, said = await kept(tmp_path, 1, "time.sleep(60)")
        await eventually(lambda: said, "it fails")
        await asyncio.sleep(0.003 * attempt)  # around the start that follows after 10 ms
        await child.stop()
        assert not _alive(child.pid)

    run(body())


# -- as a program --------------------------------------------------------------------------------------


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children_of(pid: int) -> dict[str, int]:
    """Child processes by the name of their module or program."""
    found = {}
    for each in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((each / "stat").read_text().rpartition(")")[2].split()[1])
            command = (each / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if parent == pid:
            mode = command[command.index("--mode") + 1] if "--mode" in command else ""
            found[mode or (command[2] if command[1] == "-m" else Path(command[0]).name)] = int(each.name)
    return found


class Launched:
    """A running ``python -m vswa_plugin.launch``."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.children: dict[str, int] = {}

    async def serving(self) -> None:
        await eventually(lambda: self._checked() and "Ctrl-C stops" in self.child.log(), "it serves", 30)
        self.children = children_of(self.child.pid)

    def _checked(self) -> bool:
        self.child.check()
        return True

    @property
    def url(self) -> str:
        return re.findall(r"Serving '\w+' on (http://[\d.:]+);", self.child.log())[-1]

    async def ask(self, max_tokens: int = 3) -> tuple[int, Any]:
        body = {"model": "gemma", "prompt": "Hello there", "max_tokens": max_tokens}
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{self.url}/v1/completions", json=body) as answer,
        ):
            return answer.status, await answer.json()

    async def answered(self) -> bool:
        try:
            return (await self.ask())[0] == 200
        except aiohttp.ClientError:
            return False


@asynccontextmanager
async def running(
    folder: Path, command: list[str], env: dict[str, str] | None = None
) -> AsyncIterator[Launched]:
    """``command``, which must end with one of our exit codes and leave none of its children behind."""
    it = Launched(await Child.start("launch", command, folder, env))
    try:
        yield it
    finally:
        code = await it.child.stop(30)
        assert code in (0, 1, 2), it.child.log()
        assert not [name for name, pid in it.children.items() if _alive(pid)], it.child.log()


@asynccontextmanager
async def launched(
    folder: Path, model_dir: Path, topology: str, *options: str, env: dict[str, str] | None = None
) -> AsyncIterator[Launched]:
    command = python_module("vswa_plugin.launch", topology, "--engine", "standin", "--http-port", "0")
    command += ["--model-path", str(model_dir), "--log-dir", str(folder)]
    if "--" not in options:
        options = (*options, "--")
    async with running(folder, [*command, *options, "--plugin", STANDIN], env) as it:
        yield it


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
        options = ("--namespace", "launched")
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
    assert re.search(r"worker-0 was ended by SIGKILL: .+; starting it again in 1 s\n", log)
    assert "frontend was ended by SIGKILL" in log


def test_options_that_the_engine_refuses_end_it_at_once_with_the_engines_message(
    run: Run[Any], tmp_path: Path, model_dir: Path, brokers: Brokers
) -> None:
    file = tmp_path / "prefill.yaml"
    file.write_text("beam: 3\n")

    async def body() -> tuple[int, str, float]:
        began = time.monotonic()
        env = {**brokers.env, "PREFILL_ENGINE_ARGS": str(file)}
        async with launched(tmp_path, model_dir, "disagg", "--namespace", "refused", env=env) as it:
            code = await asyncio.wait_for(it.child.wait(), 20)
            return code, it.child.log(), time.monotonic() - began

    code, log, took = run(body())

    assert code == 2, log
    assert log.endswith(f"vswa launch: error: prefill-0: unknown option ['beam'] in {file}\n")
    assert took < 10


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

    async def body() -> float:
        options = ("--namespace", "hurried", "--", "--override-engine-args", slow)
        async with launched(tmp_path, model_dir, "agg", *options, env=brokers.env) as it:
            await it.serving()
            asked = asyncio.create_task(it.ask(60))
            log = tmp_path / "worker-0.log"
            await asyncio.sleep(0.3)
            it.child.terminate()
            await eventually(lambda: "waiting for 1 under way" in log.read_text(), "it drains")
            began = time.monotonic()
            it.child.terminate()
            assert await asyncio.wait_for(it.child.wait(), 20) == 0
            took = time.monotonic() - began
            await asyncio.gather(asked, return_exceptions=True)
            return took

    assert run(body()) < 10


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
