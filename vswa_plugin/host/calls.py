"""Calling one implementation of a hook so that its failure stays its own: caught, counted, logged, named."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

LOG_EVERY_S = 60.0
FAILURES_METRIC = "vswa_plugin_failures"


@dataclass(frozen=True)
class Implementation:
    """One plugin's function for one hook, and the arguments that it takes, in order."""

    plugin: str
    hook: str
    function: Callable[..., Any]
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Lost:
    """In place of an answer: the implementation raised, or answered what it must not."""

    plugin: str
    error: BaseException


class Isolation:
    """Calls implementations; keeps the counts of those that failed. May be used from any thread.

    :param trace: log every call with its duration.
    :param clock: monotonic seconds.
    """

    def __init__(self, *, trace: bool, clock: Callable[[], float]) -> None:
        self._trace = trace
        self._clock = clock
        self._lock = threading.Lock()
        self._failures: Counter[tuple[str, str]] = Counter()
        #: (plugin, hook) -> when it was last logged, and the failures counted until then.
        self._logged: dict[tuple[str, str], tuple[float, int]] = {}

    def call(
        self,
        implementation: Implementation,
        arguments: Mapping[str, object],
        check: Callable[[object], None],
        *,
        through: tuple[type[Exception], ...] = (),
    ) -> object:
        """The answer of one implementation, or :class:`Lost`.

        :param arguments: the hook's, by name.
        :param check: raises what is wrong with an answer that is not None.
        :param through: what is raised on to the caller.
        """
        began = self._clock() if self._trace else 0.0
        answer: object
        try:
            answer = implementation.function(*[arguments[name] for name in implementation.arguments])
            if answer is not None:
                check(answer)
        except through:
            raise
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            # Hooks are synchronous, so a SystemExit or CancelledError here is the plugin's own and must not
            # end the task or thread that called it.
            self.note(implementation, error)
            answer = Lost(implementation.plugin, error)
        if self._trace:
            self._log_call(implementation, answer, self._clock() - began)
        return answer

    def failures(self) -> dict[tuple[str, str], int]:
        """(plugin, hook) -> calls that failed."""
        with self._lock:
            return dict(self._failures)

    def metrics(self, known: Iterable[Implementation] = ()) -> str:
        """The failures as Prometheus text; empty where there are none.

        :param known: implementations that are shown with 0 where they have not failed: a rate misses what
            appears with its first failure.
        """
        failures = {(each.plugin, each.hook): 0 for each in known} | self.failures()
        if not failures:
            return ""
        name = f"{FAILURES_METRIC}_total"
        lines = [f"# HELP {name} Hook calls of a plugin that failed.", f"# TYPE {name} counter"]
        for (plugin, hook), count in sorted(failures.items()):
            lines.append(f'{name}{{plugin="{plugin}",hook="{hook}"}} {count}')
        return "\n".join(lines) + "\n"

    def note(self, implementation: Implementation, error: BaseException) -> None:
        """Count a failure of the plugin, and log it if that was not done within the last minute."""
        key = (implementation.plugin, implementation.hook)
        now = self._clock()
        with self._lock:
            self._failures[key] += 1
            count = self._failures[key]
            last, counted = self._logged.get(key, (float("-inf"), 0))
            if now - last < LOG_EVERY_S:
                return
            self._logged[key] = (now, count)
        logger.error(
            "plugin %r failed in hook %r; its answer is left out, all else goes on "
            "(failures since the last such line: %d, in all: %d)",
            *key,
            count - counted,
            count,
            exc_info=error,
        )

    def _log_call(self, implementation: Implementation, answer: object, took_s: float) -> None:
        # The type only: an answer may hold what must not be logged.
        outcome = "failed" if isinstance(answer, Lost) else type(answer).__name__
        logger.info(
            "trace: plugin %r hook %r -> %s in %.3f ms",
            implementation.plugin,
            implementation.hook,
            outcome,
            took_s * 1e3,
        )
