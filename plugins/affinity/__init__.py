"""Sticky sessions: the requests of one conversation stay on one rank; see README.md."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from vswa_plugin.hookspecs import hookimpl

from .sessions import Sessions, outcome_of, stays_or_moves

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vswa_plugin.engine import Section
    from vswa_plugin.selection import RoutedRequest, Scored
    from vswa_plugin.wire import Rank

MODES = ("off", "soft", "hard")
#: What is called only where sessions are sticky; in mode ``hard`` no cost is changed.
CHOOSING = ("vswa_score", "vswa_select_worker", "vswa_metrics")
OPTIONS = {"mode", "ttl_s", "max_sessions", "credit_blocks", "max_requests", "metadata"}
OUTCOMES = ("new", "kept", "moved", "lost")


class Affinity:
    """The hooks of one router or selector, and its sessions.

    :param clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rng = random.Random()
        self._choices: Counter[str] = Counter()
        self._configure("off", 600.0, 65_536, 32, None, None)

    def _configure(
        self, mode: str, ttl_s: float, most: int, credit: int, max_requests: int | None, metadata: str | None
    ) -> None:
        self._mode = mode
        self._credit = credit
        self._max_requests = max_requests
        self._metadata = metadata
        self._sessions = Sessions(ttl_s, most, self._clock)

    @hookimpl
    def vswa_options(self, options: Section) -> Sequence[str] | None:
        options.check(OPTIONS)
        mode = "off" if options.data.get("mode") is False else options.choice("mode", MODES, "off")
        self._configure(
            mode,
            options.seconds("ttl_s", 600.0, above_zero=True),
            options.integer("max_sessions", 65_536),
            options.integer("credit_blocks", 32, low=0),
            options.integer("max_requests", None),
            options.text("metadata", None),
        )
        return {"off": CHOOSING, "soft": None, "hard": ("vswa_score",)}[mode]

    @hookimpl
    def vswa_score(self, request: RoutedRequest, candidates: Sequence[Scored]) -> Mapping[Rank, float] | None:
        """Make the session's rank cheaper, where it is a candidate."""
        if (session := self._session_of(request)) is None:
            return None
        bound = self._sessions.rank_of(session)
        if bound is None or all(each.rank != bound for each in candidates):
            return None
        return {bound: -self._credit}

    # Last: what another plugin chooses on purpose counts more than where a conversation was before.
    @hookimpl(trylast=True)
    def vswa_select_worker(self, request: RoutedRequest, candidates: Sequence[Scored]) -> Rank | None:
        """Keep a session where it is, or bind it to the cheapest rank."""
        if (session := self._session_of(request)) is None:
            return None
        bound = self._sessions.rank_of(session)
        hard = self._mode == "hard"
        chosen = stays_or_moves(bound, candidates, hard, self._max_requests, self._rng)
        self._choices[outcome_of(bound, chosen, candidates)] += 1
        self._sessions.bind(session, chosen)
        return chosen

    @hookimpl
    def vswa_metrics(self) -> str:
        name = "vswa_affinity"
        return "\n".join(
            [
                f"# HELP {name}_sessions Sessions that are bound to a rank, per phase.",
                f"# TYPE {name}_sessions gauge",
                f"{name}_sessions {len(self._sessions)}",
                f"# HELP {name}_choices_total Choices for requests of a session.",
                f"# TYPE {name}_choices_total counter",
                *(f'{name}_choices_total{{outcome="{each}"}} {self._choices[each]}' for each in OUTCOMES),
                f"# HELP {name}_evicted_total Sessions that were forgotten for want of room.",
                f"# TYPE {name}_evicted_total counter",
                f"{name}_evicted_total {self._sessions.evicted}",
                "",
            ]
        )

    def _session_of(self, request: RoutedRequest) -> tuple[str, str, str] | None:
        """Each phase has a rank of its own; None: the request belongs to no session."""
        name = request.session_id if self._metadata is None else request.metadata.get(self._metadata)
        return (request.model, request.phase, name) if name else None
