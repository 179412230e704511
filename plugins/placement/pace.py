"""How fast each rank serves, learnt from when first tokens and ends come. Pure; times are in seconds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable
from statistics import fmean
from typing import NamedTuple

from vswa_plugin.wire import Rank

#: Until a first token was seen.
DEFAULT_TOKEN_S = 1e-4
#: What a new sample counts: of a rank's own speed and of its waits, and of how long requests stay.
_RANK_STEP, _HOLD_STEP = 0.1, 0.05
#: Older samples count less by this factor with every new one.
_FADING = 0.98
#: So many samples are needed before one that is far off is left out, and how far that is.
_TRUSTED, _FAR_OFF = 8, 1.5
#: How far one sample moves a rank's speed, in logarithms: with these, to the lower quartile of the samples.
_UP, _DOWN = 0.03, 0.09
#: A rank is taken to be at most so much slower, or faster, than the others.
_MOST_SLOWER = 16.0


class _Sent(NamedTuple):
    rank: Rank
    at_s: float
    tokens: int
    alone: bool


class RankPace:
    """One rank.

    :ivar slower: how much longer than on the average rank a prompt takes.
    :ivar blocked_s: seconds that each request waits on top of the prompts before it: for room, for a turn.
    """

    __slots__ = ("blocked_s", "last_s", "slower", "waiting")

    def __init__(self) -> None:
        self.slower = 1.0
        self.blocked_s = 0.0
        self.last_s = 0.0
        self.waiting = 0


class Pace:
    """All ranks of one model and phase.

    :ivar hold_s: how long a request stays on its rank after its first token.
    :ivar line: seconds of a prompt, and of each token to compute; on the average rank.
    :ivar ranks: those that requests were sent to; any other is made when it is looked up.
    """

    def __init__(self) -> None:
        self.hold_s = 0.0
        self._held = 0
        self.ranks: defaultdict[Rank, RankPace] = defaultdict(RankPace)
        self._sent: dict[Hashable, _Sent] = {}
        self._started: dict[Hashable, float] = {}
        #: Of prompts that had a rank to themselves: count, and sums of tokens, seconds and products.
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)
        self.line = (0.0, DEFAULT_TOKEN_S)

    # -- what happened -------------------------------------------------------------------------------

    def sent(self, key: Hashable, rank: Rank, tokens: int, now: float) -> None:
        """A request with so many tokens to compute has been given to a rank."""
        pace = self.ranks[rank]
        self._sent[key] = _Sent(rank, now, tokens, pace.waiting == 0)
        pace.waiting += 1

    def first_token(self, key: Hashable, now: float) -> None:
        """Its prompt is computed."""
        sent = self._sent.pop(key, None)
        if sent is None:
            return
        self._started[key] = now
        pace = self.ranks[sent.rank]
        pace.waiting -= 1
        if sent.alone:
            self._learn(pace, sent.tokens, now - sent.at_s)
        took = now - max(sent.at_s, pace.last_s)
        pace.last_s = now
        over = max(0.0, took - self.compute_s(sent.rank, sent.tokens))
        pace.blocked_s += _RANK_STEP * (over - pace.blocked_s)

    def ended(self, key: Hashable, now: float) -> None:
        """It has ended, or it was cancelled."""
        if (sent := self._sent.pop(key, None)) is not None:
            self.ranks[sent.rank].waiting -= 1
        if (started := self._started.pop(key, None)) is not None:
            self._held += 1
            self.hold_s += max(_HOLD_STEP, 1 / self._held) * (now - started - self.hold_s)

    def forget(self, rank: Rank) -> None:
        """The rank has gone."""
        self.ranks.pop(rank, None)
        for key in [key for key, sent in self._sent.items() if sent.rank == rank]:
            del self._sent[key]

    # -- what is expected ----------------------------------------------------------------------------

    def compute_s(self, rank: Rank, tokens: float) -> float:
        """Seconds of a prompt with so many tokens to compute, once its turn has come."""
        fixed, each = self.line
        return self.ranks[rank].slower * (fixed + each * tokens)

    def _learn(self, pace: RankPace, tokens: int, took: float) -> None:
        fixed, each = self.line
        expected = fixed + each * tokens
        count = self._sums[0]
        ratio = took / expected if expected > 0 else 1.0
        if count >= _TRUSTED:
            # The lower quartile: what takes longer has waited for room as well.
            step = _UP if ratio > pace.slower else -_DOWN
            pace.slower = min(max(pace.slower * math.exp(step), 1 / _MOST_SLOWER), _MOST_SLOWER)
            mean = fmean(each.slower for each in self.ranks.values())
            for each_rank in self.ranks.values():
                each_rank.slower /= mean
            if ratio > _FAR_OFF * pace.slower:
                return
        x, y = float(tokens), took / pace.slower
        new = (1.0, x, y, x * x, x * y)
        self._sums = tuple(_FADING * old + add for old, add in zip(self._sums, new, strict=True))  # type: ignore[assignment]
        self.line = self._fitted()

    def _fitted(self) -> tuple[float, float]:
        """Seconds of a prompt, and of each of its tokens: the line through the samples, neither below 0."""
        n, x, y, xx, xy = self._sums
        spread = n * xx - x * x
        each = (n * xy - x * y) / spread if spread > 1e-6 * n * xx else 0.0
        fixed = (y - each * x) / n
        if each <= 0 or fixed < 0:
            return 0.0, max(y / x if x else DEFAULT_TOKEN_S, 1e-9)
        return fixed, each
