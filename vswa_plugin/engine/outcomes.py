"""How a request has ended, in one word of five: each request is counted under one of them, once. Pure.

completed     the engine finished it
cancelled     its client went, or its answer was not read to its end
refused       it can never be served as it is (4xx)
unavailable   it could not be served here or now (503): no worker, a full queue, a worker that was lost
failed        something of ours or of the engine failed
"""

from __future__ import annotations

from vswa_plugin.errors import InvalidRequest, RequestError

COMPLETED, CANCELLED, REFUSED = "completed", "cancelled", "refused"
UNAVAILABLE, FAILED = "unavailable", "failed"
OUTCOMES = (COMPLETED, CANCELLED, REFUSED, UNAVAILABLE, FAILED)


def outcome_of(finish_reason: str) -> str:
    """The outcome of a request whose last chunk gives ``finish_reason``; an engine may add its message."""
    kind = finish_reason.partition(":")[0].strip()
    return {"cancelled": CANCELLED, "error": FAILED}.get(kind, COMPLETED)


def outcome_of_error(error: BaseException) -> str:
    """The outcome of a request that ends with ``error``."""
    if isinstance(error, InvalidRequest):
        return REFUSED
    if not isinstance(error, RequestError):
        return FAILED if isinstance(error, Exception) else CANCELLED
    code = getattr(error, "code", 503)  # of a worker's own HTTP status
    if 400 <= code < 500:
        return REFUSED
    return UNAVAILABLE if code == 503 else FAILED
