"""Which rank each session is bound to, and whether it stays there. Pure."""

from __future__ import annotations

import hashlib
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence

from vswa_plugin.selection import Scored, choose
from vswa_plugin.wire import Rank

#: Of a digest: session ids come from clients, of any length, and need not be kept.
DIGEST_BYTES = 16
Session = tuple[str, str, str]


class Sessions:
    """Session -> the rank it was last sent to. Bounded: those that were unused longest are forgotten first.

    :param ttl_s: a session that was unused for so long is forgotten.
    :param most: sessions that are kept.
    :param clock: monotonic seconds.
    :ivar evicted: sessions that were forgotten because there were too many.
    """

    def __init__(self, ttl_s: float, most: int, clock: Callable[[], float]) -> None:
        self.evicted = 0
        self._ttl_s = ttl_s
        self._most = most
        self._clock = clock
        #: In order of use, and so of expiry.
        self._bound: OrderedDict[bytes, tuple[Rank, float]] = OrderedDict()

    def __len__(self) -> int:
        self._expire()
        return len(self._bound)

    def rank_of(self, session: Session) -> Rank | None:
        """Where the session is; None: it is new or forgotten."""
        self._expire()
        bound = self._bound.get(_digest(session))
        return None if bound is None else bound[0]

    def bind(self, session: Session, rank: Rank) -> None:
        """The session is used now, on ``rank``."""
        self._expire()
        name = _digest(session)
        self._bound[name] = (rank, self._clock())
        self._bound.move_to_end(name)
        if len(self._bound) > self._most:
            self._bound.popitem(last=False)
            self.evicted += 1

    def _expire(self) -> None:
        unused_since = self._clock() - self._ttl_s
        while self._bound and next(iter(self._bound.values()))[1] <= unused_since:
            self._bound.popitem(last=False)


def _digest(session: Session) -> bytes:
    name = "\0".join(session).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(name, digest_size=DIGEST_BYTES).digest()


def stays_or_moves(
    bound: Rank | None,
    candidates: Sequence[Scored],
    hard: bool,
    max_requests: int | None,
    rng: random.Random,
) -> Rank:
    """The rank that serves the next request of a session.

    :param bound: where the session is; None: nowhere.
    :param candidates: at least one, with their costs.
    :param hard: the session stays whatever that costs; else the cheapest is taken.
    :param max_requests: a rank with so many active requests is left where another has fewer; None: none is.
    """
    free = [each for each in candidates if not _is_full(each, max_requests)] or candidates
    if hard and any(each.rank == bound for each in free):
        assert bound is not None
        return bound
    return choose(free, 0.0, rng).rank


def outcome_of(bound: Rank | None, chosen: Rank, candidates: Sequence[Scored]) -> str:
    """For the metrics: ``new``, ``kept``, ``lost`` (its rank is no candidate any more) or ``moved``."""
    if bound is None:
        return "new"
    if chosen == bound:
        return "kept"
    return "moved" if any(each.rank == bound for each in candidates) else "lost"


def _is_full(each: Scored, max_requests: int | None) -> bool:
    return max_requests is not None and each.candidate.load.requests >= max_requests
