"""The users of deploy/kubernetes/brokers/nats.conf: what each may do, and that a deployment needs no more."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import nats
import pytest

from tests.conftest import Brokers, Run
from tests.deploy_helpers import DEPLOY
from tests.e2e_helpers import own_namespace
from vswa_plugin.launch.brokers import _listens, nats_server_binary
from vswa_plugin.launch.cluster import Cluster, ClusterSettings
from vswa_plugin.launch.processes import Child, free_port
from vswa_plugin.launch.topologies import Routing, WorkerGroup

USERS = ("worker", "router", "viewer")
EVENTS = "vswa.v1.ns.backend.1f.0.events"
CONTROL = "vswa.v1.ns.backend.1f.0.control"
LOAD = "vswa.v1.ns.routers.7.load"
#: Which nobody may use.
FORBIDDEN = "other.subject"


@asynccontextmanager
async def server(folder: Path) -> AsyncIterator[str]:
    """A nats-server with the configuration of deploy/, on free ports; its URL."""
    port = free_port()
    text = (DEPLOY / "kubernetes" / "brokers" / "nats.conf").read_text("utf-8")
    text = text.replace("port: 4222", f"listen: 127.0.0.1:{port}", 1).replace("http_port: 8222\n", "")
    (folder / "nats.conf").write_text(text)
    command = [nats_server_binary(), "-c", str(folder / "nats.conf")]
    passwords = {f"NATS_{user.upper()}_PASSWORD": f"{user}-secret" for user in USERS}
    child = await Child.start("nats", command, folder, passwords)
    try:
        await child.until(lambda: _listens(port), "listening", 10)
        yield f"nats://127.0.0.1:{port}"
    finally:
        await child.stop()


async def allowed(url: str, user: str) -> set[str]:
    """What the server lets ``user`` do: ``+subject`` to publish, ``-subject`` to read."""
    refused: list[str] = []
    last = asyncio.Event()

    async def noted(error: Exception) -> None:
        refused.append(str(error).lower())
        if f'publish to "{FORBIDDEN}"' in refused[-1]:
            last.set()

    client = await nats.connect(url, user=user, password=f"{user}-secret", error_cb=noted)
    subjects = (EVENTS, CONTROL, LOAD, "namespace.ns.kv", FORBIDDEN)
    for each in subjects:
        await client.subscribe(each)
        await client.publish(each, b"")
    await last.wait()  # refusals come in order
    await client.close()
    text = " ".join(refused)
    verbs = (("+", "publish"), ("-", "subscription"))
    return {f"{sign}{each}" for each in subjects for sign, verb in verbs if f'{verb} to "{each}"' not in text}


def test_each_user_may_do_what_its_programs_do_and_no_more(run: Run[Any], tmp_path: Path) -> None:
    async def body() -> dict[str, set[str]]:
        async with server(tmp_path) as url:
            return {user: await allowed(url, user) for user in USERS}

    dynamo = {"+namespace.ns.kv", "-namespace.ns.kv"}

    assert run(body()) == {
        "worker": {f"+{EVENTS}", f"-{EVENTS}", f"-{CONTROL}", *dynamo},
        "router": {f"-{EVENTS}", f"+{CONTROL}", f"+{LOAD}", f"-{LOAD}", *dynamo},
        "viewer": {f"-{EVENTS}", f"+{CONTROL}"},
    }


def test_a_wrong_password_is_refused(run: Run[Any], tmp_path: Path) -> None:
    async def body() -> None:
        async with server(tmp_path) as url:
            with pytest.raises(nats.errors.Error, match=r"(?i)authorization violation"):
                await nats.connect(
                    url, user="worker", password="router-secret", allow_reconnect=False, error_cb=silent
                )

    run(body())


async def silent(_: Exception) -> None:
    pass


@pytest.mark.parametrize("router", ["exact", "stock"])
def test_a_deployment_works_with_these_permissions(
    run: Run[Any], tmp_path: Path, model_dir: Path, brokers: Brokers, router: str, monkeypatch: Any
) -> None:
    """A violation would be in the logs of nats-py, of ours or of Dynamo."""
    monkeypatch.setenv("ETCD_ENDPOINTS", brokers.etcd_endpoints)
    monkeypatch.setenv("DYN_LOG", "info")
    login = {user: {"NATS_AUTH_USERNAME": user, "NATS_AUTH_PASSWORD": f"{user}-secret"} for user in USERS}

    async def body() -> None:
        async with server(tmp_path) as url:
            os.environ.update({"NATS_SERVER": url, **login["router"]})
            settings = ClusterSettings(
                str(model_dir),
                "gemma",
                (WorkerGroup(),),
                "gemma3_cpu",
                own_namespace(f"permitted-{router}"),
                routing=Routing(router),
                worker_options=("--heartbeat", "0.2"),
            )
            cluster = Cluster(settings, tmp_path)
            try:
                await cluster.start_brokers()
                await cluster._start_frontend()
                if router == "exact":
                    await cluster.add_router()
                await cluster.add_worker(env=login["worker"])
                await cluster.wait_for_model()
            finally:
                await cluster.stop()

    for name in ("NATS_SERVER", *login["router"]):
        monkeypatch.setenv(name, "")  # to be taken back at the end
    run(body())
    log = "\n".join(path.read_text() for path in tmp_path.glob("*.log"))

    assert "violation" not in log.lower()
    assert "serves 'gemma'" in log
