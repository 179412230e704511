"""What becomes of the requests of one rank, reported or inferred from its events. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from vswa_plugin.blocks.memory import TRTLLM_V2
from vswa_plugin.forecast.books import Books
from vswa_plugin.forecast.requests import Request, in_order_of_release, key_of
from vswa_plugin.forecast.shape import Shape
from vswa_plugin.forecast.steps import SLACK, StepClock

#: Over so many requests the length of an answer is averaged.
_ANSWERS = 32
#: So many requests that seem to have ended are kept in mind.
_PRESUMED = 16


class UnderWay(Books):
    """The requests of one rank: what waits, runs, and has ended.

    Where nobody reports the ends, the events show them: a request has ended when a block that it holds is
    removed, when a prompt goes on from its answer, when another was admitted for which there was no room, or
    when others are so much further that it cannot run any more.

    :param ends_reported: whether :meth:`ended` is called for every request.
    """

    def __init__(self, shape: Shape, *, ends_reported: bool = False) -> None:
        super().__init__(shape)
        self._ends_reported = ends_reported
        self._clock = StepClock(shape)
        #: Name -> the last request that has it, while that waits or runs.
        self._owner: dict[int, Request] = {}
        #: Requests that seem to have ended, with what they held then: nothing has proven it yet.
        self._presumed: dict[Hashable, tuple[Request, list[dict[int, int]]]] = {}
        self._last_admission = 0
        self._heard = 0
        self._rests = 0

    def sent(self, key: Hashable, names: Sequence[int], prompt_len: int, *, reads_cache: bool = True) -> None:
        """A request has been given to the rank; it waits behind those before it."""
        if not self._ends_reported:
            self._continued(names)
        request = Request(key, names, prompt_len, len(self.shape.groups), reads_cache)
        request.sent = self._clock.now
        self.waiting[key] = request
        for name in names:
            self._owner.setdefault(name, request)

    def _continued(self, names: Sequence[int]) -> None:
        """A prompt that goes on from the answer of a request: that request has ended."""
        for request in list(self.running.values()):
            unit = self.shape.unit
            answered = request.prompt_len // unit  # the first block with generated tokens
            if len(request.names) > answered < len(names) and names[answered] == request.names[answered]:
                self.ended(request.key)

    def admitted(self, key: Hashable, cached_tokens: int | None = None) -> None:
        """The engine has begun with it; ``cached_tokens``: what it reused, None where that is not known."""
        request = self.waiting.pop(key, None)
        if request is None:
            return
        if cached_tokens is None:
            cached_tokens = self.score(request) if request.reads_cache else 0
        cached_tokens = max(0, min(cached_tokens, request.prompt_len))  # an engine may report anything
        if not self._ends_reported:
            self._make_room(request, cached_tokens)
        for before in self.running.values():  # those that run have their turn first in every step
            self._advance(before, before.prompt_len // self.shape.unit * self.shape.unit)
            self._let_go(before, before.tokens(self.shape))
        self._last_admission = self._clock.now
        self._heard += 1
        request.heard = self._heard
        self.running[key] = request
        request.let_go = cached_tokens
        request.computed = cached_tokens // self.shape.unit * self.shape.unit
        if request.prompt_done(self.shape):
            request.began = self._clock.now
        for name in request.names:
            self._owner[name] = request
        for group in self.shape.groups:
            for block in range(group.first_seen(cached_tokens), cached_tokens // group.size):
                name = request.names[(block + 1) * group.stride - 1]
                self.hold(request, group.index, block, key_of(group.index, name), computed=False)

    def ended(self, key: Hashable) -> None:
        """It holds nothing any more; again, or for one that is not known, this does nothing."""
        request = self.waiting.pop(key, None)
        if request is None and (request := self.running.pop(key, None)) is not None:
            generated = max(0, request.computed - request.prompt_len) + self.shape.unit / 2
            self.answer += (generated - self.answer) / _ANSWERS
        if request is None:
            return
        for pool in self.free:
            pool.begin()
        if self.shape.eviction == TRTLLM_V2 and request.prompt_done(self.shape):
            self._keep_rest(request)
        for index, block, _ in in_order_of_release(request.tables, self.shape):
            self.release(index, request.tables[index][block])
        request.tables = [{} for _ in request.tables]
        for name in request.names:
            if self._owner.get(name) is request:
                del self._owner[name]

    def _keep_rest(self, request: Request) -> None:
        """What is left of its prompt behind the last whole block is kept like a block; no event says so."""
        for group in self.shape.groups:
            if request.prompt_len % group.size:
                self._rests += 1
                self.free[group.pool].add(-self._rests, group.index)

    def computed(self, key: Hashable) -> None:
        """Its prompt is computed: so it was admitted, whether an event has said so or not."""
        self.admitted(key)
        request = self.running.get(key)
        if request is not None:
            self._advance(request, request.prompt_len // self.shape.unit * self.shape.unit)

    @property
    def waiting_units(self) -> int:
        """Hash units of the prompts that wait."""
        return sum(len(request.names) for request in self.waiting.values())

    def under_way(self) -> list[Request]:
        """The requests that run and wait, in order."""
        return [*self.running.values(), *self.waiting.values()]

    def score(self, request: Request) -> int:
        """Cached tokens, if its turn were now."""
        return self.shape.score(request.names, request.prompt_len, self.holds)

    def _advance(self, request: Request, computed: int) -> None:
        before = request.computed
        if computed > before:
            request.computed = computed
            self._recomputed(request, before)
            self._clock.advanced(request, before)

    def _recomputed(self, request: Request, before: int) -> None:
        """Blocks that were there have been computed again: no event says so, and they are its own now."""
        tokens = min(request.computed, len(request.names) * self.shape.unit)
        for group in self.shape.groups:
            table = request.tables[group.index]
            for block in range(max(before // group.size, group.first_seen(tokens)), tokens // group.size):
                name = request.names[(block + 1) * group.stride - 1]
                if block not in table and self.holds(group.index, name):
                    self.hold(request, group.index, block, key_of(group.index, name), computed=True)

    def _let_go(self, request: Request, tokens: int) -> None:
        """Release what no later token sees, the last block first."""
        request.let_go = max(request.let_go, tokens)
        for pool in self.free:
            pool.begin()
        for group in self.shape.groups:
            if not group.windowed:
                continue
            first = group.first_seen(tokens)
            table = request.tables[group.index]
            for block in sorted((block for block in table if block < first), reverse=True):
                self.release(group.index, table.pop(block))

    def _expire(self) -> None:
        """End what must have ended, as others are so much further."""
        if not self._ends_reported:
            for request in [each for each in self.running.values() if self._clock.overdue(each)]:
                self._presume(request)

    def _presume(self, request: Request) -> None:
        """It seems to have ended; it comes back where that is refuted."""
        tables, owned = request.tables, [name for name in request.names if self._owner.get(name) is request]
        self.ended(request.key)
        self._presumed[request.key] = request, tables
        self._owner.update(dict.fromkeys(owned, request))
        if len(self._presumed) > _PRESUMED:
            self._prove(next(iter(self._presumed)))

    def _prove(self, key: Hashable) -> None:
        """It has ended indeed."""
        request, _ = self._presumed.pop(key)
        for name in request.names:
            if self._owner.get(name) is request:
                del self._owner[name]

    def _revive(self, key: Hashable, more: int = 0) -> None:
        """It has not ended: what it held and what is still there is held by it.

        :param more: tokens that it has computed by now beyond those that are known.
        """
        request, tables = self._presumed.pop(key)
        self.running[key] = request
        if request.began is not None:  # not overdue at once again
            computed = request.computed + more
            request.began = max(request.began, self._clock.now - computed + request.prompt_len)
        for group in self.shape.groups:
            for block, held in tables[group.index].items():
                if held in self.users or held in self.free[group.pool]:
                    self.hold(request, group.index, block, held, computed=False)

    def _reconcile(self) -> None:
        """Where the first in the queue waits and there seems to be room, fewer have ended than it seems."""
        head = next(iter(self.waiting.values()), None)
        if head is None or self._clock.now < max(head.sent, self._last_admission) + SLACK:
            return
        if not all(request.prompt_done(self.shape) for request in self.running.values()):
            return
        needed = self.needed(head, 0)
        while self._presumed and all(
            self.empty(pool) + len(self.free[pool]) >= count for pool, count in enumerate(needed)
        ):
            key = next(reversed(self._presumed))
            self._revive(key)

    def _make_room(self, request: Request, cached_tokens: int) -> None:
        """It was admitted, so there was room: as many others as that takes have ended."""
        for pool, count in enumerate(self.needed(request, cached_tokens)):
            if self.shape.sizes[pool] is None:
                continue
            while self.size(pool) - self.held(pool) < count:
                done = min(
                    (each for each in self.running.values() if each.prompt_done(self.shape)),
                    key=lambda each: each.heard,
                    default=None,
                )
                if done is None:
                    break
                self.ended(done.key)
