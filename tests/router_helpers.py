"""A router with its frontend in front and echo workers behind, each a process of its own.

An echo worker repeats the prompt's tokens. It keeps "blocks" for ever and publishes them as a real engine's
worker does, so that the router's promises can be compared with what it reports. One that prefills hands over
a note that no router could understand, without which one that decodes refuses. What it shall do beside is
said per request, in the header ``x-dynamo-meta-echo``, to one that prefills with ``prefill-`` before it. This
file as a program is one such worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp

from tests.e2e_helpers import eventually
from vswa_plugin.blocks.hashing import sequence_hashes_of_tokens
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.dynamo.names import LOOPBACK_ENV, EndpointName, default_endpoint
from vswa_plugin.dynamo.runtime import connect, namespaced_block_hash, run_on_uvloop
from vswa_plugin.engine.contract import BlocksStored, EngineBlock
from vswa_plugin.launch.processes import Child, free_port, python_module
from vswa_plugin.publishing.nodes import NodeTable
from vswa_plugin.publishing.publisher import Publisher, PublisherOptions
from vswa_plugin.publishing.residency import Residency
from vswa_plugin.registry import Entry
from vswa_plugin.registry.opening import registry_from_env
from vswa_plugin.testing.streams import DirectAdapter
from vswa_plugin.wire.events import Source
from vswa_plugin.wire.subjects import subject
from vswa_plugin.wire.transport import Transport

ECHO = "x-dynamo-meta-echo"


def prompt_of(name: str, words: int = 150) -> str:
    return " ".join(f"{name}{number * 7 % 31}" for number in range(words))


class EchoRank:
    """What one dp_rank holds, and its publisher."""

    def __init__(self, transport: Transport, source: Source, layout: CacheLayout) -> None:
        self.held: set[int] = set()
        self._size = layout.block_size
        self._groups = [group.group_id for group in layout.groups]

        async def send(payload: bytes) -> None:
            await transport.publish(subject(source, "events"), payload)

        self.publisher = Publisher(
            source,
            DirectAdapter(),
            Residency(layout, NodeTable(namespaced_block_hash)),
            send,
            lambda *_: None,
            PublisherOptions(heartbeat_s=0.2),
        )

    def take(self, tokens: list[int]) -> int:
        """Store the prompt's blocks; the tokens that were cached before."""
        hashes = sequence_hashes_of_tokens(tokens, self._size)
        known = next((at for at, name in enumerate(hashes) if name not in self.held), len(hashes))
        new = hashes[known:]
        self.held.update(new)
        if new:
            blocks = tuple(
                EngineBlock(name, tuple(tokens[(known + n) * self._size : (known + n + 1) * self._size]))
                for n, name in enumerate(new)
            )
            parent = hashes[known - 1] if known else None
            stored = [BlocksStored(group, parent, blocks) for group in self._groups]
            self.publisher.offer([{"event": event} for event in stored])
        return min(known * self._size, len(tokens) - 1)


class EchoWorker:
    """:param options: ``namespace``, ``component``, ``model``, ``model_path``, ``block_size``, ``dp``,
    ``mode``, ``folder``: where the file is whose taker must die.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        size = options.get("block_size", 16)
        self._layout = CacheLayout(
            (CacheGroup(0, 4 * size, size), CacheGroup(1, None, size)), "trtllm_v2", options["model"]
        )
        self._transport = Transport(os.environ["NATS_SERVER"])
        self._registry = registry_from_env()
        self._ranks: list[EchoRank] = []
        self._stop = asyncio.Event()

    async def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop.set)
        await self._transport.connect()
        runtime = connect()
        name = EndpointName(self._options["namespace"], self._options["component"], "generate")
        endpoint = runtime.endpoint(str(name))
        worker_id = int(endpoint.connection_id())
        for dp_rank in range(self._options.get("dp", 1)):
            source = Source(name.namespace, name.component, worker_id, dp_rank)
            rank = EchoRank(self._transport, source, self._layout)
            await self._transport.serve(subject(source, "control"), rank.publisher.answer)
            self._ranks.append(rank)
        publishing = [asyncio.create_task(rank.publisher.run()) for rank in self._ranks]

        async def serve() -> None:
            await endpoint.serve_endpoint(self.generate, graceful_shutdown=True)

        serving = asyncio.create_task(serve())
        await self._registry.join(self._entry(name, worker_id))
        say(worker_id=worker_id)
        await self._stop.wait()
        await self._registry.close()
        await endpoint.unregister_endpoint_instance()
        runtime.shutdown()
        await asyncio.wait({serving}, timeout=10)
        for rank in self._ranks:
            rank.publisher.close()
        await asyncio.gather(*publishing)
        await self._transport.close()
        return 0

    def _entry(self, name: EndpointName, worker_id: int) -> Entry:
        return Entry(
            namespace=name.namespace,
            component=name.component,
            worker_id=worker_id,
            mode=self._options.get("mode", "agg"),
            engine="echo",
            served_model_name=self._layout.model,
            model_path=self._options["model_path"],
            context_length=8_192,
            block_size=self._layout.block_size,
            rule=self._layout.rule,
            hash_scheme=self._layout.hash_scheme,
            groups=self._layout.groups,
            epochs={n: rank.publisher.ledger.epoch for n, rank in enumerate(self._ranks)},
            total_kv_blocks=1_000,
            pid=os.getpid(),
        )

    async def generate(self, request: dict[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
        mode = self._options.get("mode", "agg")
        wish, _, number = context.metadata.get("echo", "").partition(":")
        if wish.startswith("prefill-") != (mode == "prefill"):
            wish = ""
        wish = wish.removeprefix("prefill-")
        dp_rank = (request.get("routing") or {}).get("dp_rank", 0)
        prompt = list(request["token_ids"])
        refuse(wish)
        if mode == "prefill" and wish == "die":
            self._die_if_nobody_has()
        handed = check_note(request) if mode == "decode" else None
        cached = self._ranks[dp_rank].take(prompt)
        say(
            request=context.id(), dp_rank=dp_rank, cached=cached, prompt=len(prompt), wish=wish, handed=handed
        )
        if mode == "decode":
            cached = len(prompt)  # as engines count that were handed all of it
        count = request["stop_conditions"].get("max_tokens") or 16
        for done in range(count):
            chunk: dict[str, Any] = {"token_ids": [prompt[(len(prompt) + done) % 8]], "index": 0}
            if done == count - 1:
                details = {"cached_tokens": cached}
                usage = {"prompt_tokens": len(prompt), "completion_tokens": count}
                usage |= {"total_tokens": len(prompt) + count, "prompt_tokens_details": details}
                chunk |= {"finish_reason": "length", "completion_usage": usage}
                if mode == "prefill":
                    chunk["disaggregated_params"] = {"note": [context.id(), {"of": len(prompt)}]}
            if wish != "hang" or mode != "prefill":
                yield chunk
            if wish in ("die", "freeze") and done == int(number):
                self._die_if_nobody_has(signal.SIGKILL if wish == "die" else signal.SIGSTOP)
            if wish == "hang":
                await context.async_killed_or_stopped()
                say(stopped=context.id())
                return
            if wish == "pace":
                await asyncio.sleep(float(number))

    def _die_if_nobody_has(self, by: signal.Signals = signal.SIGKILL) -> None:
        with contextlib.suppress(FileNotFoundError):
            Path(self._options["folder"], "die").unlink()
            say(word="dies now")
            os.kill(os.getpid(), by)


def check_note(request: Mapping[str, Any]) -> Any:
    """What a prefill worker has handed over for this prompt; InvalidArgument where it has not."""
    from dynamo.llm.exceptions import InvalidArgument

    note = ((request.get("prefill_result") or {}).get("disaggregated_params") or {}).get("note")
    if not note or note[1] != {"of": len(request["token_ids"])}:
        raise InvalidArgument(f"expected the note of a prefill worker, got {note}")
    return note


def refuse(wish: str) -> None:
    from dynamo.llm import HttpError
    from dynamo.llm.exceptions import Disconnected, InvalidArgument

    if wish == "invalid":
        raise InvalidArgument("the echo refuses this prompt")
    if wish == "full":
        raise HttpError(503, "the echo is full")
    if wish == "broken":
        raise RuntimeError("the echo is broken")
    if wish == "stopping":
        raise Disconnected("the echo is stopping")


def say(**what: Any) -> None:
    sys.stdout.write(f"ECHO {json.dumps(what)}\n")
    sys.stdout.flush()


class Echo:
    """One echo worker, seen from the test."""

    def __init__(self, child: Child, options: Mapping[str, Any]) -> None:
        self.child = child
        self.options = options

    def said(self, key: str) -> list[dict[str, Any]]:
        """All that it said of that kind, in order."""
        lines = [json.loads(line[5:]) for line in self.child.log().splitlines() if line.startswith("ECHO ")]
        return [line for line in lines if key in line]

    @property
    def worker_id(self) -> int:
        return int(self.said("worker_id")[0]["worker_id"])


class Stack:
    """Frontend in one namespace, workers in another, a router between them."""

    def __init__(self, folder: Path, env: Mapping[str, str], model_path: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.url = f"http://127.0.0.1:{free_port()}"
        self.children: list[Child] = []
        self.echoes: list[Echo] = []
        self.routers: list[Child] = []
        #: Names of those that were to die.
        self.killed: set[str] = set()
        # Engines that each take all cores for every matrix product are slower than one.
        self._env = {**LOOPBACK_ENV, "OPENBLAS_NUM_THREADS": "1", "DYN_LOG": "error", **env}
        self._model_path = str(model_path)
        self._numbers = 0

    async def start(self, *router_options: str) -> None:
        port = self.url.rpartition(":")[2]
        await self.child(
            "frontend", "vswa_plugin.frontend", "--http-port", port, "--namespace", f"{self.name}-front"
        )
        await self.router(*router_options)

    async def router(self, *options: str) -> Child:
        self._numbers += 1
        where = ["--namespace", self.name]
        if "--selector-only" not in options:
            where += ["--endpoint", f"dyn://{self.name}-front.router.generate"]
        child = await self.child(f"router-{self._numbers}", "vswa_plugin.router", *where, *options)
        await child.until(lambda: _true("workers in the registry" in child.log()), "started", 30)
        self.routers.append(child)
        return child

    async def echo(self, model: str = "gemma", component: str = "echo", **options: Any) -> Echo:
        """One more echo worker, in the registry."""
        self._numbers += 1
        given = {"namespace": self.name, "component": component, "model": model, "folder": str(self.folder)}
        given |= {"model_path": self._model_path, **options}
        name = f"echo-{self._numbers}"
        echo = Echo(await self.child(name, "tests.router_helpers", json.dumps(given)), given)
        await echo.child.until(lambda: _true(bool(echo.said("worker_id"))), "registered", 30)
        self.echoes.append(echo)
        return echo

    async def engine(self, name: str, mode: str = "agg", *options: str) -> Child:
        """A worker with a real engine, that of the tests' model."""
        endpoint = f"dyn://{default_endpoint(mode, self.name)}"
        where = ("--mode", mode, "--endpoint", endpoint, "--status-port", "0", "--heartbeat", "0.2")
        model = ("--model-path", self._model_path, "--served-model-name", "gemma")
        return await self.child(name, "vswa_plugin.worker", *where, *model, *options)

    async def stock(self, router_mode: str) -> str:
        """Dynamo's frontend with its own router over the same workers; its address."""
        port = free_port()
        where = ("--http-port", str(port), "--namespace", self.name)
        child = await self.child(
            f"stock-{router_mode}", "vswa_plugin.frontend", "--router-mode", router_mode, *where
        )
        url = f"http://127.0.0.1:{port}"

        async def shown() -> bool:
            return "gemma" in await self.models(url)

        await child.until(shown, "showing the model", 30)
        return url

    def echo_of(self, model: str = "gemma", **options: Any) -> Echo:
        """The only worker of that kind."""
        wanted = {"model": model, **options}.items()
        (found,) = (echo for echo in self.echoes if wanted <= echo.options.items())
        return found

    async def replace_the_dead(self) -> Echo:
        """Start a worker for the one that has died, or that is frozen; the new one."""
        (dead,) = (echo for echo in self.echoes if logged(echo.child, "dies now"))
        with contextlib.suppress(ProcessLookupError):
            os.kill(dead.child.pid, signal.SIGKILL)
        assert await dead.child.wait() == -signal.SIGKILL
        self.killed.add(dead.child.name)
        self.echoes.remove(dead)
        kept = {name: value for name, value in dead.options.items() if name in ("component", "mode")}
        return await self.echo(**kept)

    async def used(self, has_served: Callable[[], bool]) -> None:
        """Send new prompts until one has been served where ``has_served`` looks.

        That a worker or a router is registered says nothing of when those that call it have noticed.
        """
        async with asyncio.timeout(30):
            while not has_served():
                self._numbers += 1
                assert (await self.ask(prompt_of(f"fresh{self._numbers}-", 20)))[0] == 200

    async def child(self, name: str, module: str, *arguments: str) -> Child:
        child = await Child.start(name, python_module(module, *arguments), self.folder, self._env)
        self.children.append(child)
        return child

    async def models(self, url: str = "") -> list[str]:
        with contextlib.suppress(aiohttp.ClientError, OSError):
            address = f"{url or self.url}/v1/models"
            async with aiohttp.ClientSession() as session, session.get(address) as answer:
                return sorted(model["id"] for model in (await answer.json()).get("data", []))
        return []

    async def shows(self, *models: str) -> None:
        async def shown() -> bool:
            return await self.models() == sorted(models)

        await eventually(shown, f"the frontend shows {models}")

    async def ask(
        self,
        prompt: str,
        echo: str = "",
        *,
        url: str = "",
        worker_id: int | None = None,
        session: str = "",
        **body: Any,
    ) -> tuple[int, Any]:
        """Status and JSON of one completion, by the router or at ``url``, where ``worker_id`` pins it."""
        headers = {ECHO: echo} if echo else {}
        if session:
            headers["x-dynamo-session-id"] = session
        if worker_id is not None:
            headers["x-dynamo-worker-instance-id"] = str(worker_id)
        async with (
            aiohttp.ClientSession() as session,
            self._post(session, prompt, headers, body, url) as answer,
        ):
            return answer.status, await answer.json(content_type=None)

    async def stream(self, prompt: str, echo: str = "", **body: Any) -> AsyncGenerator[str, None]:
        """The pieces of text of one completion."""
        body["stream"] = True
        headers = {ECHO: echo} if echo else {}
        async with aiohttp.ClientSession() as session, self._post(session, prompt, headers, body) as answer:
            assert answer.status == 200, await answer.text()
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[6:])
                    assert "choices" in chunk, chunk
                    for choice in chunk["choices"]:
                        yield choice["text"]

    def _post(
        self,
        session: aiohttp.ClientSession,
        prompt: str,
        headers: Mapping[str, str],
        body: Mapping[str, Any],
        url: str = "",
    ) -> Any:
        given = {"model": "gemma", "prompt": prompt, "max_tokens": 4, "ignore_eos": True, **body}
        return session.post(f"{url or self.url}/v1/completions", json=given, headers=headers)

    async def stop(self) -> dict[str, int]:
        """Stop all; exit codes by name."""
        codes = await asyncio.gather(*(child.stop() for child in self.children))
        return {child.name: code for child, code in zip(self.children, codes, strict=True)}


async def _true(held: bool) -> bool:
    return held


def logged(child: Child, pattern: str) -> list[str]:
    return re.findall(pattern, child.log())


if __name__ == "__main__":
    sys.exit(run_on_uvloop(EchoWorker(json.loads(sys.argv[1])).run()))
