"""Which requests must have ended, where nobody reports the ends. Pure.

A running request gets one token a step, so that it stores a block of its answer every block size of steps.
Where the others show that more steps have passed than that, and it has stored none, it has ended.
"""

from __future__ import annotations

from vswa_plugin.forecast.requests import Request
from vswa_plugin.forecast.shape import Shape

#: Steps beyond those in which a block must have come: a request may miss a step, and steps are a lower bound.
SLACK = 3


class StepClock:
    """Steps of the engine, at least, from how far its requests have come."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self.now = 0

    def advanced(self, request: Request, before: int) -> None:
        """``request`` has computed more than the first ``before`` tokens."""
        if request.began is None:
            self.now += 1
            if request.prompt_done(self._shape):
                request.began = self.now
        else:
            self.now = max(self.now, request.began + request.computed - request.prompt_len)

    def overdue(self, request: Request) -> bool:
        """Whether it should have stored another block by now."""
        if request.began is None:
            return False
        size = max(self._shape.groups[index].size for index in self._shape.telling)
        due = (max(request.computed, request.prompt_len) // size + 1) * size - request.prompt_len
        return self.now > request.began + due + SLACK
