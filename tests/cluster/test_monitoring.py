"""A real Prometheus scrapes a deployment that `launch` has started: dashboard and alerts over what it has."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.conftest import Brokers, Run
from tests.deploy_helpers import DEPLOY
from tests.e2e_helpers import eventually, own_namespace
from tests.launch_helpers import running
from tests.monitoring_helpers import RULES, panel_queries, rules
from vswa_plugin.errors import ConfigError
from vswa_plugin.launch.processes import Child, free_port, python_module
from vswa_plugin.launch.targets import TARGETS
from vswa_plugin.program.addresses import check_address

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed (Debian package prometheus)"
)
#: Panels that show nothing here: of engines, plugins and faults that this deployment has not.
EMPTY = {
    "Bytes moved from prefill to decode, a second",
    "Blocks promised too many or too few, p90",
    "Finished prompts that wait to be fetched",
    "Workers with systematic errors",
}


async def prometheus(folder: Path, targets: Path) -> tuple[Child, str]:
    """A Prometheus that scrapes ``targets`` each second; the process and its URL."""
    text = (DEPLOY / "monitoring" / "prometheus-launch.yaml").read_text("utf-8")
    text = text.replace("TARGETS", str(targets)).replace("5s", "1s")
    (folder / "prometheus.yaml").write_text(text + f"rule_files: [{RULES}]\n")
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", "--config.file", str(folder / "prometheus.yaml")]
    command += ["--storage.tsdb.path", str(folder / "data"), "--web.listen-address", address]
    return await Child.start("prometheus", command, folder), f"http://{address}/api/v1"


def two_free_ports() -> int:
    """The first of two ports in a row that are free."""
    while True:
        first = free_port()
        with contextlib.suppress(ConfigError):
            check_address("127.0.0.1", first + 1)
            return first


async def answers(http: aiohttp.ClientSession, url: str, query: str) -> list[Any]:
    async with http.get(f"{url}/query", params={"query": query}) as response:
        body = await response.json()
    assert body["status"] == "success", (query, body)
    found: list[Any] = body["data"]["result"]
    return found


def test_every_panel_shows_something_and_no_alert_fires(
    run: Run[Any], tmp_path: Path, model_dir: Path, brokers: Brokers
) -> None:
    async def body() -> tuple[set[str], set[str]]:
        first = two_free_ports()
        command = python_module("vswa_plugin.launch", "agg_router", "--engine", "gemma3_cpu")
        command += ["--http-port", "0", "--model-path", str(model_dir), "--log-dir", str(tmp_path)]
        command += ["--workers", "2", "--routers", "2", "--namespace", own_namespace("observed")]
        command += ["--served-model-name", "gemma", "--", "--heartbeat", "0.5", "--status-port", str(first)]
        async with running(tmp_path, command, brokers.env) as it:
            await it.serving()
            child, url = await prometheus(tmp_path, tmp_path / TARGETS)
            try:
                async with aiohttp.ClientSession() as http:

                    async def scraped() -> bool:
                        return len(await answers(http, url, 'up{job="vswa"} == 1')) == 5

                    await eventually(
                        lambda: child.check() or "ready to receive" in child.log(), "it runs", 30
                    )
                    await eventually(scraped, "all five programs are scraped", 30)
                    for _ in range(6):
                        await it.ask(8)

                    empty: list[str] = []

                    async def shown() -> bool:
                        """A rate is there with the second scrape after a first request."""
                        empty[:] = [
                            name for name, each in panel_queries() if not await answers(http, url, each)
                        ]
                        return set(empty) <= EMPTY

                    await eventually(shown, "every panel shows something", 30)
                    up = {each["metric"]["name"] for each in await answers(http, url, "up")}
                    async with http.get(f"{url}/alerts") as response:
                        alerts = (await response.json())["data"]["alerts"]
                    return up, {each["labels"]["alertname"] for each in alerts}
            finally:
                await child.stop()

    up, firing = run(body())

    assert {"frontend", "router-0", "router-1", "worker-0", "worker-1"} == up
    assert firing <= {rule["alert"] for rule in rules() if rule["labels"]["severity"] == "info"}
