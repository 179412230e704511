"""What the end-to-end tests share: HTTP calls, the model's tokenizer, batches from NATS."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import Brokers
from vswa_plugin.launch.cluster import Cluster, ClusterSettings
from vswa_plugin.launch.processes import Child
from vswa_plugin.launch.topologies import WorkerGroup
from vswa_plugin.registry.opening import registry_from_env
from vswa_plugin.wire.events import Batch, Event, Source, decode
from vswa_plugin.wire.subjects import events_of, source_of
from vswa_plugin.wire.transport import Transport

_numbers = itertools.count()


def own_namespace(name: str) -> str:
    """``name`` with a number: another one at each call, so that no test meets what another one left."""
    return f"{name}-{next(_numbers)}"


async def post(cluster: Cluster, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Status and JSON of one request that is not streamed."""
    async with aiohttp.ClientSession() as session, session.post(f"{cluster.url}{path}", json=body) as answer:
        return answer.status, await answer.json()


async def stream(cluster: Cluster, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks of one streamed request."""
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with aiohttp.ClientSession() as session, session.post(f"{cluster.url}{path}", json=body) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                yield json.loads(line[6:])


async def get(url: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status, await answer.text()


#: By pid; an address stays for as long as its process lives.
_status_urls: dict[int, str] = {}


async def status_url(worker: Child) -> str:
    """Where a worker serves its status, as the registry of its environment says; it must have joined."""
    if worker.pid not in _status_urls:
        registry = registry_from_env({**os.environ, **worker.env})
        here = socket.gethostname()
        entries = [each for each in await registry.entries() if (each.host, each.pid) == (here, worker.pid)]
        await registry.close()
        (url,) = [each.status_url for each in entries]
        assert url is not None, f"{worker.name} was started without --status-port"
        _status_urls[worker.pid] = url
    return _status_urls[worker.pid]


async def metric(worker: Child, metric_name: str, **labels: str) -> float:
    """The value of one metric of a worker; 0 where it has none yet."""
    _, text = await get(f"{await status_url(worker)}/metrics")
    for line in text.splitlines():
        if line.startswith(metric_name) and all(f'{key}="{value}"' in line for key, value in labels.items()):
            return float(line.rsplit(" ", 1)[1])
    return 0.0


async def engine_metric(worker: Child, name: str) -> float:
    """What the engine of a worker states under ``name``, of all its ranks; 0 where it states nothing yet.

    The name is that of the engine's ``stats``, which may end in a window.
    """
    _, text = await get(f"{await status_url(worker)}/metrics")
    total = 0.0
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            window = sample.labels.get("window")
            shown = family.name + (f"_{window}" if window else "")
            total += sample.value if shown == f"vswa_engine_{name}" else 0.0
    return total


def cluster_on(brokers: Brokers | Cluster, folder: Path, settings: ClusterSettings) -> Cluster:
    """On brokers that run; not started."""
    made = Cluster(settings, folder)
    made.nats_server, made.etcd_endpoints = brokers.nats_server, brokers.etcd_endpoints
    return made


@asynccontextmanager
async def running(made: Cluster) -> AsyncIterator[Cluster]:
    try:
        await made.start()
        yield made
    finally:
        await made.stop()


def apart(cluster: Cluster, name: str, *groups: WorkerGroup) -> Cluster:
    """As :func:`beside`, not started."""
    namespace = own_namespace(name)
    folder = cluster.folder / namespace
    folder.mkdir()
    settings = msgspec.structs.replace(cluster.settings, namespace=namespace, groups=groups)
    return cluster_on(cluster, folder, settings)


def beside(cluster: Cluster, name: str, *groups: WorkerGroup) -> AbstractAsyncContextManager[Cluster]:
    """Workers and a frontend in a namespace and folder of their own, on ``cluster``'s brokers; running."""
    return running(apart(cluster, name, *groups))


async def eventually(condition: Callable[[], Any], what: str, timeout_s: float = 15.0) -> None:
    """Wait until ``condition`` (plain or async) holds."""
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                held = condition()
                if await held if asyncio.iscoroutine(held) else held:
                    return
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s:g} s: {what}") from None


class Recorded:
    """All batches of one namespace, with the loop's time of arrival."""

    def __init__(self) -> None:
        self.batches: list[tuple[float, Source, Batch]] = []

    def events(self, kind: type) -> list[Event]:
        return [e for _, _, batch in self.batches for e in batch.events if isinstance(e, kind)]

    async def settled(self) -> None:
        """Return once every rank seen so far has sent two more heartbeats: nothing is on its way."""
        seen = {source for _, source, _ in self.batches}
        assert seen, "nobody has been heard yet"
        start = len(self.batches)

        def quiet() -> bool:
            beats = [source for _, source, batch in self.batches[start:] if not batch.events]
            return all(beats.count(source) >= 2 for source in seen)

        await eventually(quiet, f"heartbeats of {seen}")


@asynccontextmanager
async def recording(cluster: Cluster, namespace: str | None = None) -> AsyncIterator[Recorded]:
    """What its workers publish, or those of ``namespace``."""
    recorded = Recorded()
    transport = Transport(cluster.nats_server)

    async def take(event_subject: str, payload: bytes) -> None:
        now = asyncio.get_running_loop().time()
        recorded.batches.append((now, source_of(event_subject), decode(payload)))

    await transport.connect()
    await transport.subscribe(events_of(namespace or cluster.settings.namespace), take)
    await transport.flush()
    try:
        yield recorded
    finally:
        await transport.close()


class TextModel:
    """The checkpoint's tokenizer, as Dynamo's frontend uses it for the completions endpoint."""

    def __init__(self, model_dir: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))

    def ids(self, text: str) -> list[int]:
        # Dynamo adds no <bos> on the completions endpoint.
        encoded: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return encoded

    def text(self, ids: list[int]) -> str:
        decoded: str = self._tokenizer.decode(ids)
        return decoded


def long_prompt(name: str, lines: int = 40) -> str:
    """A prompt of some 25 tokens a line that differs from others from its first line on."""
    return "\n".join(
        f"{name} {i}: the value of entry {i * 37 % 101} follows entry {i}." for i in range(lines)
    )
