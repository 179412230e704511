"""How likely a block is requested again, by how long ago it was requested last. Pure.

Learnt from the requests themselves: each block of a prompt that an earlier prompt had too is a reuse at some
age, each block that was not requested since is one that waits at some age. Ages are counted in requests.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable

#: Classes of ages: two for each doubling, up to 2**32 requests.
CLASSES = 64
#: Reuses count less by this factor with every step.
STEP_REQUESTS, FADING = 25, 0.98
#: A block that is as new as this has been requested by chance as often as not.
_PRIOR_REUSED, _PRIOR_ALL = 0.5, 1.0


def age_class(age: int) -> int:
    """The class of an age in requests."""
    return min(CLASSES - 1, int(2 * math.log2(age))) if age > 1 else 0


class ReuseOdds:
    """The chance by age.

    :param most: blocks that are remembered; the one unused longest is forgotten first.
    :ivar now: requests seen.
    """

    def __init__(self, most: int) -> None:
        self.now = 0
        self._most = most
        #: Name -> the request that had it last, in order of that.
        self._last: OrderedDict[int, int] = OrderedDict()
        self._reuses = [0.0] * CLASSES
        self._chances = [_PRIOR_REUSED / _PRIOR_ALL] * CLASSES

    def __len__(self) -> int:
        return len(self._last)

    def seen(self, names: Iterable[int]) -> None:
        """One more request has come, with these blocks."""
        self.now += 1
        last, reuses = self._last, self._reuses
        for name in names:
            before = last.get(name)
            if before is not None:
                reuses[age_class(self.now - before)] += 1
            last[name] = self.now
            last.move_to_end(name)
        while len(last) > self._most:
            last.popitem(last=False)
        if self.now % STEP_REQUESTS == 0:
            self._settle()

    def chance(self, age: int) -> float:
        """That a block which was requested so many requests ago is requested again."""
        return self._chances[age_class(age)]

    def _settle(self) -> None:
        waiting = [0] * CLASSES
        for request in self._last.values():
            waiting[age_class(self.now - request)] += 1
        reused = still = 0.0
        for index in reversed(range(CLASSES)):
            reused += self._reuses[index]
            still += waiting[index]
            self._chances[index] = (reused + _PRIOR_REUSED) / (reused + still + _PRIOR_ALL)
        self._reuses = [FADING * each for each in self._reuses]
