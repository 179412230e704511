"""Workers that are not ours as a relay sees them: publishers on real sockets, and recorded streams."""

from __future__ import annotations

import asyncio
import json
import lzma
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec

from tests.e2e_helpers import eventually, get
from tests.vllm_publisher import KVEventsConfig, Publisher
from vswa_plugin.launch.processes import Child, free_port, python_module

DATA = Path(__file__).parent / "data"
MODEL = "gemma"
WAIT_S = 40.0


class Asked(NamedTuple):
    """A recorded request, before which ``batches`` had been published; ``cached``: what vLLM reused."""

    batches: int
    tokens: list[int]
    cached: int


class Recording:
    """What a real vLLM published, in the order of its numbers, and the requests between.

    A stream of two engines is that of the first one here.
    """

    def __init__(self, name: str) -> None:
        records = msgspec.msgpack.decode(lzma.decompress((DATA / f"vllm-zmq-{name}.msgpack.xz").read_bytes()))
        self.header: dict[str, Any] = records[0][1]
        self.payloads: list[bytes] = []
        self.requests: list[Asked] = []
        for record in records[1:]:
            match record:
                case ["request", tokens, cached]:
                    self.requests.append(Asked(len(self.payloads), tokens, cached))
                case ["message", [_, number, payload]]:
                    if int.from_bytes(number, "big") != len(self.payloads):
                        return
                    self.payloads.append(payload)

    def write_model(self, folder: Path) -> Path:
        """A model directory with a config.json that has these windows."""
        windows = self.header["windows"]
        layers = {
            "model_type": "gemma3_text",
            "num_hidden_layers": len(windows),
            "layer_types": ["full_attention" if w is None else "sliding_attention" for w in windows],
            "sliding_window": next(w for w in windows if w is not None),
            "max_position_embeddings": 8192,
            "vocab_size": 5000,
        }
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(layers))
        return folder


class Engine:
    """A vLLM that publishes its events on 127.0.0.1; ``rank`` 0 unless it is another one."""

    def __init__(self, kept: int = 10_000, ports: tuple[int, int] | None = None, rank: int = 0) -> None:
        self.ports = ports or (free_port(), free_port())
        events, replay = (f"tcp://127.0.0.1:{port}" for port in self.ports)
        config = KVEventsConfig(True, "zmq", events, replay, kept, topic="kv-events")
        self.publisher = Publisher(config, rank)
        self.options = {"events": events, "replay": replay}

    def publish(self, payloads: Iterator[bytes] | list[bytes]) -> None:
        for payload in payloads:
            self.publisher.publish([], payload)

    def close(self) -> None:
        self.publisher.close()


class Stack:
    """A relay and a selector in a namespace of their own, on brokers that run."""

    def __init__(self, folder: Path, env: Mapping[str, str], namespace: str) -> None:
        self.folder, self.namespace = folder, namespace
        self.env = {**env}
        self.children: list[Child] = []

    async def relay(self, *arguments: str, name: str = "relay") -> Child:
        where = ("--namespace", self.namespace, "--status-port", "0", "--heartbeat", "0.2")
        return await self.child(name, "vswa_plugin.relay", *where, *arguments)

    async def listed(self, workers: list[dict[str, Any]], *arguments: str) -> Child:
        """A relay of these workers, by a file."""
        file = self.folder / "fleet.yaml"
        file.write_text(json.dumps({"workers": workers}))
        return await self.relay("--workers", str(file), *arguments)

    async def selector(self) -> str:
        where = ("--namespace", self.namespace, "--http-port", "0", "--heartbeat", "0.2")
        child = await self.child("selector", "vswa_plugin.router", "--selector-only", *where)
        return await url_in(child, "API on ")

    async def child(self, name: str, module: str, *arguments: str) -> Child:
        child = await Child.start(name, python_module(module, *arguments), self.folder, self.env)
        self.children.append(child)
        return child

    async def index(self, *arguments: str) -> dict[str, Any]:
        """What ``vswa index --once --json`` shows."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "vswa_plugin", "index", "--once", "--json", "--namespace", self.namespace,
            *arguments,
            env={**os.environ, **self.env}, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, error = await process.communicate()
        assert process.returncode == 0, error.decode()
        shown: dict[str, Any] = json.loads(out)
        return shown

    async def stop(self) -> dict[str, int]:
        return {child.name: await child.stop() for child in reversed(self.children)}


async def url_in(child: Child, before: str) -> str:
    """The first URL behind ``before`` in the log of a program, once it is there."""

    def said() -> bool:
        child.check()
        return before in child.log()

    await eventually(said, f"{child.name} says where it listens", WAIT_S)
    return child.log().split(before, 1)[1].split()[0].rstrip(",:")


async def counted(relay: Child, name: str, worker: int) -> float:
    """A number of the relay about one worker; 0 where there is none."""
    _, page = await get(f"{await url_in(relay, 'status on ')}/metrics")
    lines = [
        line for line in page.splitlines() if line.startswith(f"{name}{{") and f'worker="{worker}"' in line
    ]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


async def promised(selector: str, tokens: list[int]) -> dict[str, tuple[int, str]]:
    """By worker id: the tokens that rank 0 is expected to reuse, and the state of its view."""
    body = {"token_ids": tokens, "model_name": MODEL}
    async with aiohttp.ClientSession() as session, session.post(f"{selector}/query", json=body) as answer:
        if answer.status != 200:
            return {}
        instances = (await answer.json())["instances"]
    return {
        worker: (each["ranks"]["0"]["cached_tokens"], each["ranks"]["0"]["state"])
        for worker, each in instances.items()
        if "0" in each["ranks"]
    }


async def until_promised(selector: str, tokens: list[int], expected: dict[str, int]) -> None:
    """Wait until just these workers are scored, each with that many tokens."""
    seen: dict[str, tuple[int, str]] = {}

    async def as_expected() -> bool:
        nonlocal seen
        seen = await promised(selector, tokens)
        return seen == {worker: (cached, "live") for worker, cached in expected.items()}

    try:
        await eventually(as_expected, "", WAIT_S)
    except AssertionError:
        raise AssertionError(f"expected {expected}, got {seen}") from None
