"""One data-parallel rank: a cache and a scheduler of its own, and the thread that steps them."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from vswa_plugin.errors import Overloaded, Unavailable, VswaError

from ..cache.api import CacheManager
from ..model.model import Chunk, Gemma3Model
from .generation import Generation
from .options import EngineOptions
from .pages import PageStore
from .pools import CachePlan
from .scheduler import Budget, Scheduler

logger = logging.getLogger(__name__)

_JOIN_TIMEOUT_S = 60.0


class PagedForward:
    """The model over one rank's pages. Windows of the model that the cache merges share page numbers."""

    def __init__(self, model: Gemma3Model, plan: CachePlan, store: PageStore) -> None:
        self._model = model
        self._store = store
        pool_of = {window: i for i, pool in enumerate(plan.pools) for window in pool.model_windows}
        #: Index of the cache group for each of the model's groups.
        self._groups = [pool_of[window] for window in model.config.groups]
        self._plain = self._groups == list(range(len(plan.pools)))

    def __call__(self, chunks: list[Chunk], /) -> npt.NDArray[np.float32]:
        if not self._plain:
            chunks = [
                Chunk(c.token_ids, c.start, [c.tables[g] for g in self._groups], c.want_logits)
                for c in chunks
            ]
        return self._model.forward(chunks, self._store)


class EngineRank:
    """Requests go in through an inbox; one thread steps as long as there is work.

    :ivar failure: why it cannot go on, or None.
    """

    def __init__(self, dp_rank: int, manager: CacheManager, store: PageStore, options: EngineOptions) -> None:
        self.dp_rank = dp_rank
        self.manager = manager
        self.store = store
        self.failure: Exception | None = None
        self._options = options
        self._scheduler: Scheduler | None = None
        self._thread: threading.Thread | None = None
        # Guards inbox, posted actions and the two reasons not to take requests.
        self._wake = threading.Condition()
        self._inbox: deque[Generation] = deque()
        self._posted: deque[Callable[[], None]] = deque()
        #: Something has happened since the last step that may let it do more than that one.
        self._notified = False
        self._stopping = threading.Event()

    @property
    def load(self) -> int:
        """Requests that wait or run."""
        scheduler = self._scheduler
        return self._waiting() + (scheduler.in_cache if scheduler is not None else 0)

    def start(self, scheduler: Scheduler) -> None:
        """Begin to step. Called once."""
        self._scheduler = scheduler
        self._thread = threading.Thread(
            target=self._run, args=(scheduler,), name=f"gemma3_cpu-{self.dp_rank}", daemon=True
        )
        self._thread.start()

    def ask_to_stop(self) -> None:
        """Take no more requests and end the running ones as ``cancelled``, after the step under way."""
        with self._wake:
            self._stopping.set()
            self._wake.notify()

    def join(self) -> None:
        """Wait for the thread."""
        if self._thread is not None:
            self._thread.join(_JOIN_TIMEOUT_S)
            if self._thread.is_alive():
                logger.warning("%s is still in its step after %.0f s", self._thread.name, _JOIN_TIMEOUT_S)

    def submit(self, generation: Generation) -> None:
        """Put a request into the inbox.

        :raises Overloaded: the queue is full.
        :raises Unavailable: not started, stopping, or failed.
        """
        with self._wake:
            if self.failure is not None:
                raise Unavailable(f"the engine has stopped after an error: {describe(self.failure)}")
            if self._thread is None or self._stopping.is_set():
                raise Unavailable(f"the engine {'is stopping' if self._thread else 'has not started'}")
            waiting, limit = self._waiting(), self._options.max_queue_size
            if waiting >= limit:
                running = self._scheduler.in_cache if self._scheduler else 0
                raise Overloaded(
                    f"{waiting} requests wait and {running} run: the queue takes {limit} "
                    "(gemma3_cpu.max_queue_size); try again later"
                )
            self._inbox.append(generation)
            self._notify()

    def cancel(self, generation: Generation) -> None:
        """Free a request's blocks before the next step."""
        with self._wake:
            generation.cancelled = True
            self._notify()

    def post(self, action: Callable[[], None]) -> None:
        """Run ``action`` on the rank's thread before its next step; from any thread."""
        with self._wake:
            self._posted.append(action)
            self._notify()

    def stats(self) -> dict[str, float]:
        """Gauges and totals by name, from any thread."""
        with self._wake:
            gauges = {"running": 0.0, "waiting": float(self._waiting())}
        scheduler = self._scheduler
        if scheduler is not None:
            gauges["running"] = float(scheduler.in_cache)
            gauges |= scheduler.stats()
        return gauges | self.manager.stats()

    def _notify(self) -> None:
        self._notified = True
        self._wake.notify()

    def _waiting(self) -> int:
        return len(self._inbox) + (len(self._scheduler.waiting) if self._scheduler else 0)

    def _run(self, scheduler: Scheduler) -> None:
        """The rank's thread."""
        try:
            more = True
            while self._take(scheduler, more):
                if self._stopping.wait(self._options.debug_step_delay_s):
                    break
                more = scheduler.step()
        except Exception as error:
            logger.exception("the engine cannot go on; all its requests end with an error")
            with self._wake:
                self.failure = error
        self._end_requests(scheduler)

    def _take(self, scheduler: Scheduler, more: bool) -> bool:
        """Wait for something to do, or for the time to try again, and take it over; False at the end.

        :param more: the last step did something, so that the next may.
        """
        with self._wake:
            self._wake.wait_for(
                lambda: self._stopping.is_set() or self._notified or (more and scheduler.has_work),
                scheduler.retry_s,
            )
            self._notified = False
            posted, self._posted = self._posted, deque()
            while self._inbox:
                scheduler.add(self._inbox.popleft())
        for action in posted:
            action()
        return not self._stopping.is_set()

    def _end_requests(self, scheduler: Scheduler) -> None:
        with self._wake:
            # After this nothing enters the inbox: submit looks at both reasons under the same lock.
            while self._inbox:
                scheduler.add(self._inbox.popleft())
        failure = self.failure
        scheduler.end_all(
            None if failure is None else Unavailable(f"the engine stopped: {describe(failure)}")
        )


def make_budget(options: EngineOptions) -> Budget:
    """Bounds of one step."""
    return Budget(options.max_batch_size, options.max_num_tokens, options.max_chunk_tokens)


def describe(error: Exception) -> str:
    """An error in one line."""
    return str(error) if isinstance(error, VswaError) else f"{type(error).__name__}: {error}"
