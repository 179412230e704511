"""Everything that touches NVIDIA Dynamo. The only module that imports dynamo.

Dynamo's runtime is imported when it is first needed: the commands that do not talk to Dynamo start fast.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from vswa_plugin.engine import ChunkDict, EngineInfo, RequestDict
from vswa_plugin.errors import ConfigError, InvalidRequest, Overloaded, Unavailable, unknown_choice
from vswa_plugin.hashing import block_hash

logger = logging.getLogger(__name__)

#: What Dynamo reads its addresses from; ours are the same, so that one environment serves both.
NATS_ENV, ETCD_ENV = "NATS_SERVER", "ETCD_ENDPOINTS"
DEFAULT_ETCD = "http://127.0.0.1:2379"
#: Keeps every socket of Dynamo on this machine: for demos and tests.
LOOPBACK_ENV = {
    "DYN_TCP_RPC_HOST": "127.0.0.1",
    "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1",
    "DYN_EVENT_PLANE_HOST": "127.0.0.1",
    # The other one, ZeroMQ, listens on all addresses whatever the host above.
    "DYN_EVENT_PLANE": "nats",
    "DYN_SELF_HOST_METADATA": "0",
}
ROUTER_MODES = ("round-robin", "random", "kv", "direct")

#: (request, request id, future that is done when the client has gone) -> chunks
Handler = Callable[[RequestDict, str, Awaitable[bool]], AsyncIterator[ChunkDict]]


class EndpointName(msgspec.Struct, frozen=True):
    """``dyn://namespace.component.endpoint``."""

    namespace: str
    component: str
    endpoint: str

    @classmethod
    def parse(cls, text: str) -> EndpointName:
        parts = text.removeprefix("dyn://").split(".")
        if len(parts) != 3 or not all(parts):
            raise ConfigError(f"--endpoint: expected dyn://namespace.component.endpoint, got {text!r}")
        return cls(*parts)

    def __str__(self) -> str:
        return f"{self.namespace}.{self.component}.{self.endpoint}"


#: Where the workers of each mode stand within a namespace, as those of Dynamo's own backends do.
COMPONENTS = {"agg": "backend", "prefill": "prefill", "decode": "backend"}
#: The same for routers of ours.
ROUTER_COMPONENT = "router"


def default_endpoint(mode: str, namespace: str = "dynamo") -> EndpointName:
    """The endpoint of workers of ``mode`` that were given none."""
    return EndpointName(namespace, COMPONENTS[mode], "generate")


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


def run(main: Coroutine[Any, Any, int]) -> int:
    """Run ``main`` on uvloop, as Dynamo's own components do; its result is the exit code."""
    import uvloop

    code: int = uvloop.run(main)
    return code


def connect() -> Any:
    """Dynamo's distributed runtime on this event loop.

    Blocks the loop and retries for two minutes where etcd or NATS are away: probe them before.
    """
    from dynamo.runtime import DistributedRuntime

    discovery = os.environ.get("DYN_DISCOVERY_BACKEND", "etcd")
    request_plane = os.environ.get("DYN_REQUEST_PLANE", "tcp")
    return DistributedRuntime(asyncio.get_running_loop(), discovery, request_plane)


class WorkerEndpoint:
    """One served endpoint of this process, and the model that is registered on it."""

    def __init__(self, runtime: Any, name: EndpointName) -> None:
        self._runtime = runtime
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
            try:
                async for chunk in handler(request, context.id(), context.async_killed_or_stopped()):
                    yield chunk
            except (InvalidRequest, Overloaded, Unavailable) as error:
                raise _dynamo_error(error) from error

        async def serving() -> None:
            await self._endpoint.serve_endpoint(generate, graceful_shutdown=True)

        self._serving = asyncio.create_task(serving(), name="serve_endpoint")
        return self._serving

    async def register(
        self, model_path: str, served_model_name: str, info: EngineInfo, mode: str, taints: Iterable[str] = ()
    ) -> None:
        """Show the model to Dynamo's frontends, as a worker of ``mode``."""
        from dynamo.llm import ModelInput, ModelRuntimeConfig, register_model

        role = _role(mode)
        config = ModelRuntimeConfig()
        config.context_length = info.context_length
        config.total_kv_blocks = info.total_kv_blocks
        config.max_num_seqs = info.max_num_seqs
        config.max_num_batched_tokens = info.max_num_batched_tokens
        config.data_parallel_size = info.data_parallel_size
        config.taints = set(taints)
        await register_model(
            ModelInput.Tokens,
            role.model_type,
            self._endpoint,
            model_path,
            served_model_name,
            worker_type=role.worker_type,
            needs=role.needs,
            kv_cache_block_size=info.layout.block_size,
            runtime_config=config,
            ignore_weights=True,
        )

    async def withdraw(self) -> None:
        """Take endpoint, and model where it is shown, out of discovery; requests under way go on."""
        from dynamo.llm import unregister_model

        for step in (unregister_model(self._endpoint), self._endpoint.unregister_endpoint_instance()):
            try:
                await asyncio.wait_for(step, 5)
            except Exception as error:  # Dynamo raises plain Exception; its lease ends what is left
                logger.warning("could not leave Dynamo's discovery, its lease will end it: %s", error)

    async def shutdown(self) -> None:
        """End the runtime and the serving task."""
        self._runtime.shutdown()
        if self._serving is not None:
            await asyncio.wait({self._serving}, timeout=10)


class _Role(NamedTuple):
    """What Dynamo is told of a worker; ``needs``: sets of peers, of which it must find one to serve."""

    model_type: Any
    worker_type: Any
    needs: list[list[Any]] | None


def _role(mode: str) -> _Role:
    from dynamo.llm import ModelType, WorkerType

    text = ModelType.Chat | ModelType.Completions
    return {
        "agg": _Role(text, WorkerType.Aggregated, None),
        "prefill": _Role(ModelType.Prefill, WorkerType.Prefill, [[WorkerType.Decode]]),
        "decode": _Role(text, WorkerType.Decode, [[WorkerType.Prefill]]),
    }[mode]


def _dynamo_error(error: Exception) -> Exception:
    """The exception by which Dynamo's frontend answers rightly: 400, 503, or another worker."""
    from dynamo.llm import HttpError
    from dynamo.llm.exceptions import Disconnected, InvalidArgument

    if isinstance(error, InvalidRequest):
        mapped: Exception = InvalidArgument(str(error))
    elif isinstance(error, Overloaded):
        mapped = HttpError(503, str(error))
    else:  # the frontend migrates the request, where its --migration-limit allows
        mapped = Disconnected(str(error))
    return mapped


class FrontendSettings(msgspec.Struct, frozen=True):
    """Dynamo's OpenAI HTTP frontend."""

    http_host: str
    http_port: int
    router_mode: str = "round-robin"
    namespace: str | None = None
    migration_limit: int = 3


async def serve_frontend(runtime: Any, settings: FrontendSettings) -> None:
    """Run Dynamo's own frontend until the runtime is shut down. Models are found through discovery."""
    from dynamo.llm import EngineType, EntrypointArgs, RouterConfig, RouterMode, make_engine, run_input

    modes = {
        "round-robin": RouterMode.RoundRobin,
        "random": RouterMode.Random,
        "kv": RouterMode.KV,
        "direct": RouterMode.Direct,
    }
    if settings.router_mode not in modes:
        raise ConfigError(unknown_choice("router mode", settings.router_mode, modes))
    arguments = EntrypointArgs(
        EngineType.Dynamic,
        http_host=settings.http_host,
        http_port=settings.http_port,
        router_config=RouterConfig(modes[settings.router_mode]),
        namespace=settings.namespace,
        migration_limit=settings.migration_limit,
    )
    await run_input(runtime, "http", await make_engine(runtime, arguments))
