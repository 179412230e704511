"""The engine's KV events, fetched in a thread of their own. One consumer only: draining is destructive.

Two ways lead to them. Newer releases ask the engine's process by remote call, which waits without end if
that process is gone. Older ones (the 1.1 and 1.2 lines) keep a queue in ours. The first thread that needs the
queue makes it, and where that is the event loop's, only a coroutine can read it: so it is made here, before
any request.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from vswa_plugin.engine import EventSink

logger = logging.getLogger(__name__)

#: Pause after an empty answer, and how it grows while nothing comes.
MIN_PAUSE_S, MAX_PAUSE_S, GROWTH = 0.005, 0.020, 1.5
#: An answer that takes longer will not come: it is one iteration of the engine at most.
MAX_WAIT_S = 120.0
#: How long the last fetch may take at the end.
JOIN_S = 5.0
#: Failures in a row after which the events, and with them the engine, are given up.
MAX_FAILURES = 50


class EventPoller:
    """Fetches events from :meth:`start` to :meth:`stop` and hands them to ``sink`` by attention-DP rank.

    :param llm: TensorRT-LLM's ``LLM``.
    :param annotate: what is added to an event before it is handed over.
    :param fail: called once with the reason why the engine cannot go on.
    :ivar events: handed over so far.
    """

    def __init__(
        self,
        llm: Any,
        sink: EventSink,
        ranks: int,
        annotate: Callable[[dict[str, Any]], dict[str, Any]],
        fail: Callable[[str], None],
    ) -> None:
        self._llm = llm
        self._sink = sink
        self._ranks = ranks
        self._annotate = annotate
        self._fail = fail
        self.events = 0
        self._unplaced = 0
        self._failures = 0
        self._asked_at: float | None = None
        self._ready = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv events", daemon=True)

    def start(self) -> None:
        """Returns when requests may come."""
        self._thread.start()
        self._ready.wait()

    def stop(self) -> None:
        """Fetch what is there once more and end; a fetch that does not end is left behind. Called once."""
        self._stopping.set()
        self._thread.join(JOIN_S)
        if self._thread.is_alive():
            logger.warning("the last KV events have not come within %.0f s", JOIN_S)

    def overdue(self) -> str | None:
        """Why no more events will come, where an answer is overdue; else None. Any thread."""
        asked_at = self._asked_at
        if asked_at is None or time.monotonic() - asked_at < MAX_WAIT_S:
            return None
        return f"TensorRT-LLM has not answered for {MAX_WAIT_S:.0f} s when asked for KV events"

    def _run(self) -> None:
        try:
            try:
                _make_queue(self._llm)
            finally:
                self._ready.set()
            self._poll_until_stopped()
        except Exception as error:
            logger.exception("the thread that fetches KV events has ended")
            self._fail(f"the thread that fetches KV events has ended: {type(error).__name__}: {error}")

    def _poll_until_stopped(self) -> None:
        pause = MIN_PAUSE_S
        while not self._stopping.is_set():
            pause = MIN_PAUSE_S if self._poll() else min(pause * GROWTH, MAX_PAUSE_S)
            self._stopping.wait(pause)
        self._poll()

    def _poll(self) -> bool:
        """Hand over what is there; whether there was anything."""
        try:
            _wake(self._llm)
            self._asked_at = time.monotonic()
            # A timeout above 0 is spent in steps of 100 ms where a release waits in the engine's process.
            events = self._llm.get_kv_cache_events(timeout=0)
        except AssertionError:
            return False  # a release whose queue could not be made here has none before its first request
        except Exception as error:
            self._failed(error)
            return False
        finally:
            self._asked_at = None
        self._failures = 0
        by_rank: dict[int, list[dict[str, Any]]] = {}
        for event in events:
            by_rank.setdefault(event.get("attention_dp_rank") or 0, []).append(self._annotate(event))
        for rank, of_rank in by_rank.items():
            if rank < self._ranks:
                self._sink(rank, of_rank)
                self.events += len(of_rank)
            else:
                self._unplace(rank, len(of_rank))
        return bool(events)

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        if self._failures == 1:
            logger.warning("KV events cannot be fetched: %s: %s", type(error).__name__, error)
        if self._failures == MAX_FAILURES:
            self._fail(f"KV events cannot be fetched: {type(error).__name__}: {error}")

    def _unplace(self, rank: object, count: int) -> None:
        if not self._unplaced:
            logger.error(
                "expected KV events of attention-DP ranks below %d, got some of rank %s: they are dropped; "
                "does tensor_parallel_size say how many there are?",
                self._ranks,
                rank,
            )
        self._unplaced += count


def _make_queue(llm: Any) -> None:
    """Where events wait in our process: a queue that a thread can read, because no loop runs in this one."""
    executor = getattr(llm, "_executor", None)
    make = getattr(executor, "_maybe_initialize_iteration_results", None)
    if make is not None and getattr(executor, "_iter_kv_events_result", None) is None:
        make()


def _wake(llm: Any) -> None:
    """Releases with a queue stop giving out events after an empty answer, until the next request."""
    results = getattr(getattr(llm, "_executor", None), "_iter_kv_events_result", None)
    if results is not None and hasattr(results, "mark_undone"):
        results.mark_undone()
