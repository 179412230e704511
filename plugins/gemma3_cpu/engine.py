"""The embedded engine: a real Gemma 3 on the CPU that keeps its KV cache by TensorRT-LLM's rules.

One thread owns the model, the cache and the scheduler, and steps as long as there is work. Requests reach
it through an inbox; chunks go back to the event loop of each request with ``call_soon_threadsafe``. Nothing
that the event loop does waits for a step.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Sequence

import numpy as np
import numpy.typing as npt

from vswa_plugin.engine import (
    ChunkDict,
    EngineInfo,
    EngineSettings,
    EventSink,
    RawEvent,
    RequestDict,
)
from vswa_plugin.errors import ConfigError, Overloaded, Unavailable, VswaError
from vswa_plugin.layout import CacheLayout

from .blas import choose_threads, set_threads
from .cache import CacheManager, GroupSpec
from .config import Gemma3Config
from .model import Chunk, Gemma3Model, PagedKV, group_layers, load_model
from .options import EngineOptions, parse_options
from .pools import CachePlan, ModelShape, plan_cache
from .request import Limits, parse_request
from .scheduler import Budget, Generation, Output, Scheduler
from .source import find_model

logger = logging.getLogger(__name__)

RULE = "trtllm_v2"
_RANK = 0
_JOIN_TIMEOUT_S = 60.0


class Gemma3CpuEngine:
    """One model, one rank; has the shape of ``vswa_plugin.engine.Engine``.

    Built with local checks only; :meth:`start` loads the weights.

    :raises ConfigError: mode, options or model directory cannot be used.
    """

    event_format = "trtllm"

    def __init__(self, settings: EngineSettings) -> None:
        if settings.mode != "agg":
            raise ConfigError(
                f"mode {settings.mode!r}: gemma3_cpu serves agg only in this version; use --mode agg"
            )
        self._options = parse_options(settings.options, settings.options_source)
        self._source = find_model(settings.model_path)
        self._config = self._source.config
        self._plan = plan_cache(self._options, model_shape(self._config))
        groups = tuple(pool.group for pool in self._plan.pools)
        self.info = EngineInfo(
            layout=CacheLayout(groups, RULE, settings.served_model_name).check(),
            context_length=self._plan.context_length,
            max_num_seqs=self._options.max_batch_size,
            max_num_batched_tokens=self._options.max_num_tokens,
            total_kv_blocks=self._plan.total_kv_blocks,
            model_dir=self._source.converted_dir,
        )
        self._limits = _limits(self._config, self._plan)
        self._on_events: EventSink = _drop_events
        self._manager = make_manager(self._plan, self._options)
        self._scheduler: Scheduler | None = None
        self._thread: threading.Thread | None = None
        # Guards the inbox and the two reasons not to take requests; notified when the thread has to look.
        self._wake = threading.Condition()
        self._inbox: deque[Generation] = deque()
        self._failure: Exception | None = None
        self._stopping = threading.Event()
        self._log_options()

    def start(self, on_events: EventSink) -> None:
        """Load the weights, announce the cache groups, begin to step. Called once.

        :raises ConfigError: the weights do not fit the config.
        """
        threads = choose_threads(self._options.threads, self._config.hidden_size)
        if threads is not None:
            set_threads(threads)
        self._source.prepare()
        model = load_model(self._source.directory, self._config)
        self._on_events = on_events
        forward = PagedForward(model, self._plan)
        self._scheduler = Scheduler(forward, self._manager, make_budget(self._options), self._publish)
        self._publish(self._manager.flush_events())
        self._thread = threading.Thread(
            target=self._run, args=(self._scheduler,), name="gemma3_cpu", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Take no more requests, end the running ones as ``cancelled``, wait for the thread."""
        with self._wake:
            self._stopping.set()
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(_JOIN_TIMEOUT_S)
            if self._thread.is_alive():
                logger.warning("the engine thread is still in its step after %.0f s", _JOIN_TIMEOUT_S)

    async def generate(self, request: RequestDict) -> AsyncGenerator[ChunkDict, None]:
        """Run one request; see ``vswa_plugin.engine.Engine.generate``.

        A chunk holds the token of one step; a stop token is part of the answer. Closing the generator frees
        the request's blocks before the engine's next step.

        :raises InvalidRequest: it can never be served: the message says what was expected.
        :raises Overloaded: the queue is full.
        :raises Unavailable: the engine has not started, stops, or has failed.
        :raises RequestError: the engine failed while it ran this request.
        """
        parsed = parse_request(request, self._limits)
        self._manager.check_fits(len(parsed.prompt), parsed.max_new_tokens)
        outputs: asyncio.Queue[Output] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(output: Output) -> None:
            try:
                loop.call_soon_threadsafe(outputs.put_nowait, output)
            except RuntimeError:
                # The loop is closed: nobody is left to read.
                generation.cancelled = True

        generation = Generation(parsed, emit)
        self._submit(generation)
        try:
            while True:
                output = await outputs.get()
                if isinstance(output, Exception):
                    raise output
                yield output
                if "finish_reason" in output:
                    return
        finally:
            if not generation.finished:
                self._cancel(generation)

    def failure(self) -> str | None:
        """Why the engine cannot go on, or None."""
        error = self._failure
        return None if error is None else _describe(error)

    def stats(self) -> dict[str, float]:
        """Gauges and totals, cheap, from any thread.

        ``running`` and ``waiting`` count requests, ``blocks_<state>_<window>`` blocks; ``steps``,
        ``step_seconds``, ``prefill_tokens``, ``decode_tokens``, ``cached_tokens``, ``failed_steps`` and
        ``requests`` are totals since the start.
        """
        with self._wake:
            gauges = {"running": 0.0, "waiting": float(self._waiting())}
        scheduler = self._scheduler
        if scheduler is not None:
            gauges["running"] = float(len(scheduler.running))
            gauges.update(scheduler.counters.as_gauges())
        gauges.update(self._manager.stats())
        return gauges

    def _waiting(self) -> int:
        return len(self._inbox) + (len(self._scheduler.waiting) if self._scheduler else 0)

    def _submit(self, generation: Generation) -> None:
        with self._wake:
            if self._failure is not None:
                raise Unavailable(f"the engine has stopped after an error: {_describe(self._failure)}")
            if self._thread is None or self._stopping.is_set():
                raise Unavailable(f"the engine {'is stopping' if self._thread else 'has not started'}")
            waiting, limit = self._waiting(), self._options.max_queue_size
            if waiting >= limit:
                running = len(self._scheduler.running) if self._scheduler else 0
                raise Overloaded(
                    f"{waiting} requests wait and {running} run: the queue takes {limit} "
                    "(gemma3_cpu.max_queue_size); try again later"
                )
            self._inbox.append(generation)
            self._wake.notify()

    def _cancel(self, generation: Generation) -> None:
        generation.cancelled = True
        with self._wake:
            self._wake.notify()

    def _run(self, scheduler: Scheduler) -> None:
        """The engine thread."""
        try:
            while self._take_requests(scheduler):
                if self._stopping.wait(self._options.debug_step_delay_s):
                    break
                scheduler.step()
        except Exception as error:
            logger.exception("the engine cannot go on; all its requests end with an error")
            with self._wake:
                self._failure = error
        self._end_requests(scheduler)

    def _take_requests(self, scheduler: Scheduler) -> bool:
        """Wait for work and take over the inbox; False when the engine stops."""
        with self._wake:
            self._wake.wait_for(lambda: self._stopping.is_set() or self._inbox or scheduler.has_work)
            while self._inbox:
                scheduler.add(self._inbox.popleft())
        return not self._stopping.is_set()

    def _end_requests(self, scheduler: Scheduler) -> None:
        with self._wake:
            # After this nothing enters the inbox: _submit looks at both reasons under the same lock.
            while self._inbox:
                scheduler.add(self._inbox.popleft())
        error = (
            None if self._failure is None else Unavailable(f"the engine stopped: {_describe(self._failure)}")
        )
        scheduler.end_all(error)

    def _publish(self, events: Sequence[RawEvent]) -> None:
        if not events:
            return
        try:
            self._on_events(_RANK, events)
        except Exception:
            logger.exception("%d KV events are lost: the receiver raised, which it must not", len(events))

    def _log_options(self) -> None:
        for pool in self._plan.pools:
            logger.info("KV cache of window %s: %d blocks", pool.group.label, pool.num_blocks)
        if self._options.ignored:
            logger.info("options without effect in gemma3_cpu: %s", ", ".join(self._options.ignored))
        if not self._options.event_buffer_max_size:
            logger.warning(
                "kv_cache_config.event_buffer_max_size is 0: no KV events, routers see this worker as empty"
            )


class PagedForward:
    """The model with its page store. Where the cache merges windows of the model, they share page numbers."""

    def __init__(self, model: Gemma3Model, plan: CachePlan) -> None:
        self._model = model
        pool_of = {window: i for i, pool in enumerate(plan.pools) for window in pool.model_windows}
        #: Index of the cache group for each of the model's groups.
        self._groups = [pool_of[window] for window in model.config.groups]
        self._plain = self._groups == list(range(len(plan.pools)))
        blocks = [plan.pools[group].num_blocks for group in self._groups]
        block_size = plan.pools[0].group.block_size
        self._kv = PagedKV(model.config, group_layers(model.config), blocks, block_size)

    def __call__(self, chunks: list[Chunk], /) -> npt.NDArray[np.float32]:
        if not self._plain:
            chunks = [
                Chunk(c.token_ids, c.start, [c.tables[g] for g in self._groups], c.want_logits)
                for c in chunks
            ]
        return self._model.forward(chunks, self._kv)


def model_shape(config: Gemma3Config) -> ModelShape:
    """What of the model matters for its cache."""
    # Key and value, float32.
    bytes_per_token = 2 * 4 * config.num_key_value_heads * config.head_dim
    return ModelShape(config.windows(), config.max_position_embeddings, bytes_per_token)


def _limits(config: Gemma3Config, plan: CachePlan) -> Limits:
    held = [pool.num_blocks * pool.group.block_size for pool in plan.pools if pool.group.window_size is None]
    return Limits(
        context_length=plan.context_length,
        pool_tokens=min([plan.context_length, *held]),
        vocab_size=config.vocab_size,
        eos_ids=frozenset(config.eos_token_ids),
    )


def make_manager(plan: CachePlan, options: EngineOptions) -> CacheManager:
    """The cache manager for these pools."""
    groups = [GroupSpec(p.group.group_id, p.group.window_size, p.num_blocks) for p in plan.pools]
    return CacheManager(
        groups,
        options.tokens_per_block,
        plan.context_length,
        event_buffer_max_size=options.event_buffer_max_size,
        enable_block_reuse=options.enable_block_reuse,
        max_chunk_tokens=options.max_chunk_tokens,
    )


def make_budget(options: EngineOptions) -> Budget:
    """Bounds of one step."""
    return Budget(options.max_batch_size, options.max_num_tokens, options.max_chunk_tokens)


def _drop_events(dp_rank: int, events: Sequence[RawEvent]) -> None:
    """Stands in until ``start`` names the receiver."""


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, VswaError) else f"{type(error).__name__}: {error}"
