"""The token ids that Dynamo's frontend makes of a client's request, out of its own preprocessor.

The runtime has no function for that. But its HTTP frontend answers a request with the annotation
``query_instance_id:`` with the tokens of its prompt, without calling a worker. So one runs here, on loopback
and with a discovery that this process has for itself, and shows the same models with the same cards as the
frontend that serves the clients: chat templates, tools and tokenizers are then the same code.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import msgspec

from vswa_plugin.dynamo.client import Call, FrontEndpoint, ModelCard
from vswa_plugin.dynamo.names import LOOPBACK_ENV, EndpointName
from vswa_plugin.dynamo.runtime import connect, runtime_error
from vswa_plugin.engine.contract import RequestDict
from vswa_plugin.errors import RequestError, Unavailable
from vswa_plugin.tasks import Tasks

#: Paths of Dynamo's frontend whose requests are read here.
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PATHS = (CHAT, COMPLETIONS)

_HOST = "127.0.0.1"
#: With this annotation the frontend answers with the tokens and calls no worker.
_QUERY = "query_instance_id:"
#: Fields of ``nvext`` that the tokens depend on. Others pin the request to workers, which are not known here.
_OF_THE_PROMPT = frozenset({"token_data", "use_raw_prompt"})
#: How long the frontend may take to listen, and to show a model.
READY_TIMEOUT_S = 20.0
_POLL_S = 0.02
#: More than any answer of it.
_MOST_BYTES = 64 << 20


class NotRead(RequestError):
    """Dynamo's frontend refuses the request as it is.

    :ivar code: HTTP status.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class _NvExt(msgspec.Struct):
    token_ids: list[int] | None = None


class _Answer(msgspec.Struct):
    nvext: _NvExt | None = None


_answer_decoder = msgspec.json.Decoder(_Answer)
_encoder = msgspec.json.Encoder()


class Preprocessor:
    """Dynamo's frontend inside this process, of which only the preprocessor is used.

    :param tasks: where its tasks are watched.
    """

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        self._runtime: Any = None
        self._serving: asyncio.Task[None] | None = None
        self._http = _Http()
        self._numbers = itertools.count()
        self._endpoints: dict[str, FrontEndpoint] = {}

    async def start(self) -> None:
        """Run the frontend. Raises VswaError where Dynamo's runtime cannot start."""
        # More threads would only pass each request from one to another.
        os.environ.setdefault("DYN_RUNTIME_NUM_WORKER_THREADS", "1")
        # Nothing of it is for other machines.
        os.environ.update({name: LOOPBACK_ENV[name] for name in LOOPBACK_ENV if name != "DYN_EVENT_PLANE"})
        self._runtime = connect("mem", "tcp")
        self._http.port = _free_port()
        serving = asyncio.create_task(self._serve(self._http.port), name="Dynamo's preprocessor")
        self._serving = serving
        self._tasks.watch(serving, "Dynamo's frontend inside this process has ended")
        await _until(self._http.listens)

    async def stop(self) -> None:
        self._http.close()
        if self._runtime is not None:
            self._runtime.shutdown()
        ended = [endpoint.ended() for endpoint in self._endpoints.values()]
        if self._serving is not None:
            ended.append(_ended(self._serving))
        await asyncio.gather(*ended)

    async def show(self, card: ModelCard) -> None:
        """Read requests of this model from now on, in place of an earlier card of the same name.

        :raises Exception: what Dynamo raises where its directory has no config or tokenizer.
        """
        if (before := self._endpoints.get(card.name)) is not None:
            await before.hide()
        else:
            name = EndpointName("vswa", "preprocessor", f"model-{next(self._numbers)}")
            self._endpoints[card.name] = endpoint = FrontEndpoint(self._runtime, name)
            self._tasks.watch(endpoint.serve(_never), "Dynamo's runtime inside this process has ended")
        await self._endpoints[card.name].show(card)
        probe = {"model": msgspec.Raw(_encoder.encode(card.name)), "prompt": msgspec.Raw(b'"a"')}

        async def reads() -> bool:
            return await self._lists(card.name) and await self._reads(probe)

        await _until(reads)

    async def hide(self, name: str) -> None:
        """Read requests of the model no more."""
        if (endpoint := self._endpoints.get(name)) is not None:
            await endpoint.hide()

    async def token_ids(self, path: str, body: Mapping[str, msgspec.Raw]) -> Sequence[int]:
        """The prompt of a client's request.

        :param path: one of :data:`PATHS`.
        :param body: its fields, as they came.
        :raises NotRead: as the frontend refuses it.
        :raises Unavailable: this frontend does not answer.
        """
        given: dict[str, msgspec.Raw] | None = None
        try:
            given = msgspec.json.decode(body.get("nvext", b"null"), type=dict[str, msgspec.Raw] | None)
        except msgspec.MsgspecError as error:
            raise NotRead(400, f"nvext: expected an object: {error}") from error
        nvext: dict[str, Any] = {
            name: value for name, value in (given or {}).items() if name in _OF_THE_PROMPT
        }
        nvext["annotations"] = [_QUERY]
        query: dict[str, Any] = {**body, "nvext": nvext}
        status, answer = await self._http.send("POST", path, _encoder.encode(query))
        if status != 200:
            raise NotRead(status, answer[:500].decode("utf-8", "replace"))
        found = _token_ids(answer)
        if found is None:
            raise NotRead(501, "Dynamo's frontend has answered without token ids")
        return found

    async def _serve(self, port: int) -> None:
        from dynamo.llm import (
            EngineType,
            EntrypointArgs,
            KvRouterConfig,
            RouterConfig,
            RouterMode,
            make_engine,
            run_input,
        )

        router = RouterConfig(RouterMode.KV, KvRouterConfig(use_kv_events=False))
        arguments = EntrypointArgs(EngineType.Dynamic, http_host=_HOST, http_port=port, router_config=router)
        try:
            await run_input(self._runtime, "http", await make_engine(self._runtime, arguments))
        except Exception as error:  # Dynamo raises plain Exception
            raise runtime_error("Dynamo's frontend inside this process", error) from error

    async def _lists(self, name: str) -> bool:
        _, answer = await self._http.send("GET", "/v1/models", b"")
        return any(model.get("id") == name for model in json.loads(answer).get("data", ()))

    async def _reads(self, body: Mapping[str, msgspec.Raw]) -> bool:
        with suppress(NotRead):
            await self.token_ids(COMPLETIONS, body)
            return True
        return False


def _never(request: RequestDict, call: Call) -> NoReturn:
    """Nothing is generated here."""
    raise Unavailable("this is a preprocessor, not a worker")


async def _until(ready: Callable[[], Awaitable[bool]]) -> None:
    """Nothing announces that Dynamo's frontend is ready. Raises TimeoutError."""
    async with asyncio.timeout(READY_TIMEOUT_S):
        while True:
            if await ready():
                return
            await asyncio.sleep(_POLL_S)


async def _ended(task: asyncio.Task[None]) -> None:
    await asyncio.wait({task}, timeout=10)


def _token_ids(answer: bytes) -> list[int] | None:
    """Out of one JSON object, or out of server-sent events."""
    pieces = [answer]
    if not answer.startswith(b"{"):
        pieces = [line[5:] for line in answer.split(b"\n") if line.startswith(b"data:")]
    for piece in pieces:
        with suppress(msgspec.MsgspecError):
            nvext = _answer_decoder.decode(piece).nvext
            if nvext is not None and nvext.token_ids is not None:
                return nvext.token_ids
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port


class _Http:
    """As much of an HTTP client as one server on loopback takes: it is on the way of every request."""

    def __init__(self) -> None:
        self.port = 0
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def listens(self) -> bool:
        try:
            self._idle.append(await asyncio.open_connection(_HOST, self.port, limit=_MOST_BYTES))
        except OSError:
            return False
        return True

    async def send(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer. Raises Unavailable."""
        while self._idle:  # one that was idle may have been closed meanwhile
            with suppress(OSError, EOFError):
                return await self._on(self._idle.pop(), method, path, body)
        try:
            fresh = await asyncio.open_connection(_HOST, self.port, limit=_MOST_BYTES)
            return await self._on(fresh, method, path, body)
        except (OSError, EOFError) as error:
            raise Unavailable(f"Dynamo's frontend inside this process does not answer: {error}") from error

    async def _on(
        self, link: tuple[asyncio.StreamReader, asyncio.StreamWriter], method: str, path: str, body: bytes
    ) -> tuple[int, bytes]:
        reader, writer = link
        try:
            head = f"{method} {path} HTTP/1.1\r\nhost: vswa\r\ncontent-type: application/json\r\n"
            writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            status, length = _status_and_length(await reader.readuntil(b"\r\n\r\n"))
            answer = await _chunks(reader) if length is None else await reader.readexactly(length)
        except BaseException:
            writer.close()
            raise
        self._idle.append(link)
        return status, answer

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()


def _status_and_length(head: bytes) -> tuple[int, int | None]:
    """``None``: the body comes in chunks."""
    lines = head.lower().split(b"\r\n")
    for line in lines[1:]:
        name, _, value = line.partition(b":")
        if name == b"content-length":
            return int(lines[0].split()[1]), int(value)
    return int(lines[0].split()[1]), None


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    pieces: list[bytes] = []
    while size := int(await reader.readline(), 16):
        pieces.append((await reader.readexactly(size + 2))[:-2])
    await reader.readline()
    return b"".join(pieces)
