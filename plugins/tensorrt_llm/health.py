"""Whether TensorRT-LLM is still alive, watched in a thread of its own.

The thread that fetches events may wait for a dead executor without end, so it cannot watch it as well.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

#: Between two looks.
INTERVAL_S = 1.0
#: How long the thread may take to end, which a look that hangs prevents.
JOIN_S = 5.0


class HealthWatch:
    """Looks at ``llm`` from :meth:`start` to :meth:`stop`.

    :param also: more that may be wrong; None where nothing is.
    :param fail: called once with the reason why the engine cannot go on.
    """

    def __init__(self, llm: Any, also: Callable[[], str | None], fail: Callable[[str], None]) -> None:
        self._llm = llm
        self._also = also
        self._fail = fail
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine health", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Called once, before the engine is told to end: what is looked at changes then."""
        self._stopping.set()
        self._thread.join(JOIN_S)

    def _run(self) -> None:
        while not self._stopping.wait(INTERVAL_S):
            try:
                wrong = problem(self._llm) or self._also()
            except Exception as error:
                wrong = f"TensorRT-LLM's health cannot be checked: {type(error).__name__}: {error}"
            if wrong is not None and not self._stopping.is_set():
                self._fail(wrong)
                return


def problem(llm: Any) -> str | None:
    """What is wrong with the executor of ``llm``; None where nothing is known to be. Never raises."""
    try:
        return _problem(llm)
    except Exception as error:
        return f"TensorRT-LLM's health cannot be checked: {type(error).__name__}: {error}"


def _problem(llm: Any) -> str | None:
    """The same, by the release's own check.

    Releases before 1.3 have no call for it; for them the state that their own calls check is read.
    """
    executor = getattr(llm, "_executor", None)
    check = getattr(llm, "_check_health", None) or getattr(executor, "check_health", None)
    if check is not None:
        return None if check() else "TensorRT-LLM says that its executor is not healthy"
    if executor is None:
        return None
    if executor.is_shutdown():
        return "TensorRT-LLM's executor has shut itself down"
    if any(process.done() for process in getattr(executor, "mpi_futures", ())):
        return "a process of TensorRT-LLM's executor has ended"
    errors = getattr(executor, "_error_queue", None)
    if errors is not None and not errors.empty():
        return "TensorRT-LLM's executor has met an error in the background; its log says which"
    return None
