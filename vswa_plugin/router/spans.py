"""The spans of one request that a router forwards, below Dynamo's own.

vswa.route                 from its arrival to the end of its answer
    vswa.choose            one choice of a worker, and in it
        vswa.score         the prompt hashed, and every rank scored
    vswa.worker            a worker's part: from the call to the end of what it sends
"""

from __future__ import annotations

import time

from vswa_plugin.router.decide import Decision
from vswa_plugin.tracing import NO_SPAN, request_span


class RequestSpans:
    """:param model: the name by which the client asked."""

    def __init__(self, model: str) -> None:
        self._route = request_span("vswa.route", model=model)
        self._worker = NO_SPAN

    def chose(self, decision: Decision, phase: str) -> None:
        """A worker was chosen just now, and is called."""
        self._worker.end()
        rank = decision.rank
        now = time.time_ns()
        began = now - round(decision.took_s * 1e9)
        chosen = self._route.child(
            "vswa.choose",
            began,
            phase=phase,
            worker_id=rank.worker_id,
            dp_rank=rank.dp_rank,
            ranks=decision.ranks,
            cost=decision.cost,
            prompt_tokens=decision.prompt_len,
            promised_tokens=decision.cached_tokens,
        )
        chosen.child("vswa.score", began).end(at_ns=began + round(decision.scored_s * 1e9))
        chosen.end(at_ns=now)
        self._worker = self._route.child(
            "vswa.worker", phase=phase, worker_id=rank.worker_id, dp_rank=rank.dp_rank
        )

    def first_token(self) -> None:
        self._worker.event("first token")

    def end(self, outcome: str, error: str | None) -> None:
        """The request has ended so."""
        self._worker.end()
        self._route.set(outcome=outcome)
        self._route.end(error)
