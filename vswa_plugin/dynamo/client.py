"""What a front door needs of NVIDIA Dynamo: to be found by its frontend, and to call workers directly."""

from __future__ import annotations

import asyncio
import re
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from vswa_plugin.blocks.hashing import sequence_hashes, sequence_hashes_of_tokens
from vswa_plugin.dynamo.bursts import joined
from vswa_plugin.dynamo.names import RELEASE, EndpointName
from vswa_plugin.dynamo.runtime import (
    dynamo_error,
    leave_discovery,
    request_ids,
    serve_endpoint,
    text_surfaces,
)
from vswa_plugin.engine.contract import ChunkDict, RequestDict
from vswa_plugin.errors import InvalidRequest, Overloaded, RequestError, Unavailable
from vswa_plugin.tracing import REQUEST

_HOST = re.compile(r"(?:tcp://)?(?:\[([^\]]+)\]|([^\s:/\[\]]+)):\d+(?:/|$)")


class ModelCard(msgspec.Struct, frozen=True):
    """How a model is shown to Dynamo's frontend.

    :param model_path: directory with config and tokenizer, on this machine.
    :param chat: whether it is shown for chat too, or for completions alone.
    """

    name: str
    model_path: str
    block_size: int
    context_length: int
    total_kv_blocks: int
    data_parallel_size: int = 1
    chat: bool = True
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None


class Unreached(Unavailable):
    """The worker could not be called at all: nothing was generated."""


class WorkerHttpError(RequestError):
    """A worker's own HTTP status, other than those that have an error of ours."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Call:
    """One request as Dynamo handed it over."""

    def __init__(self, context: Any) -> None:
        self.context = context

    @property
    def request_id(self) -> str:
        return str(self.context.id())

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the client sent in ``x-dynamo-meta-*`` headers."""
        headers: dict[str, str] = self.context.metadata.copy()
        return headers

    def stopped(self) -> bool:
        """Whether the client has gone."""
        return bool(self.context.is_stopped())

    def gone(self) -> Awaitable[bool]:
        """Done when the client goes."""
        waiting: Awaitable[bool] = self.context.async_killed_or_stopped()
        return waiting


#: (request, call) -> chunks
Front = Callable[[RequestDict, Call], AsyncIterator[ChunkDict]]


class FrontEndpoint:
    """One endpoint of this process on which one model is shown, and shown no more, as workers come and go."""

    def __init__(self, runtime: Any, name: EndpointName) -> None:
        self.name = name
        self._endpoint = runtime.endpoint(str(name))
        self._serving: asyncio.Task[None] | None = None
        self._listed = False

    @property
    def instance_id(self) -> int:
        """By which Dynamo's frontend addresses this process."""
        return int(self._endpoint.connection_id())

    def serve(self, front: Front) -> asyncio.Task[None]:
        """Serve requests in the returned task, which ends when the runtime does."""

        # Dynamo looks the parameters up by these names.
        async def generate(request: dict[str, Any], context: Any) -> AsyncIterator[ChunkDict]:
            ids = request_ids(context)
            REQUEST.set(ids)
            try:
                async for chunk in front(request, Call(context)):
                    yield chunk
                    REQUEST.set(ids)  # Dynamo asks for each chunk in a task of its own
            except RequestError as error:
                raise _to_dynamo(error) from None  # Dynamo prints the whole chain

        self._serving = asyncio.create_task(
            serve_endpoint(self._endpoint, generate), name=f"serve {self.name}"
        )
        self._listed = True
        return self._serving

    async def show(self, card: ModelCard) -> None:
        """Register the model for completions and chat, aggregated. Raises what Dynamo raises."""
        from dynamo.llm import ModelInput, ModelRuntimeConfig, WorkerType, register_model

        config = ModelRuntimeConfig()
        config.context_length = card.context_length
        config.total_kv_blocks = card.total_kv_blocks
        config.data_parallel_size = card.data_parallel_size
        config.tool_call_parser = card.tool_call_parser
        config.reasoning_parser = card.reasoning_parser
        config.enable_local_indexer = False
        if not self._listed:
            await self._endpoint.register_endpoint_instance()
            self._listed = True
        await register_model(
            ModelInput.Tokens,
            text_surfaces(card.chat),
            self._endpoint,
            card.model_path,
            card.name,
            worker_type=WorkerType.Aggregated,
            kv_cache_block_size=card.block_size,
            runtime_config=config,
            ignore_weights=True,
        )

    async def hide(self) -> None:
        """Take model and endpoint out of discovery; requests under way go on."""
        self._listed = False
        await leave_discovery(self._endpoint, self.name)

    async def ended(self, timeout_s: float = 10.0) -> None:
        """Wait for the serving task after the runtime's shutdown."""
        if self._serving is not None:
            await asyncio.wait({self._serving}, timeout=timeout_s)


class WorkerClient:
    """Calls the workers of one endpoint. Made by :meth:`open`."""

    def __init__(self, name: EndpointName, client: Any) -> None:
        self.name = name
        self._client = client
        #: Streams under way, by worker: each gets an error when no more will come.
        self._streams: dict[int, set[asyncio.Future[Exception]]] = {}

    @classmethod
    async def open(cls, runtime: Any, name: EndpointName) -> WorkerClient:
        return cls(name, await runtime.endpoint(str(name)).client())

    def instance_ids(self) -> Sequence[int]:
        """Workers that Dynamo's discovery lists now."""
        ids: list[int] = self._client.instance_ids()
        return ids

    def hosts(self) -> dict[int, str]:
        """The same workers, each with the host by which it is called; empty where that cannot be read."""
        return {
            int(each.instance_id): _host_of(str(each.transport.address)) for each in self._client.instances()
        }

    def busy(self, worker_id: int) -> bool:
        """Whether a stream of this worker is under way."""
        return bool(self._streams.get(worker_id))

    def give_up(self, worker_id: int, reason: str) -> None:
        """End this worker's streams: their requests go on with another worker."""
        for lost in self._streams.get(worker_id, ()):
            if not lost.done():
                lost.set_result(Unavailable(reason))

    @contextmanager
    def _stream(self, worker_id: int) -> Iterator[asyncio.Future[Exception]]:
        lost: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        streams = self._streams.setdefault(worker_id, set())
        streams.add(lost)
        try:
            yield lost
        finally:
            streams.discard(lost)
            if not streams and self._streams.get(worker_id) is streams:
                del self._streams[worker_id]

    async def generate(self, request: RequestDict, worker_id: int, call: Call) -> AsyncIterator[ChunkDict]:
        """Chunks of one worker, as it sends them, those of a burst joined (bursts.py).

        The worker learns of it when the client goes.

        :raises RequestError: as the worker raised it; Unreached where it could not be called.
        """
        try:
            chunks = await self._client.direct(request, worker_id, annotated=False, context=call.context)
        except Exception as error:  # Dynamo raises plain Exception
            raise _from_dynamo(error, Unreached) from error
        try:
            with self._stream(worker_id) as lost:
                async for chunk in joined(chunks, lost=lost):
                    yield chunk
        except Exception as error:
            if not call.stopped():
                raise _from_dynamo(error, Unavailable) from error

    async def release(self, worker_id: int, params: Mapping[str, Any]) -> bool:
        """Let a prefill worker free the prompt that it hands over with ``params``: nobody will fetch it.

        A request of its own, since the client of the one that it was computed for may have gone.

        :returns: whether the worker held anything for it.
        :raises RequestError: as :meth:`generate`.
        """
        try:
            chunks = await self._client.direct({RELEASE: params}, worker_id, annotated=False)
            return any([bool(chunk.get("released")) async for chunk in chunks])
        except Exception as error:  # Dynamo raises plain Exception
            raise _from_dynamo(error, Unavailable) from error


def _host_of(address: str) -> str:
    """Of an address of Dynamo's request plane, such as ``10.0.0.5:34567/1a2b/ns/component/endpoint``."""
    match = _HOST.match(address)
    return "" if match is None else match[1] or match[2]


def namespaced_sequence_hashes(
    token_ids: Sequence[int], block_size: int, cache_salt: str | None = None, lora_name: str | None = None
) -> Sequence[int]:
    """Sequence hashes of a prompt's full blocks, of plain text or in the namespace of a salt or LoRA.

    :raises OverflowError: a token id is not 0 <= id < 2**32.
    """
    if not cache_salt and not lora_name:
        return sequence_hashes_of_tokens(token_ids, block_size)
    from dynamo.llm import compute_block_hash_for_seq

    blocks: list[int] = compute_block_hash_for_seq(
        list(token_ids), block_size, lora_name=lora_name or None, cache_namespace=cache_salt or None
    )
    return array("Q", sequence_hashes(blocks))


async def shut_down(runtime: Any, endpoints: Iterable[FrontEndpoint]) -> None:
    """End the runtime and all serving tasks."""
    runtime.shutdown()
    await asyncio.gather(*(endpoint.ended() for endpoint in endpoints))


def _from_dynamo(error: Exception, unavailable: type[Unavailable]) -> Exception:
    """What a worker raised, out of what ``Client.direct`` makes of it.

    Only an invalid argument keeps its type. All else is ValueError or Exception with a text of the form
    ``Kind: message``; an HTTP error has its code and message there, as JSON.
    """
    from dynamo.llm.exceptions import InvalidArgument

    text = str(error)
    kind, _, message = text.partition(": ")
    translated: Exception
    if isinstance(error, InvalidArgument):
        translated = InvalidRequest(text)
    elif (http := _http_error(message)) is not None:
        translated = Overloaded(http[1]) if http[0] == 503 else WorkerHttpError(*http)
    elif kind == "InvalidRequest":
        translated = InvalidRequest(message)
    elif kind == "Internal":
        translated = WorkerHttpError(500, message)
    else:
        translated = unavailable(message if kind == "Unavailable" else text)
    return translated


def _http_error(message: str) -> tuple[int, str] | None:
    """Code and message of an HttpError that came over the request plane."""
    try:
        body = msgspec.json.decode(message, type=dict[str, Any])
        return int(body["code"]), str(body["message"])
    except (msgspec.MsgspecError, KeyError, TypeError, ValueError):
        return None


def _to_dynamo(error: RequestError) -> Exception:
    """As :func:`dynamo_error`, for a front door: the workers' own codes, and 503 where no worker serves."""
    from dynamo.llm import HttpError
    from dynamo.llm.exceptions import CannotConnect

    mapped: Exception
    if isinstance(error, WorkerHttpError):
        mapped = HttpError(error.code, str(error))
    elif isinstance(error, Unreached):
        mapped = CannotConnect(str(error))
    elif isinstance(error, InvalidRequest | Unavailable):
        mapped = dynamo_error(error)
    else:
        mapped = HttpError(503, str(error))
    return mapped
