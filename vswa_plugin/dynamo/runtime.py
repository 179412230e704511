"""A worker behind NVIDIA Dynamo: its runtime, its endpoint, its hashes.

Dynamo's runtime is imported when it is first needed: the commands that do not talk to Dynamo start fast.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec

from vswa_plugin.blocks.hashing import block_hash
from vswa_plugin.dynamo.names import TOOL_CALL_PARSER, EndpointName
from vswa_plugin.dynamo.reports import log_reports
from vswa_plugin.engine.contract import ChunkDict, EngineInfo, RequestDict
from vswa_plugin.errors import (
    ConfigError,
    InvalidRequest,
    Overloaded,
    RequestError,
    Unavailable,
    VswaError,
    one_line,
    unknown_choice,
)
from vswa_plugin.tracing import REQUEST, RequestIds

logger = logging.getLogger(__name__)

#: The line of releases that this project was made for, and measured with: 1.6.0 and 1.6.1.
DYNAMO = (1, 6)
_DISTRIBUTION = "ai-dynamo-runtime"
_RELEASE = re.compile(r"(\d+)\.(\d+)\b")

#: In what Dynamo's runtime 1.6.1 says where a variable or an address is wrong, such as "Invalid request plane
#: mode: 'foo'". It raises plain Exception, whatever the reason.
_SETTING = re.compile(
    r"\b(?i:invalid)\b|Unknown key-value store|not available from file or environment|Validation error"
    r"|failed to infer config|already in use|Cannot assign requested address|Permission denied"
    r"|Failed to resolve configured"
)
#: Where an API server of Kubernetes has not taken what was written there.
_NOT_WRITTEN = re.compile("Failed to apply DynamoWorkerMetadata")
#: Between tries to show a model: one that took minutes to load is not given up for a hiccup.
SHOW_WAITS_S = (1.0, 2.0, 4.0, 8.0)
_OTHER_MODEL = re.compile(r"a different model '(.*)' is already registered there")

#: (request, request id, future that is done when the client has gone) -> chunks
Handler = Callable[[RequestDict, str, Awaitable[bool]], AsyncIterator[ChunkDict]]


def namespaced_block_hash(
    token_ids: Sequence[int], cache_salt: str | None = None, lora_name: str | None = None
) -> int:
    """Dynamo's block hash, of plain text or in the namespace of a cache salt or LoRA."""
    if not cache_salt and not lora_name:
        return block_hash(token_ids)
    from dynamo.llm import compute_block_hash_for_seq

    hashes: list[int] = compute_block_hash_for_seq(
        list(token_ids), len(token_ids), lora_name=lora_name or None, cache_namespace=cache_salt or None
    )
    return hashes[0]


def check_release(installed: str | None = None) -> None:
    """Refuse a release of Dynamo that this project was not made for.

    :param installed: the version of its runtime; by default of the package that is there.
    :raises ConfigError: names both, and the command that installs one that fits.
    """
    try:
        version = installed or importlib.metadata.version(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        version = "no such package"
    release = _RELEASE.match(version)
    if release is None or (int(release[1]), int(release[2])) != DYNAMO or version.startswith("1.6.0.dev"):
        raise ConfigError(
            f"{_DISTRIBUTION}: expected a release of 1.6 (1.6.0 or later, below 1.7), got "
            f"{one_line(version)}; pip install '{_DISTRIBUTION}>=1.6.0,<1.7'"
        )


def run_on_uvloop(main: Coroutine[Any, Any, int]) -> int:
    """Run ``main`` on uvloop, as Dynamo's own components do; its result is the exit code.

    :raises ConfigError: Dynamo's runtime is of a release that this project was not made for.
    """
    try:
        check_release()
    except ConfigError:
        main.close()
        raise
    import uvloop

    code: int = uvloop.run(main)
    return code


def connect(discovery: str | None = None, request_plane: str | None = None) -> Any:
    """Dynamo's distributed runtime on this event loop.

    Blocks the loop and retries for two minutes where etcd or NATS are away: probe them before.

    :param discovery: by default what DYN_DISCOVERY_BACKEND says; ``request_plane``: DYN_REQUEST_PLANE.
    :raises ConfigError: it refuses a variable; another VswaError: it cannot start.
    """
    from dynamo.runtime import DistributedRuntime

    discovery = discovery or os.environ.get("DYN_DISCOVERY_BACKEND", "etcd")
    request_plane = request_plane or os.environ.get("DYN_REQUEST_PLANE", "tcp")
    try:
        return DistributedRuntime(asyncio.get_running_loop(), discovery, request_plane)
    except Exception as error:  # Dynamo raises plain Exception
        raise runtime_error("Dynamo's runtime", error) from error


def runtime_error(what: str, error: Exception) -> VswaError:
    """What Dynamo's runtime has raised, as an error of ours: ConfigError where a setting is wrong."""
    reason = one_line(str(error) or type(error).__name__)
    if _SETTING.search(reason):
        return ConfigError(
            f"{what} refuses a setting (an option of this program, or a DYN_ variable): {reason}"
        )
    return VswaError(f"{what} has failed: {reason}")


def other_model(name: str, other: str, endpoint: EndpointName) -> ConfigError:
    """An endpoint has workers of one model: Dynamo's frontends choose among all of them."""
    return ConfigError(
        f"--served-model-name: expected {other!r}, which other workers show on {endpoint}, got {name!r}; "
        "give this worker that name, or an endpoint or namespace of its own (--endpoint, DYN_NAMESPACE)"
    )


def check_parser(option: str, name: str | None) -> str | None:
    """``name`` itself, where Dynamo's frontend has such a parser; raises ConfigError.

    :param option: :data:`TOOL_CALL_PARSER` or :data:`REASONING_PARSER`.
    """
    if name is None:
        return None
    from dynamo._core import get_reasoning_parser_names, get_tool_parser_names

    known = get_tool_parser_names() if option == TOOL_CALL_PARSER else get_reasoning_parser_names()
    if name not in known:
        raise ConfigError(f"{option}: {unknown_choice('parser', name, known)}")
    return name


class ShownModel(msgspec.Struct, frozen=True):
    """How a worker shows its model to Dynamo's frontends.

    :param model_path: directory with config and tokenizer.
    :param mode: of the worker: agg, prefill or decode.
    :param tool_call_parser: by which the frontend finds tool calls in the text; ``reasoning_parser``: the
        reasoning.
    :param chat: whether it is shown for chat too, or for completions alone.
    """

    name: str
    model_path: str
    mode: str
    chat: bool = True
    taints: tuple[str, ...] = ()
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None


class WorkerEndpoint:
    """One served endpoint of this process, and the model that is registered on it."""

    def __init__(self, runtime: Any, name: EndpointName) -> None:
        self._runtime = runtime
        self._name = name
        self._endpoint = runtime.endpoint(str(name))
        self._serving: asyncio.Task[None] | None = None

    @property
    def worker_id(self) -> int:
        """Dynamo's instance id: the number by which routers address this worker."""
        return int(self._endpoint.connection_id())

    @property
    def raw(self) -> Any:
        """Dynamo's own object, for plugins."""
        return self._endpoint

    def serve(self, handler: Handler) -> asyncio.Task[None]:
        """Serve requests in the returned task, which ends when the runtime does."""

        # Dynamo looks the parameters up by these names.
        async def generate(request: dict[str, Any], context: Any) -> AsyncIterator[ChunkDict]:
            ids = request_ids(context)
            REQUEST.set(ids)
            try:
                async for chunk in handler(request, ids.request_id, context.async_killed_or_stopped()):
                    yield chunk
                    REQUEST.set(ids)  # Dynamo asks for each chunk in a task of its own
            except Exception as error:
                raise dynamo_error(error) from None  # Dynamo prints the whole chain

        self._serving = asyncio.create_task(serve_endpoint(self._endpoint, generate), name="serve_endpoint")
        return self._serving

    async def register(self, model: ShownModel, info: EngineInfo) -> None:
        """Show the model to Dynamo's frontends.

        :raises ConfigError: the endpoint has workers of another model; another VswaError: Dynamo refuses it.
        """
        from dynamo.llm import ModelInput, ModelRuntimeConfig, register_model

        role = _role(model.mode, model.chat)
        config = ModelRuntimeConfig()
        config.context_length = info.context_length
        config.total_kv_blocks = info.total_kv_blocks
        config.max_num_seqs = info.max_num_seqs
        config.max_num_batched_tokens = info.max_num_batched_tokens
        config.data_parallel_size = info.data_parallel_size
        config.taints = set(model.taints)
        config.tool_call_parser = model.tool_call_parser
        config.reasoning_parser = model.reasoning_parser
        show = partial(
            register_model,
            ModelInput.Tokens,
            role.model_type,
            self._endpoint,
            model.model_path,
            model.name,
            worker_type=role.worker_type,
            needs=role.needs,
            kv_cache_block_size=info.layout.block_size,
            runtime_config=config,
            ignore_weights=True,
        )
        try:
            await _until_written(show)
        except Exception as error:  # Dynamo raises plain Exception
            if found := _OTHER_MODEL.search(str(error)):
                raise other_model(model.name, found[1], self._name) from error
            raise runtime_error(f"showing the model in {model.model_path} to Dynamo", error) from error

    async def withdraw(self) -> None:
        """Take endpoint, and model where it is shown, out of discovery; requests under way go on."""
        if self._serving is not None and self._serving.done():
            return  # the runtime has ended, and its lease with it
        await leave_discovery(self._endpoint, self._name)

    async def shutdown(self) -> None:
        """End the runtime and the serving task."""
        self._runtime.shutdown()
        if self._serving is not None:
            await asyncio.wait({self._serving}, timeout=10)


def request_ids(context: Any) -> RequestIds:
    """The ids of a request, out of Dynamo's context of it."""
    headers = context.trace_headers() or {}
    return RequestIds(str(context.id()), context.trace_id, context.span_id, headers.get("traceparent"))


async def serve_endpoint(endpoint: Any, generate: Callable[..., AsyncIterator[ChunkDict]]) -> None:
    """Serve requests with ``generate`` until the runtime ends. Raises what :func:`runtime_error` makes."""
    log_reports()
    try:
        await endpoint.serve_endpoint(generate, graceful_shutdown=True)
    except Exception as error:  # Dynamo raises plain Exception
        raise runtime_error("Dynamo's runtime", error) from error


async def _until_written(show: Callable[[], Awaitable[None]]) -> None:
    """Await ``show()``, again where Dynamo's discovery has not taken what it writes there.

    Raises what the last of the tries raises.
    """
    for wait in SHOW_WAITS_S:
        try:
            return await show()
        except Exception as error:  # Dynamo raises plain Exception
            if not _NOT_WRITTEN.search(str(error)):
                raise
            logger.warning("trying on in %g s: %s", wait, one_line(str(error)))
        await asyncio.sleep(wait)
    await show()


async def leave_discovery(endpoint: Any, name: EndpointName) -> None:
    """Take an endpoint, and the model on it, out of discovery. Never raises."""
    from dynamo.llm import unregister_model

    for step in (unregister_model(endpoint), endpoint.unregister_endpoint_instance()):
        try:
            async with asyncio.timeout(5):
                await step
        except Exception as error:  # Dynamo raises plain Exception
            logger.warning("%s: could not leave Dynamo's discovery, its lease will end it: %s", name, error)


class _Role(NamedTuple):
    """What a worker registers with Dynamo; ``needs``: sets of peers, of which it must find one to serve."""

    model_type: Any
    worker_type: Any
    needs: list[list[Any]] | None


def text_surfaces(chat: bool) -> Any:
    """Dynamo's ``ModelType`` of a model that is served for completions, and for chat where it can be."""
    from dynamo.llm import ModelType

    return ModelType.Chat | ModelType.Completions if chat else ModelType.Completions


def _role(mode: str, chat: bool) -> _Role:
    from dynamo.llm import ModelType, WorkerType

    text = text_surfaces(chat)
    return {
        "agg": _Role(text, WorkerType.Aggregated, None),
        "prefill": _Role(ModelType.Prefill, WorkerType.Prefill, [[WorkerType.Decode]]),
        "decode": _Role(text, WorkerType.Decode, [[WorkerType.Prefill]]),
    }[mode]


def dynamo_error(error: Exception) -> Exception:
    """The exception by which Dynamo's frontend does the right thing with a request that failed.

    InvalidRequest: 400 with our message. Overloaded: 503. Unavailable: the frontend goes on with it on
    another worker, as often as its --migration-limit allows, then 503. All else: 500. The frontend keeps the
    messages of 5xx to itself; workers log them.
    """
    from dynamo.llm import HttpError
    from dynamo.llm.exceptions import Disconnected, InvalidArgument

    message = str(error)
    mapped: Exception
    if isinstance(error, InvalidRequest):
        mapped = InvalidArgument(message)
    elif isinstance(error, Overloaded):
        mapped = HttpError(503, message)
    elif isinstance(error, Unavailable):
        mapped = Disconnected(message)
    elif isinstance(error, RequestError):
        mapped = HttpError(500, message)
    else:  # left alone, a ValueError out of an engine's bug would be the client's fault: 400
        mapped = HttpError(500, f"{type(error).__name__}: {message}")
    return mapped
