"""A few threads that pull, for an engine that must not wait."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

from vswa_plugin.errors import Unavailable

from .client import Cancellation, PullRequest, PullResult, pull
from .errors import TransferError
from .wire import Timeouts

logger = logging.getLogger(__name__)

#: Called once per pull: nothing is written any more.
Done: TypeAlias = Callable[[PullResult | TransferError], None]


class Pulling:
    """One pull that was started; a handle for :meth:`Puller.cancel`."""

    def __init__(self, request: PullRequest, done: Done) -> None:
        self.request = request
        self.done = done
        self.cancellation = Cancellation()
        self.future: Future[None] | None = None


class Puller:
    """Runs pulls side by side, at most ``max_concurrent``; the others wait in order.

    ``done`` is called exactly once per pull, from one of its threads, or from within :meth:`cancel` and
    :meth:`stop` for a pull that had not begun. Until then the pages belong to the pull.
    """

    def __init__(self, max_concurrent: int = 4, timeouts: Timeouts | None = None) -> None:
        self._timeouts = timeouts or Timeouts()
        self._executor = ThreadPoolExecutor(max_concurrent, thread_name_prefix="kv transfer pull")
        self._lock = threading.Lock()
        self._running: set[Pulling] = set()
        self._stopped = False

    def start(self, request: PullRequest, done: Done) -> Pulling:
        """Begin a pull; from any thread, returns at once.

        :raises Unavailable: stopped; ``done`` is not called.
        """
        pulling = Pulling(request, done)
        with self._lock:
            if self._stopped:
                raise Unavailable(
                    "KV transfer: expected a running puller, this one has stopped; try another worker"
                )
            self._running.add(pulling)
            pulling.future = self._executor.submit(self._run, pulling)
        return pulling

    def cancel(self, pulling: Pulling) -> None:
        """End a pull early; its ``done`` is called with a TransferError unless the pull was faster."""
        pulling.cancellation.cancel()
        if pulling.future is not None and pulling.future.cancel():
            self._finish(
                pulling, TransferError("cancelled", pulling.request.address, "cancelled before it began")
            )

    def stop(self) -> None:
        """Cancel all pulls and wait for their ends. Stopping twice does nothing."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        for pulling in running:
            self.cancel(pulling)
        self._executor.shutdown()

    def _run(self, pulling: Pulling) -> None:
        result: PullResult | TransferError
        try:
            result = pull(pulling.request, self._timeouts, pulling.cancellation)
        except TransferError as error:
            result = error
        except Exception as error:
            logger.exception("KV transfer: a pull failed in an unforeseen way")
            result = TransferError("bug", pulling.request.address, f"{type(error).__name__}: {error}")
        self._finish(pulling, result)

    def _finish(self, pulling: Pulling, result: PullResult | TransferError) -> None:
        with self._lock:
            if pulling not in self._running:
                return
            self._running.remove(pulling)
        try:
            pulling.done(result)
        except Exception:
            logger.exception("the callback of a pull failed; its request may never go on")
