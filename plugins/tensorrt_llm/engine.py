"""TensorRT-LLM's ``LLM`` with the shape of a worker's engine.

The model runs in processes of TensorRT-LLM's own. Requests are awaited on the worker's event loop; KV events
are fetched in a thread, see :mod:`.polling`, and another one watches that it lives, see :mod:`.health`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import threading
from collections.abc import AsyncGenerator
from typing import Any, NamedTuple

import msgspec

from vswa_plugin.blocks import TRTLLM_V1, TRTLLM_V2, CacheLayout, Memory, Pool, checked
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
    RequestError,
    Unavailable,
    VswaError,
    unknown_choice,
)

from . import handover, package
from .answer import Answer, faulty
from .health import HealthWatch, problem
from .lora import Adapter, Attribution
from .model_shape import load_shape
from .options import parse_options
from .package import Api
from .plan import make_plan
from .polling import EventPoller
from .request import Limits, TrtllmRequest, parse_request
from .rules import decide

logger = logging.getLogger(__name__)

#: How long TensorRT-LLM may take to end.
STOP_TIMEOUT_S = 60.0
#: What code raises that meets a value it was not written for: the fault of one result, not of the engine.
_CODE_FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)


class _Running(NamedTuple):
    """The engine once it has started."""

    api: Api
    llm: Any
    poller: EventPoller
    health: HealthWatch


class TensorRtLlmEngine:
    """One model behind TensorRT-LLM; has the shape of ``vswa_plugin.engine.Engine``.

    Built with local checks only and without importing tensorrt_llm; :meth:`start` does both.

    :raises ConfigError: package, mode, options or model directory cannot be used.
    """

    event_format = "trtllm"

    def __init__(self, settings: EngineSettings) -> None:
        version = package.require_installed()
        if settings.mode not in MODES:
            raise ConfigError(unknown_choice("mode", settings.mode, MODES))
        options = parse_options(settings.options, settings.options_source, settings.mode)
        has_weights = str(options.llm_args.get("load_format", "auto")).lower() != "dummy"
        shape = load_shape(settings.model_path, weights=has_weights)
        decision = decide(options, version, shape.architecture)
        plan = make_plan(options, shape, decision)
        layout = checked(CacheLayout(plan.groups, decision.rule, settings.served_model_name))
        self._mode = settings.mode
        self._model_path = settings.model_path
        self._llm_args = plan.llm_args
        self.info = EngineInfo(
            layout=layout,
            context_length=plan.context_length,
            max_num_seqs=options.max_batch_size,
            max_num_batched_tokens=options.max_num_tokens,
            # A guess until the engine has measured its memory.
            total_kv_blocks=-(-(options.max_tokens or 4 * plan.context_length) // layout.block_size),
            data_parallel_size=options.attention_dp_ranks,
            engine_version="" if version is None else str(version),
            engine=package.ENGINE,
            reason="" if settings.engine else package.default_reason(os.environ) or "",
            totals=frozenset({"requests", "prompt_tokens", "cached_tokens", "kv_events"}),
            memory=Memory(
                (),
                TRTLLM_V2 if decision.rule == "trtllm_v2" else TRTLLM_V1,
                options.max_num_tokens,
                options.max_batch_size,
            ),
        )
        self._limits = Limits(
            plan.context_length,
            None if options.chunked_prefill else options.max_num_tokens,
            shape.vocab_size,
            settings.mode,
            options.attention_dp_ranks,
        )
        adapters = {
            name: Adapter(name, number, path)
            for number, (name, path) in enumerate(sorted(options.lora_adapters.items()), 1)
        }
        self._attribution = Attribution(adapters, layout.block_size)
        self._running: _Running | None = None
        self._failure: str | None = None
        self._load = [0] * options.attention_dp_ranks
        self._totals = {"requests": 0, "prompt_tokens": 0, "cached_tokens": 0}
        self._aborting: set[asyncio.Task[None]] = set()
        for change in (*options.changes, *plan.changes):
            logger.info("TensorRT-LLM option set: %s", change)
        logger.info(
            "reuse rule %s (KV cache manager %s): %s",
            decision.rule,
            decision.manager,
            "; ".join(decision.reasons),
        )

    def start(self, on_events: EventSink) -> None:
        """Import TensorRT-LLM, load the model, begin to fetch KV events. Takes minutes. Called once.

        :raises ConfigError: the package cannot be imported, or does not take the options.
        :raises VswaError: it does not start for any other reason, such as a GPU without memory.
        """
        api = package.load()
        try:
            llm = api.LLM(model=self._model_path, **self._llm_args)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"TensorRT-LLM does not take these options: {error}") from error
        except (Exception, SystemExit) as error:  # of any code of its own, and of its processes
            reason = f"{type(error).__name__}: {error}"
            raise VswaError(f"TensorRT-LLM has not started: {reason}; its lines above say more") from error
        try:
            blocks = int(llm.get_kv_cache_capacity()["maxNumBlocks"])
            memory = self.info.memory
            if memory is not None and len(self.info.layout.groups) == 1:  # else it does not say which pool's
                pool = Pool((self.info.layout.groups[0].group_id,), blocks)
                memory = msgspec.structs.replace(memory, pools=(pool,))
            self.info = msgspec.structs.replace(self.info, total_kv_blocks=blocks, memory=memory)
        except Exception as error:  # not in every release; a remote call in others
            logger.info("the cache's size stays a guess: %s: %s", type(error).__name__, error)
        ranks = self.info.data_parallel_size
        poller = EventPoller(llm, on_events, ranks, self._attribution.annotate, self._fail)
        health = HealthWatch(llm, poller.overdue, self._fail)
        poller.start()
        health.start()
        self._running = _Running(api, llm, poller, health)

    def stop(self) -> None:
        """End all requests and TensorRT-LLM's processes; those that do not end in time are left behind."""
        running, self._running = self._running, None
        if running is None:
            return
        # A dead executor may never answer, and the worker has to exit all the same.
        ending = threading.Thread(target=_end, args=(running,), name="shutdown", daemon=True)
        ending.start()
        ending.join(STOP_TIMEOUT_S)
        if ending.is_alive():
            logger.error(
                "TensorRT-LLM has not ended within %.0f s; its processes may be left", STOP_TIMEOUT_S
            )

    async def generate(self, request: RequestDict) -> AsyncGenerator[ChunkDict, None]:
        """Run one request; see ``vswa_plugin.engine.Engine.generate``.

        :raises InvalidRequest: it can never be served; the message states what was expected.
        :raises Unavailable: the engine has not started, stops, has failed, or has given up this request.
        :raises RequestError: the engine's result of this request cannot be read.
        """
        running = self._running
        if self._failure is not None or running is None:
            raise Unavailable(self._failure or "the engine has not started, or stops")
        parsed = parse_request(request, self._limits)
        lora = self._adapter(parsed)
        params, cached = self._phase(running.api, parsed)
        rank = self._choose(parsed.dp_rank)
        self._attribution.note(parsed.prompt, lora, parsed.cache_salt)
        answer = Answer(len(parsed.prompt), prefill=self._mode == "prefill", cached_tokens=cached)
        result = self._submit(running, _arguments(running.api, parsed, params, lora, self._strict(rank)))
        self._load[rank] += 1
        first = {"dp_rank": rank, "transferred_tokens": len(parsed.prompt) if parsed.handover else 0}
        began = False
        try:
            async with contextlib.aclosing(self._states(running, result)) as states:
                async for state in states:
                    chunk = self._read(answer, state, parsed)
                    if chunk is None:
                        continue
                    yield chunk if began else {**chunk, WORKER_ONLY: first}
                    began = True
                    if answer.finished:
                        return
            raise Unavailable("TensorRT-LLM ended the request without a finish reason")
        finally:
            self._load[rank] -= 1
            if not answer.finished:
                self._abort(result, arrives=parsed.handover is not None and not began)

    def failure(self) -> str | None:
        """Why the engine cannot go on, or None."""
        return self._failure

    def stats(self) -> dict[str, float]:
        """Gauges and totals, cheap, from any thread.

        ``running`` requests, of each rank too where there are several; since the start ``requests``,
        ``prompt_tokens``, ``cached_tokens`` and ``kv_events``.
        """
        stats = {name: float(total) for name, total in self._totals.items()}
        stats["running"] = float(sum(self._load))
        stats["kv_events"] = float(self._running.poller.events if self._running else 0)
        if len(self._load) > 1:
            stats |= {f"running_rank_{rank}": float(load) for rank, load in enumerate(self._load)}
        return stats

    def _fail(self, reason: str) -> None:
        """From any thread."""
        if self._failure is None:
            self._failure = reason
            logger.error("the engine has failed: %s", reason)

    def _choose(self, dp_rank: int | None) -> int:
        """The rank that was named, else the one with the fewest requests, the lower one where two have."""
        return min(range(len(self._load)), key=self._load.__getitem__) if dp_rank is None else dp_rank

    def _strict(self, rank: int) -> int | None:
        """The rank that must serve the request: only there are the blocks that the router has counted."""
        return rank if len(self._load) > 1 else None

    def _adapter(self, request: TrtllmRequest) -> Adapter | None:
        if request.lora_name is None:
            return None
        adapter = self._attribution.adapters.get(request.lora_name)
        if adapter is None:
            known = self._attribution.adapters
            raise InvalidRequest(f"routing.lora_name: {unknown_choice('adapter', request.lora_name, known)}")
        return adapter

    def _phase(self, api: Api, request: TrtllmRequest) -> tuple[Any, int | None]:
        """``DisaggregatedParams`` where phases run apart, and what a prefill worker has reused."""
        if self._mode == "prefill":
            number = package.disagg_request_id(api)
            numbered = {} if number is None else {"disagg_request_id": number}
            return api.DisaggregatedParams(request_type="context_only", **numbered), None
        if request.handover is not None:
            params, cached = handover.unpack(api, request.handover)
            # The engine counts the whole transferred prompt as cached, which carries no information.
            return params, cached if cached is not None else request.prefill_cached_tokens or 0
        if self._mode == "decode":
            # Short prompts that Dynamo does not send to a prefill worker.
            return api.DisaggregatedParams(request_type="context_and_generation"), None
        return None, None

    def _submit(self, running: _Running, arguments: dict[str, Any]) -> Any:
        """TensorRT-LLM checks a request before it takes it: an error of that check is the request's fault.

        :raises InvalidRequest: it says so, and lives.
        :raises Unavailable: it takes none any more.
        """
        streaming = self._mode != "prefill"
        try:
            return running.llm.generate_async(streaming=streaming, **arguments)
        except Exception as error:
            refused = (TypeError, ValueError, NotImplementedError, running.api.RequestError)
            # An error from the background, of any type, is raised by the next request.
            wrong = problem(running.llm)
            if isinstance(error, refused) and wrong is None:
                raise InvalidRequest(f"TensorRT-LLM refuses the request: {error}") from error
            if isinstance(error, _CODE_FAULTS) and wrong is None:
                logger.exception("TensorRT-LLM has met a fault in one request; the engine goes on")
                what = f"{type(error).__name__}: {error}"
                raise RequestError(f"TensorRT-LLM could not take this request: {what}") from error
            self._fail(wrong or f"{type(error).__name__}: {error}")
            raise Unavailable(f"TensorRT-LLM takes no requests any more: {error}") from error

    async def _states(self, running: _Running, result: Any) -> AsyncGenerator[Any, None]:
        """The request's states; errors as those of a worker's engine."""
        try:
            async for state in result:
                yield state
        except running.api.RequestError as error:
            # It passed all checks: the engine is in trouble with it, and another worker may not be.
            raise Unavailable(f"TensorRT-LLM gave the request up: {error}") from error
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            wrong = problem(running.llm)
            if isinstance(error, _CODE_FAULTS) and wrong is None:
                logger.exception("TensorRT-LLM has met a fault in one result; the engine goes on")
                raise RequestError(f"TensorRT-LLM could not make a result of this request: {what}") from error
            self._fail(wrong or what)
            raise Unavailable(f"the engine has failed: {what}") from error

    def _read(self, answer: Answer, state: Any, request: TrtllmRequest) -> ChunkDict | None:
        """The chunk for one state.

        :raises RequestError: the state is not what a result is: it ends this request alone.
        """
        try:
            chunk = answer.chunk(state)
            if chunk is not None and answer.finished:
                self._finish(chunk, answer, state, request)
        except RequestError as error:
            if not isinstance(error, Unavailable):
                logger.error("%s", error)
            raise
        except Exception as error:  # a value whose own code fails
            logger.exception("a result of TensorRT-LLM cannot be read; the engine goes on")
            raise faulty(
                "a field", "a plain value", f"one that raises {type(error).__name__}: {error}"
            ) from error
        return chunk

    def _finish(self, chunk: ChunkDict, answer: Answer, state: Any, request: TrtllmRequest) -> None:
        cached = answer.cached_tokens(state)
        if self._mode == "prefill" and chunk["finish_reason"] == "length":
            params = getattr(state.outputs[0], "disaggregated_params", None)
            if params is None:
                raise Unavailable("expected disaggregated_params of a finished prefill, got none")
            if not dataclasses.is_dataclass(params):
                raise faulty("outputs[0].disaggregated_params", "DisaggregatedParams", params)
            chunk["disaggregated_params"] = handover.pack(params, cached)
        self._totals["requests"] += 1
        self._totals["prompt_tokens"] += len(request.prompt)
        self._totals["cached_tokens"] += cached

    def _abort(self, result: Any, *, arrives: bool) -> None:
        """Take the request back; while its blocks arrive from a prefill worker, once they are there."""
        if not arrives:
            _abort_now(result)
            return
        task = asyncio.get_running_loop().create_task(_abort_later(result), name="abort after transfer")
        self._aborting.add(task)
        task.add_done_callback(self._aborting.discard)


def _end(running: _Running) -> None:
    running.health.stop()
    running.poller.stop()
    try:
        running.llm.shutdown()
    except Exception:
        logger.exception("TensorRT-LLM has not ended as it should")


async def _abort_later(result: Any) -> None:
    with contextlib.suppress(Exception):
        async for _ in result:
            break
    _abort_now(result)


def _abort_now(result: Any) -> None:
    try:
        result.abort()
    except Exception as error:
        logger.warning("a request could not be taken back: %s: %s", type(error).__name__, error)


def _arguments(
    api: Api, request: TrtllmRequest, params: Any, lora: Adapter | None, rank: int | None
) -> dict[str, Any]:
    """Keyword arguments of ``generate_async``; those that are not needed are left out: releases differ."""
    sampling = dict(request.sampling)
    if request.guided is not None:
        sampling["guided_decoding"] = api.GuidedDecodingParams(**request.guided)
    arguments: dict[str, Any] = {
        "inputs": {"prompt_token_ids": request.prompt},
        "sampling_params": api.SamplingParams(**sampling),
        "disaggregated_params": params,
        "cache_salt": request.cache_salt,
        "priority": request.priority,
    }
    if lora is not None:
        arguments["lora_request"] = api.LoRARequest(lora.name, lora.number, lora.path)
    if rank is not None:
        arguments["scheduling_params"] = api.SchedulingParams(
            attention_dp_rank=rank, attention_dp_relax=False
        )
    return {name: value for name, value in arguments.items() if value is not None}
