"""``vswa worker`` and its like: the programs that also run as ``python -m``, and ``vswa brokers``."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Brokers, Run
from tests.e2e_helpers import eventually
from tests.launch_helpers import children_of
from vswa_plugin.cli import PROGRAMS
from vswa_plugin.cli.main import main
from vswa_plugin.launch.brokers import start_nats
from vswa_plugin.launch.processes import Child, free_port, python_module
from vswa_plugin.wire.transport import Transport

Output = pytest.CaptureFixture[str]
VSWA = str(Path(sys.executable).with_name("vswa"))


def outcome(command: list[str]) -> tuple[int, str, str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", ["worker", "router", "frontend", "launch"])
def test_help_is_that_of_the_module_with_the_commands_name(name: str) -> None:
    code, as_module, _ = outcome(python_module(f"vswa_plugin.{name}", "--help"))
    named = outcome([VSWA, name, "--help"])

    assert (0, 0) == (code, named[0])
    assert named[1].startswith(f"usage: vswa {name} ")
    assert as_module.split()[1:4] == f"python -m vswa_plugin.{name}".split()
    assert named[1].split()[3:] == as_module.split()[4:]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["worker", "--model-path", "/nowhere"], 2, "vswa worker: error: --model-path: expected a model at"),
        (
            ["worker"],
            2,
            "vswa worker: error: --model-path: expected the directory or name of a model, got none",
        ),
        (["router", "--no-plugin", "x"], 2, "vswa router: error: --no-plugin: unknown plugin 'x'"),
        (["--no-plugin", "x", "router"], 2, "vswa router: error: --no-plugin: unknown plugin 'x'"),
        (["selector", "--no-plugin", "x"], 2, "vswa selector: error: --no-plugin: unknown plugin 'x'"),
        (["selector", "--selector-only"], 2, "vswa selector: error: unrecognized arguments: --selector-only"),
        (["frontend", "--log-level", "loud"], 2, "vswa frontend: error: --log-level: unknown level 'loud'"),
        (["--log-level", "loud", "frontend"], 2, "vswa frontend: error: --log-level: unknown level 'loud'"),
        (["--plugin=x", "frontend"], 2, "vswa frontend: error: unrecognized arguments: --plugin=x"),
        (["launch", "dsagg"], 2, "vswa launch: error: unknown topology 'dsagg': did you mean 'disagg'?"),
        (["launch", "agg", "--", "--heartbeat", "0"], 2, "vswa launch: error: MODEL_PATH: expected"),
        (["brokers", "--nats-port", "65536"], 2, "expected a port from 0 to 65535, got '65536'"),
    ],
)
def test_what_is_wrong_is_said_under_the_commands_name(
    arguments: list[str], code: int, message: str, capsys: Output
) -> None:
    try:
        ended: Any = main(arguments)
    except SystemExit as refused:
        ended = refused.code

    assert code == ended
    assert message in capsys.readouterr().err


def test_what_follows_a_double_dash_reaches_the_workers_of_a_launch(model_dir: Path, capsys: Output) -> None:
    arguments = ["launch", "agg", "--model-path", str(model_dir), "--", "--no-plugin", "nobody"]
    arguments += ["--heartbeat", "0"]

    assert 2 == main(arguments)
    assert "vswa launch: error: --heartbeat: expected more than 0 seconds" in capsys.readouterr().err


def test_a_selector_has_no_option_without_an_effect(capsys: Output) -> None:
    with pytest.raises(SystemExit):
        main(["selector", "--help"])
    shown = capsys.readouterr().out

    assert shown.startswith("usage: vswa selector ")
    assert "Answer /select" in shown
    for option in ("--endpoint", "--served-model-name", "--drain-timeout", "--selector-only"):
        assert f"  {option}" not in shown


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_version_of_a_program_is_that_of_the_package(name: str, capsys: Output) -> None:
    from vswa_plugin import __version__

    with pytest.raises(SystemExit) as ended:
        main([name, "--version"])

    assert (0, f"{__version__}\n") == (ended.value.code, capsys.readouterr().out)


def test_a_selector_serves_and_ends_with_0_after_sigterm(
    run: Run[Any], tmp_path: Path, brokers: Brokers
) -> None:
    async def body() -> int:
        command = [VSWA, "selector", "--http-port", "0", "--namespace", "nobody"]
        child = await Child.start("selector", command, tmp_path, brokers.env)
        await eventually(lambda: "workers in the registry" in child.log(), "it serves")
        return await child.stop()

    assert 0 == run(body())


# -- vswa brokers ------------------------------------------------------------------------------------


async def started(*options: str, json_too: bool = True) -> tuple[asyncio.subprocess.Process, str]:
    """The process of `vswa brokers`, and its first output."""
    process = await asyncio.create_subprocess_exec(
        *(VSWA, "brokers", *options, *(["--json"] if json_too else [])),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    lines = 1 if json_too else 2
    return process, "".join([(await process.stdout.readline()).decode() for _ in range(lines)])


def test_brokers_are_kept_until_a_signal_and_their_exports_can_be_pasted(run: Run[Any]) -> None:
    ports = [free_port(), free_port()]

    async def body() -> tuple[str, dict[str, int], int, bytes]:
        options = ("--nats-port", str(ports[0]), "--etcd-port", str(ports[1]))
        process, shown = await started(*options, json_too=False)
        transport = Transport(f"nats://127.0.0.1:{ports[0]}", "test")
        await transport.connect()
        await transport.close()
        children = children_of(process.pid)
        process.terminate()
        _, said = await process.communicate()
        return shown, children, process.returncode or 0, said

    shown, children, code, said = run(body())

    assert (
        shown
        == f"export NATS_SERVER=nats://127.0.0.1:{ports[0]}\nexport ETCD_ENDPOINTS=http://127.0.0.1:{ports[1]}\n"
    )
    assert {"nats-server", "etcd"} == set(children)
    assert not [pid for pid in children.values() if Path(f"/proc/{pid}").exists()]
    assert 0 == code
    assert b"never for production" in said


def test_the_data_of_brokers_stay_where_they_were_asked_to_and_json_is_for_scripts(
    run: Run[Any], tmp_path: Path
) -> None:
    folder = tmp_path / "data"

    async def body() -> tuple[dict[str, str], int]:
        process, shown = await started("--nats-port", "0", "--etcd-port", "0", "--data-dir", str(folder))
        process.send_signal(signal.SIGINT)
        await process.communicate()
        return json.loads(shown), process.returncode or 0

    variables, code = run(body())

    assert ["NATS_SERVER", "ETCD_ENDPOINTS"] == list(variables)
    assert 0 == code
    assert (folder / "etcd" / "member").is_dir()
    assert (folder / "nats-server.log").is_file()


def test_a_broker_that_dies_ends_the_command_with_1_and_the_other_broker(
    run: Run[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # the logs are kept after a failure

    async def body() -> tuple[int, str, dict[str, int]]:
        process, _ = await started("--nats-port", "0", "--etcd-port", "0")
        children = children_of(process.pid)
        await asyncio.to_thread(subprocess.run, ["kill", "-KILL", str(children["etcd"])], check=True)
        _, said = await process.communicate()
        return process.returncode or 0, said.decode(), children

    code, said, children = run(body())

    assert 1 == code
    assert "vswa: failed: etcd was ended by SIGKILL" in said
    assert not Path(f"/proc/{children['nats-server']}").exists()


@pytest.mark.parametrize("option", ["--nats-port", "--etcd-port"])
def test_a_port_in_use_is_the_users_to_correct(option: str, brokers: Brokers, capsys: Output) -> None:
    taken = brokers.nats_server.rpartition(":")[2]
    other = {"--nats-port": "--etcd-port", "--etcd-port": "--nats-port"}[option]

    assert 2 == main(["brokers", option, taken, other, "0"])
    assert f"{option}: expected a port of 127.0.0.1 that is free, got {taken}" in capsys.readouterr().err


def test_a_broker_that_never_listens_leaves_no_process(
    run: Run[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start is given up, as it is where a signal comes meanwhile."""
    begun: list[Child] = []
    until = Child.until

    async def watched(child: Child, *arguments: Any) -> None:
        begun.append(child)
        await until(child, *arguments)

    async def never(port: int) -> bool:
        return False

    monkeypatch.setattr(Child, "until", watched)
    monkeypatch.setattr("vswa_plugin.launch.brokers._listens", never)

    async def body() -> int:
        starting = asyncio.ensure_future(start_nats(tmp_path))
        await eventually(lambda: bool(begun), "the process is started")
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return await asyncio.wait_for(begun[0].wait(), 5)

    assert isinstance(run(body()), int)
