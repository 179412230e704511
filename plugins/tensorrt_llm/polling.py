"""The engine's KV events, fetched in a thread of their own. One consumer only: draining is destructive."""

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
#: Between two looks at the engine's health.
HEALTH_INTERVAL_S = 1.0
#: Failures in a row after which the events, and with them the engine, are given up.
MAX_FAILURES = 50


class EventPoller:
    """Fetches events from :meth:`start` to :meth:`stop` and hands them to ``sink`` by attention-DP rank.

    :param llm: TensorRT-LLM's ``LLM``.
    :param annotate: what is added to an event before it is handed over.
    :param fail: told once why the engine cannot go on.
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
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv events", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Fetch what is there once more and end. Called once."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._poll_until_stopped()
        except Exception as error:
            logger.exception("the thread that fetches KV events has ended")
            self._fail(f"the thread that fetches KV events has ended: {type(error).__name__}: {error}")

    def _poll_until_stopped(self) -> None:
        pause, next_health = MIN_PAUSE_S, time.monotonic() + HEALTH_INTERVAL_S
        while not self._stopping.is_set():
            pause = MIN_PAUSE_S if self._poll() else min(pause * GROWTH, MAX_PAUSE_S)
            if time.monotonic() >= next_health:
                next_health = time.monotonic() + HEALTH_INTERVAL_S
                self._check_health()
            self._stopping.wait(pause)
        self._poll()

    def _poll(self) -> bool:
        """Hand over what is there; whether there was anything."""
        try:
            _wake(self._llm)
            # A timeout above 0 is spent in steps of 100 ms where a release waits in the engine's process.
            events = self._llm.get_kv_cache_events(timeout=0)
        except AssertionError:
            return False  # releases of the 1.2 line have no queue before their first request
        except Exception as error:
            self._failed(error)
            return False
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

    def _check_health(self) -> None:
        check = getattr(self._llm, "_check_health", None)
        if check is not None and not self._stopping.is_set() and not check():
            self._fail("TensorRT-LLM says that its executor is not healthy")


def _wake(llm: Any) -> None:
    """Releases of the 1.2 line stop giving out events after an empty answer, until the next request."""
    results = getattr(getattr(llm, "_executor", None), "_iter_kv_events_result", None)
    if results is not None and hasattr(results, "mark_undone"):
        results.mark_undone()
