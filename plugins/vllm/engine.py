"""vLLM's ``AsyncLLM`` with the shape of a worker's engine.

The model runs in processes of vLLM's own. Requests are awaited on the worker's event loop; KV events are
received in a thread, see :mod:`.listening`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import AsyncGenerator
from typing import Any, NamedTuple

import msgspec

from vswa_plugin.blocks import CacheLayout
from vswa_plugin.engine import (
    MODES,
    WORKER_ONLY,
    ChunkDict,
    EngineInfo,
    EngineSettings,
    EventSink,
    RequestDict,
)
from vswa_plugin.errors import (
    ConfigError,
    InvalidRequest,
    Overloaded,
    Unavailable,
    unknown_choice,
)

from . import faults, model, package
from .adapter import FORMAT
from .answer import Answer
from .checks import LayoutCheck
from .grouping import layout_of, with_one_pool
from .handover import KEY
from .launching import compared, event_sockets, launch
from .listening import EventListener
from .numbers import TOTALS, TransferNumbers
from .options import parse_options
from .package import Api
from .request import Limits, VllmRequest, parse_request

logger = logging.getLogger(__name__)

#: How long vLLM may take to end.
STOP_TIMEOUT_S = 60.0
#: How long the requests that a stopping engine takes back may take to end.
ABORT_TIMEOUT_S = 5.0
#: Set unless they are: threads of Dynamo's runtime do not survive a fork, and nothing is reported home.
_ENVIRONMENT = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_NO_USAGE_STATS": "1"}


class _Running(NamedTuple):
    """The engine once it has started. ``directory`` is of its private sockets."""

    api: Api
    llm: Any
    listener: EventListener
    directory: str


class VllmEngine:
    """One model behind vLLM; has the shape of ``vswa_plugin.engine.Engine``.

    Built with local checks only and without importing vllm; :meth:`start` does both.

    :raises ConfigError: package, mode, options or model directory cannot be used.
    """

    event_format = FORMAT

    def __init__(self, settings: EngineSettings) -> None:
        version = package.installed_version()
        if settings.mode not in MODES:
            raise ConfigError(unknown_choice("mode", settings.mode, MODES))
        if settings.mode != "agg":
            package.require_nixl()
        names = package.option_names()
        options = parse_options(
            settings.options, settings.options_source, names, settings.data_parallel_size, settings.mode
        )
        shape = model.load_shape(settings.model_path, options.precision)
        layers = with_one_pool(shape.layers) if options.one_pool else shape.layers
        layout = layout_of(layers, options.block_size, settings.served_model_name).check()
        _check_mode(settings.mode, layout)
        context = options.max_model_len or shape.context_length
        if context is None:
            raise ConfigError(
                "max_model_len: expected a number of tokens, because the model's config.json has no "
                f"max_position_embeddings, got none (in {options.source})"
            )
        self._model_path = settings.model_path
        self._options = options
        self.info = EngineInfo(
            layout=layout,
            context_length=context,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            # A guess until the engine has measured its memory.
            total_kv_blocks=options.num_gpu_blocks or -(-4 * context // layout.block_size),
            data_parallel_size=options.ranks,
            engine_version=version,
            engine=package.ENGINE,
            totals=frozenset(
                {
                    "requests", "prompt_tokens", "cached_tokens", "kv_events", "kv_batches",
                    "kv_batches_repaired", "kv_batches_lost", *TOTALS,
                }
            ),
        )  # fmt: skip
        self._mode = settings.mode
        self._limits = Limits(
            context, shape.vocab_size, options.ranks, layout, options.priorities, settings.mode
        )
        self._numbers = None if settings.mode == "agg" else TransferNumbers(options.ranks)
        self._running: _Running | None = None
        self._listener: EventListener | None = None
        #: A worker may stop the engine while it starts in another thread.
        self._lock = threading.Lock()
        self._stopped = False
        self._failure: str | None = None
        self._load = [0] * options.ranks
        self._totals = {"requests": 0, "prompt_tokens": 0, "cached_tokens": 0}
        self._requests: set[str] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        for change in options.changes:
            logger.info("vLLM option set: %s", change)

    def start(self, on_events: EventSink) -> None:
        """Import vLLM, subscribe to its events, load the model. Takes minutes. Called once.

        :raises ConfigError: the package cannot be imported, does not take the options, or has made other
            cache groups than were declared.
        :raises Unavailable: it has ended while it started, or was stopped.
        """
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        api = package.load()
        directory = tempfile.mkdtemp(prefix="vswa-vllm-")
        try:
            sockets = event_sockets(self._options, directory)
            listener = EventListener(
                [sockets.of_rank(rank) for rank in range(self._options.ranks)],
                on_events,
                LayoutCheck(self.info.layout).contradiction,
                self._contradicted,
            )
            listener.start()
            try:
                groups = len(self.info.layout.groups)
                llm = launch(api, self._model_path, self._options, sockets, groups, self._numbers)
            except BaseException:
                listener.stop(look=False)
                raise
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        running = _Running(api, llm, listener, directory)
        self._listener = listener
        with self._lock:
            self._running = None if self._stopped else running
        if self._running is None:
            _end(running, healthy=True)
            raise Unavailable("the engine was stopped while it started")
        listener.published()
        self.info = compared(self.info, llm.vllm_config, self._options)
        self._limits = msgspec.structs.replace(self._limits, context_length=self.info.context_length)

    def stop(self) -> None:
        """End all requests and vLLM's processes; those that do not end in time are left behind."""
        with self._lock:
            running, self._running, self._stopped = self._running, None, True
        if running is None:
            return
        self._take_back(running)
        # A dead engine may never answer, and the worker has to exit all the same.
        ending = threading.Thread(
            target=_end,
            args=(running,),
            kwargs={"healthy": self._failure is None},
            name="shutdown",
            daemon=True,
        )
        ending.start()
        ending.join(STOP_TIMEOUT_S)
        if ending.is_alive():
            logger.error("vLLM has not ended within %.0f s; its processes may be left", STOP_TIMEOUT_S)

    async def generate(self, request: RequestDict) -> AsyncGenerator[ChunkDict, None]:
        """Run one request; see ``vswa_plugin.engine.Engine.generate``.

        :raises InvalidRequest: it can never be served; the message states what was expected.
        :raises Overloaded: vLLM's own limits of its queue are reached.
        :raises Unavailable: the engine has not started, stops, has failed, or has given up this request.
        :raises RequestError: the engine has failed on this request alone.
        """
        running = self._running
        if running is None or self.failure() is not None:
            raise Unavailable(self._failure or "the engine has not started, or stops")
        parsed = parse_request(request, self._limits)
        rank = self._choose(parsed.dp_rank)
        number = uuid.uuid4().hex
        arguments = self._arguments(running.api, parsed, rank)
        arrives = parsed.cached_tokens is not None
        answer = Answer(
            len(parsed.prompt),
            parsed.sampling.get("logprobs"),
            prefill=self._mode == "prefill",
            cached_tokens=parsed.cached_tokens,
        )
        first: ChunkDict = {
            WORKER_ONLY: {"dp_rank": rank, "transferred_tokens": len(parsed.prompt) if arrives else 0}
        }
        self._loop = asyncio.get_running_loop()
        self._load[rank] += 1
        self._requests.add(number)
        try:
            async with contextlib.aclosing(self._outputs(running, number, arguments)) as outputs:
                async for output in outputs:
                    chunk = answer.chunk(output)
                    if self._running is None:
                        raise Unavailable("the engine stops")
                    if chunk is None:
                        continue
                    if answer.finished:
                        self._count(answer, parsed)
                    yield {**chunk, **first} if first else chunk
                    first = {}
                    if answer.finished:
                        return
            raise Unavailable("vLLM ended the request without a finish reason")
        finally:
            self._load[rank] -= 1
            self._requests.discard(number)
            if not answer.finished:
                await _abort(running, number)

    def failure(self) -> str | None:
        """Why the engine cannot go on, or None."""
        running = self._running
        if self._failure is None and running is not None and running.llm.errored:
            self._fail(f"vLLM's engine core has ended: {faults.ending(running.llm)}")
        return self._failure

    def stats(self) -> dict[str, float]:
        """Gauges and totals, cheap, from any thread.

        ``running`` requests, of each rank too where there are several; since the start ``requests``,
        ``prompt_tokens``, ``cached_tokens``, ``kv_events`` and ``kv_batches``, of these those that were asked
        for again (``kv_batches_repaired``), and those that never came (``kv_batches_lost``). In modes
        ``prefill`` and ``decode`` ``blocks_used`` too, and since the start what the connector says: of a
        decode worker ``transfers``, ``transfer_bytes``, ``transfer_seconds`` and ``transfer_failures``, of a
        prefill worker ``transfers_expired``.
        """
        stats = {name: float(total) for name, total in self._totals.items()}
        stats["running"] = float(sum(self._load))
        listener = self._listener
        stats["kv_events"] = float(listener.events if listener else 0)
        stats["kv_batches"] = float(listener.batches if listener else 0)
        stats["kv_batches_repaired"] = float(listener.repaired_batches if listener else 0)
        stats["kv_batches_lost"] = float(listener.lost_batches if listener else 0)
        if self._numbers is not None:
            stats |= self._numbers.stats(self.info.total_kv_blocks)
        if len(self._load) > 1:
            stats |= {f"running_rank_{rank}": float(load) for rank, load in enumerate(self._load)}
        return stats

    def _fail(self, reason: str) -> None:
        """From any thread."""
        if self._failure is None:
            self._failure = reason
            logger.error("the engine has failed: %s", reason)

    def _contradicted(self, reason: str) -> None:
        self._fail(f"vLLM's events contradict the layout of the model's config.json: {reason}")

    def _choose(self, dp_rank: int | None) -> int:
        """The rank that was named, else the one with the fewest requests, the lower one where two have."""
        return min(range(len(self._load)), key=self._load.__getitem__) if dp_rank is None else dp_rank

    def _count(self, answer: Answer, request: VllmRequest) -> None:
        self._totals["requests"] += 1
        self._totals["prompt_tokens"] += len(request.prompt)
        self._totals["cached_tokens"] += answer.cached_tokens

    def _arguments(self, api: Api, request: VllmRequest, rank: int) -> dict[str, Any]:
        """Keyword arguments of ``AsyncLLM.generate``, but for the request's number.

        :raises InvalidRequest: vLLM does not take a parameter, or there is no such adapter.
        """
        prompt: dict[str, Any] = {"type": "token", "prompt_token_ids": request.prompt}
        if request.cache_salt is not None:
            prompt["cache_salt"] = request.cache_salt
        sampling = dict(request.sampling)
        try:
            if request.guided is not None:
                sampling["structured_outputs"] = api.StructuredOutputsParams(**request.guided)
            if request.transfer is not None:
                sampling["extra_args"] = {KEY: request.transfer}
            params = api.SamplingParams(output_kind=api.RequestOutputKind.DELTA, **sampling)
        except (*faults.REFUSED, api.ClientError) as error:
            raise faults.refusal(error) from error
        arguments: dict[str, Any] = {"prompt": prompt, "sampling_params": params}
        if request.priority:
            arguments["priority"] = request.priority
        if request.lora_name is not None:
            arguments["lora_request"] = self._adapter(api, request.lora_name)
        if len(self._load) > 1:
            arguments["data_parallel_rank"] = rank
        return arguments

    def _adapter(self, api: Api, name: str) -> Any:
        adapters = sorted(self._options.lora_adapters)
        if name not in adapters:
            raise InvalidRequest(f"routing.lora_name: {unknown_choice('adapter', name, adapters)}")
        return api.LoRARequest(name, adapters.index(name) + 1, self._options.lora_adapters[name])

    async def _outputs(
        self, running: _Running, number: str, arguments: dict[str, Any]
    ) -> AsyncGenerator[Any, None]:
        """The request's outputs; errors as those of a worker's engine."""
        api = running.api
        try:
            outputs = running.llm.generate(request_id=number, **arguments)
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    yield output
        except api.EngineDeadError as error:
            reason = self.failure() or f"vLLM's engine core has ended: {error}"
            raise Unavailable(reason) from error
        except api.GracefulHTTPError as error:
            raise Overloaded(f"vLLM takes no request now: {error}") from error
        except api.GenerationError as error:
            raise Unavailable(f"vLLM has given up the request: {error}") from error
        except api.EngineGenerateError as error:
            raise faults.fault(error.__cause__ or error, api) from error
        except (*faults.REFUSED, api.ClientError) as error:
            raise faults.refusal(error) from error

    def _take_back(self, running: _Running) -> None:
        """End the requests under way: vLLM would leave them waiting for ever."""
        loop = self._loop
        if loop is None or loop.is_closed() or not self._requests:
            return
        ended = asyncio.run_coroutine_threadsafe(running.llm.abort(list(self._requests)), loop)
        try:
            ended.result(ABORT_TIMEOUT_S)
        except Exception as error:
            logger.warning("requests could not be taken back: %s: %s", type(error).__name__, error)


async def _abort(running: _Running, number: str) -> None:
    """Take the request back, also where it was cancelled while vLLM took it in."""
    try:
        await running.llm.abort(number)
    except Exception as error:
        logger.warning("a request could not be taken back: %s: %s", type(error).__name__, error)


def _check_mode(mode: str, layout: CacheLayout) -> None:
    """:raises ConfigError: blocks of such groups were never handed over from one worker to another."""
    if mode != "agg" and not layout.plain:
        shown = ", ".join(f"{group.label} of {group.block_size} tokens" for group in layout.groups)
        raise ConfigError(
            f"--mode {mode}: expected a model whose cache groups have blocks of one size, and no states, got "
            f"{shown}; use --mode agg"
        )


def _end(running: _Running, *, healthy: bool) -> None:
    running.listener.stop(look=healthy)
    try:
        running.llm.shutdown()
    except Exception:
        logger.exception("vLLM has not ended as it should")
    shutil.rmtree(running.directory, ignore_errors=True)
