"""A worker's start and end where something is missing: what it says, and how it exits."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Brokers, Run
from tests.e2e_helpers import eventually, own_namespace
from vswa_plugin.launch.brokers import start_etcd, start_nats
from vswa_plugin.launch.cluster import LOOPBACK_ENV
from vswa_plugin.launch.processes import Child, free_port, python_module
from vswa_plugin.registry import Entry
from vswa_plugin.registry._etcd3_client import Connection
from vswa_plugin.registry.etcd import EtcdRegistry
from vswa_plugin.registry.etcd_settings import EtcdSecurity, parse_endpoints
from vswa_plugin.wire.events import Batch, Source, encode
from vswa_plugin.wire.subjects import subject
from vswa_plugin.wire.transport import Transport


async def worker(
    folder: Path, model_dir: Path, brokers: dict[str, str], *options: str, namespace: str | None = None
) -> Child:
    """A worker in ``namespace``, else in one of its own."""
    command = python_module("vswa_plugin.worker", "--model-path", str(model_dir), *options)
    command += ["--endpoint", f"dyn://{namespace or own_namespace('life')}.backend.generate"]
    return await Child.start("worker", command, folder, {**LOOPBACK_ENV, "DYN_LOG": "warn", **brokers})


def test_sigterm_while_it_waits_for_a_broker_ends_it_at_once_with_0(
    run: Run[Any], tmp_path: Path, model_dir: Path
) -> None:
    async def body() -> tuple[int, str]:
        nowhere = {"NATS_SERVER": f"nats://127.0.0.1:{free_port()}"}
        child = await worker(tmp_path, model_dir, nowhere)
        await eventually(lambda: "[Errno" in child.log_path.read_text(), "it tries")
        child.terminate()
        return await asyncio.wait_for(child.wait(), 10), child.log_path.read_text()

    code, log = run(body())

    assert code == 0, log
    assert "stopping before the start was complete" in log


def test_a_broker_that_appears_late_is_waited_for_with_progress(
    run: Run[Any], tmp_path: Path, model_dir: Path
) -> None:
    async def body() -> tuple[int, str]:
        nats, nats_server = await start_nats(tmp_path)
        port = free_port()
        child = await worker(
            tmp_path, model_dir, {"NATS_SERVER": nats_server, "ETCD_ENDPOINTS": f"http://127.0.0.1:{port}"}
        )
        await eventually(lambda: "trying on" in child.log_path.read_text(), "it says that it tries on")
        etcd, _ = await start_etcd(tmp_path, tmp_path / "data", port)
        await eventually(lambda: "serves 'gemma'" in child.log_path.read_text(), "it serves", 30)
        code = await child.stop()
        await etcd.stop()
        await nats.stop()
        return code, child.log_path.read_text()

    code, log = run(body())

    assert code == 0, log
    assert "expected etcd at 127.0.0.1" in log


def test_two_workers_side_by_side_have_ids_of_their_own_and_neither_supersedes_the_other(
    run: Run[Any], tmp_path: Path, model_dir: Path, brokers: Brokers
) -> None:
    async def body() -> list[int]:
        folders = [tmp_path / name for name in ("one", "two")]
        for folder in folders:
            folder.mkdir()
        shared = own_namespace("shared")
        children = [await worker(folder, model_dir, brokers.env, namespace=shared) for folder in folders]
        for child in children:
            await eventually(
                lambda child=child: "serves 'gemma'" in child.log_path.read_text(),  # type: ignore[misc]
                "it serves",
                30,
            )
        return [await child.stop() for child in children]

    assert run(body()) == [0, 0]


@pytest.mark.parametrize("known_to", ["our registry", "Dynamo alone"])
def test_a_worker_of_another_model_on_an_endpoint_in_use_exits_2_and_names_both(
    run: Run[Any], tmp_path: Path, model_dir: Path, brokers: Brokers, known_to: str
) -> None:
    """Dynamo notices it only as the model is shown, and not where both have the same files."""
    shared = own_namespace("models")
    folders = [tmp_path / name for name in ("one", "two")]
    model, options = model_dir, ["--served-model-name", "two"]
    if known_to == "Dynamo alone":
        model = shutil.copytree(model_dir, tmp_path / "model")
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
        options += ["--registry", f"file:{tmp_path / 'registry'}"]

    async def body() -> tuple[int, str]:
        for folder in folders:
            folder.mkdir()
        first = await worker(folders[0], model_dir, brokers.env, namespace=shared)
        await eventually(lambda: "serves 'gemma'" in first.log_path.read_text(), "it serves", 30)
        second = await worker(folders[1], model, brokers.env, *options, namespace=shared)
        code = await asyncio.wait_for(second.wait(), 30)
        await first.stop()
        return code, second.log_path.read_text()

    code, log = run(body())

    assert code == 2, log
    assert "Traceback" not in log
    assert (
        f"vswa worker: error: --served-model-name: expected 'gemma', which other workers show on "
        f"{shared}.backend.generate, got 'two'"
    ) in log
    assert ("gemma3_cpu started" in log) is (known_to == "Dynamo alone")


def test_its_parsers_are_told_to_dynamos_frontends_and_to_our_routers(
    run: Run[Any], tmp_path: Path, model_dir: Path, brokers: Brokers
) -> None:
    parsers = ("--dyn-tool-call-parser", "hermes", "--dyn-reasoning-parser", "qwen3")

    async def body() -> tuple[Entry, list[dict[str, Any]]]:
        child = await worker(tmp_path, model_dir, brokers.env, *parsers)
        await eventually(lambda: "serves 'gemma'" in child.log_path.read_text(), "it serves", 30)
        registry = EtcdRegistry(brokers.etcd_endpoints)
        (entry,) = [each for each in await registry.entries() if each.pid == child.pid]
        await registry.close()
        etcd = Connection(parse_endpoints(brokers.etcd_endpoints), EtcdSecurity())
        cards = await etcd.call(lambda client: client.list_prefix(f"v1/mdc/{entry.namespace}/"))
        await etcd.close()
        await child.stop()
        return entry, [json.loads(card) for card in cards.content.values()]

    entry, (card,) = run(body())
    told = card["card_json"]["runtime_config"]

    assert (entry.tool_call_parser, entry.reasoning_parser) == ("hermes", "qwen3")
    assert (told["tool_call_parser"], told["reasoning_parser"]) == ("hermes", "qwen3")


def test_a_worker_whose_rank_somebody_else_publishes_with_a_higher_epoch_exits_1_and_says_so(
    run: Run[Any], tmp_path: Path, model_dir: Path, brokers: Brokers
) -> None:
    async def body() -> tuple[int, str]:
        child = await worker(tmp_path, model_dir, brokers.env)
        await eventually(lambda: "serves 'gemma'" in child.log_path.read_text(), "it serves", 30)
        registry = EtcdRegistry(brokers.etcd_endpoints)
        (entry,) = [each for each in await registry.entries() if each.pid == child.pid]
        await registry.close()
        source = Source(entry.namespace, entry.component, entry.worker_id, 0)
        other = Transport(brokers.nats_server)
        await other.connect()
        await other.publish(subject(source, "events"), encode(Batch(1, entry.epochs[0] + 1, 0, 0)))
        code = await asyncio.wait_for(child.wait(), 20)
        await other.close()
        return code, child.log_path.read_text()

    code, log = run(body())

    assert code == 1, log
    assert "is a worker running twice with the same id?" in log
