"""The embedded engine: a real Gemma 3 on the CPU that keeps its KV cache by TensorRT-LLM's rules.

The weights are shared by one or more ranks, each with a cache, a scheduler and a thread of its own. Requests
reach a rank through its inbox; chunks go back to the event loop of each request with
``call_soon_threadsafe``. Nothing that the event loop does waits for a step.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import partial
from typing import Any

from vswa_plugin import __version__
from vswa_plugin.blocks import CacheLayout, Memory, checked
from vswa_plugin.engine import (
    MODES,
    WORKER_ONLY,
    ChunkDict,
    EngineInfo,
    EngineSettings,
    EventSink,
    RawEvent,
    RequestDict,
)
from vswa_plugin.errors import ConfigError, Unavailable, unknown_choice

from ..model.blas import choose_threads, set_threads
from ..model.config import Gemma3Config
from ..model.model import Gemma3Model
from ..name import NAME
from ..transfer.params import parse_params
from ..transfer.puller import Puller
from ..transfer.server import ServerOptions, TransferServer
from ..transfer.tickets import Outcome
from ..transfer.wire import Timeouts
from ..weights.source import find_model, load_model
from .contract import Contract
from .disagg import FetchedPrompts, KeptPrompts
from .generation import Generation, Output
from .guided import Grammars
from .managers import make_manager, shared_pools
from .options import parse_options
from .pages import PageStore
from .pools import CachePlan, model_shape, plan_cache
from .rank import EngineRank, PagedForward, describe, make_budget
from .request import Limits, parse_request
from .scheduler import Counters, Scheduler

logger = logging.getLogger(__name__)

#: What of :meth:`Gemma3CpuEngine.stats` only grows.
TOTALS = frozenset(Counters.__slots__) | {
    "kv_events_dropped",
    "transfers",
    "transfer_bytes",
    "transfer_failures",
    "transfer_seconds",
    "transfers_expired",
    "transfers_released",
    "transfers_displaced",
}


class Gemma3CpuEngine:
    """One model and its ranks; has the shape of ``vswa_plugin.engine.Engine``.

    Built with local checks only; :meth:`start` loads the weights.

    :raises ConfigError: mode, options or model directory cannot be used.
    """

    event_format = "trtllm"

    def __init__(self, settings: EngineSettings) -> None:
        if settings.mode not in MODES:
            raise ConfigError(unknown_choice("mode", settings.mode, MODES))
        self._mode = settings.mode
        self._options = parse_options(settings.options, settings.options_source)
        self._source = find_model(settings.model_path)
        self._config = self._source.config
        self._plan = plan_cache(self._options, model_shape(self._config))
        groups = tuple(pool.group for pool in self._plan.pools)
        self.info = EngineInfo(
            layout=checked(CacheLayout(groups, self._options.reuse_rule, settings.served_model_name)),
            context_length=self._plan.context_length,
            max_num_seqs=self._options.max_batch_size,
            max_num_batched_tokens=self._options.max_num_tokens,
            total_kv_blocks=self._plan.total_kv_blocks,
            data_parallel_size=_rank_count(settings),
            model_dir=self._source.converted_dir,
            engine_version=__version__,  # it comes with this package
            engine=NAME,
            reason="" if settings.engine else "no engine was named, and this one needs no GPU",
            totals=TOTALS,
            memory=self._memory(),
        )
        self._limits = _limits(self._config, self._plan, self._mode, self.info.data_parallel_size)
        self._grammars = Grammars(
            self._source.directory / "tokenizer.json", self._config.vocab_size, self._limits.eos_ids
        )
        self._ranks = [self._make_rank(number) for number in range(self.info.data_parallel_size)]
        self._on_events: EventSink = _drop_events
        self._server: TransferServer | None = None
        self._puller: Puller | None = None
        self._log_options()

    def _memory(self) -> Memory:
        return self._plan.memory(
            self._options.reuse_rule, self._options.max_num_tokens, self._options.max_batch_size
        )

    def start(self, on_events: EventSink) -> None:
        """Load the weights, announce the cache groups, begin to step. Called once.

        :raises ConfigError: the weights do not fit the config, or the transfer's address cannot be used.
        """
        threads = choose_threads(self._options.threads, self._config.hidden_size)
        if threads is not None:
            set_threads(threads)
        self._source.prepare()
        model = load_model(self._source.directory, self._config)
        self._on_events = on_events
        self._start_transfers()
        for rank in self._ranks:
            self._publish(rank.dp_rank, rank.manager.flush_events())
            rank.start(self._make_scheduler(rank, model))

    def stop(self) -> None:
        """Take no more requests, end the running ones as ``cancelled``, wait for all threads."""
        for rank in self._ranks:
            rank.ask_to_stop()
        for rank in self._ranks:
            rank.join()
        # Behind the ranks: until they have ended a finished prompt may still be offered.
        if self._server is not None:
            self._server.stop()
        if self._puller is not None:
            self._puller.stop()

    async def generate(self, request: RequestDict) -> AsyncGenerator[ChunkDict, None]:
        """Run one request; see ``vswa_plugin.engine.Engine.generate``.

        A chunk holds the token of one step; a stop token is part of the answer. Closing the generator frees
        the request's blocks before the engine's next step.

        :raises InvalidRequest: it can never be served; the message states what was expected.
        :raises Overloaded: the queue is full.
        :raises Unavailable: the engine has not started, stops, or has failed.
        :raises RequestError: the engine failed while it ran this request.
        """
        parsed = parse_request(request, self._limits)
        # In a thread: the first format has the tokenizer read, and a large schema takes long too.
        wanted = parsed.format
        guide = None if wanted is None else await asyncio.to_thread(self._grammars.guide, wanted)
        rank = self._choose(parsed.dp_rank)
        rank.manager.check_fits(len(parsed.prompt), parsed.max_new_tokens)
        outputs: asyncio.Queue[Output] = asyncio.Queue()
        loop, reader_gone = asyncio.get_running_loop(), False

        def deliver(output: Output) -> None:
            if reader_gone:
                self._take_back(output)
            else:
                outputs.put_nowait(output)

        def emit(output: Output) -> None:
            try:
                loop.call_soon_threadsafe(deliver, output)
            except RuntimeError:
                # The loop is closed: the answer has no reader any more.
                generation.cancelled = True

        generation = Generation(parsed, emit, guide)
        self._check_alive()
        rank.submit(generation)
        first = True
        try:
            while True:
                output = await outputs.get()
                if isinstance(output, Exception):
                    raise output
                yield output | {WORKER_ONLY: generation.for_worker(rank.dp_rank)} if first else output
                first = False
                if "finish_reason" in output:
                    return
        finally:
            reader_gone = True
            while not outputs.empty():
                self._take_back(outputs.get_nowait())
            if not generation.finished:
                rank.cancel(generation)

    def release(self, params: Mapping[str, Any]) -> bool:
        """See ``vswa_plugin.engine.PromptHolder``; a prompt that is being fetched stays until it has been.

        :raises InvalidRequest: not what a prefill worker of this engine hands over.
        """
        ticket = parse_params(params).ticket
        return self._server is not None and self._server.withdraw(ticket, Outcome.RELEASED)

    def _take_back(self, output: Output) -> None:
        """Nobody reads this: a prompt that was to be fetched with it will not be."""
        if isinstance(output, dict) and (params := output.get("disaggregated_params")) is not None:
            self.release(params)

    def failure(self) -> str | None:
        """Why the engine cannot go on, or None."""
        return next((describe(rank.failure) for rank in self._ranks if rank.failure is not None), None)

    def stats(self) -> dict[str, float]:
        """Gauges and totals of all ranks together, cheap, from any thread.

        ``running`` and ``waiting`` count requests, ``blocks_<state>_<window>`` blocks; ``steps``,
        ``step_seconds``, ``prefill_tokens``, ``decode_tokens``, ``cached_tokens``, ``failed_steps`` and
        ``requests`` are totals since the start. Where phases run apart, see :class:`.disagg.TransferCounters`
        and ``decode_cached_tokens``, which a decode worker had of prompts that others computed. Where there
        are several ranks, each value is also there for each of them, as ``<name>_rank_<dp_rank>``.
        """
        by_rank = [rank.stats() for rank in self._ranks]
        totals: dict[str, float] = {}
        for stats in by_rank:
            for name, value in stats.items():
                totals[name] = totals.get(name, 0.0) + value
        if len(by_rank) > 1:
            for rank, stats in enumerate(by_rank):
                totals |= {f"{name}_rank_{rank}": value for name, value in stats.items()}
        return totals

    def _choose(self, dp_rank: int | None) -> EngineRank:
        """The rank that was named, else the one with the fewest requests, the lower one where two have."""
        if dp_rank is not None:
            return self._ranks[dp_rank]
        return min(self._ranks, key=lambda rank: (rank.load, rank.dp_rank))

    def _check_alive(self) -> None:
        failure = self.failure()
        if failure is not None:
            raise Unavailable(f"the engine has stopped after an error: {failure}")

    def _make_rank(self, number: int) -> EngineRank:
        plan, options = self._plan, self._options
        store = PageStore(self._config, plan, shared_pools(plan, options.reuse_rule))
        named = number if self.info.data_parallel_size > 1 else None
        return EngineRank(number, make_manager(plan, options, store.move, named), store, options)

    def _start_transfers(self) -> None:
        timeouts = Timeouts(total_s=self._options.transfer_timeout_s)
        if self._mode == "prefill":
            self._server = TransferServer(
                self._options.transfer_host,
                self._options.transfer_port,
                options=ServerOptions(timeouts=timeouts),
            )
            self._server.start()
            logger.info("finished prompts are handed over at %s port %d", *self._server.address)
        elif self._mode == "decode":
            self._puller = Puller(timeouts=timeouts)

    def _make_scheduler(self, rank: EngineRank, model: Gemma3Model) -> Scheduler:
        keeper, arrivals = None, None
        contract = Contract(self._config, self._plan, model.digest(), rank.store)
        if self._server is not None:
            keeper = KeptPrompts(
                self._server,
                contract,
                rank.post,
                rank.dp_rank,
                self._options.transfer_timeout_s,
                self._options.transfer_patience_s,
            )
        if self._puller is not None:
            arrivals = FetchedPrompts(self._puller, contract, rank.post)
        return Scheduler(
            PagedForward(model, self._plan, rank.store),
            rank.manager,
            make_budget(self._options),
            partial(self._publish, rank.dp_rank),
            keeper=keeper,
            arrivals=arrivals,
        )

    def _publish(self, dp_rank: int, events: Sequence[RawEvent]) -> None:
        if not events:
            return
        try:
            self._on_events(dp_rank, events)
        except Exception:
            logger.exception("%d KV events are lost: the receiver raised, which it must not", len(events))

    def _log_options(self) -> None:
        for pool in self._plan.pools:
            logger.info("KV cache of window %s: %d blocks", pool.group.label, pool.num_blocks)
            if pool.host_blocks:
                logger.info("and on the host: %d blocks", pool.host_blocks)
        if self._options.ignored:
            logger.info("options without effect in gemma3_cpu: %s", ", ".join(self._options.ignored))
        if not self._options.event_buffer_max_size:
            logger.warning(
                "kv_cache_config.event_buffer_max_size is 0: no KV events, routers see this worker as empty"
            )


def _rank_count(settings: EngineSettings) -> int:
    if settings.data_parallel_size < 1:
        raise ConfigError(
            f"--data-parallel-size: expected at least one rank, got {settings.data_parallel_size}"
        )
    return settings.data_parallel_size


def _limits(config: Gemma3Config, plan: CachePlan, mode: str, ranks: int) -> Limits:
    held = [pool.num_blocks * pool.group.block_size for pool in plan.pools if pool.group.window_size is None]
    return Limits(
        context_length=plan.context_length,
        pool_tokens=min([plan.context_length, *held]),
        vocab_size=config.vocab_size,
        eos_ids=frozenset(config.eos_token_ids),
        mode=mode,
        data_parallel_size=ranks,
    )


def _drop_events(dp_rank: int, events: Sequence[RawEvent]) -> None:
    """Stands in until ``start`` names the receiver."""
