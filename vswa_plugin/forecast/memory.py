"""What one rank holds, in the order of its use, and what is queued and under way there. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vswa_plugin.blocks.memory import VLLM
from vswa_plugin.forecast.requests import Request, key_of, name_of
from vswa_plugin.forecast.turns import Future
from vswa_plugin.forecast.underway import UnderWay
from vswa_plugin.wire.events import Cleared, Event, Layout, Moved, Removed, Stored


class Forecast(NamedTuple):
    """What a prompt will find.

    :ivar cached_tokens: when its turn comes.
    :ivar now: if its turn were now.
    :ivar stored_ahead: what requests before it add to ``now``, in tokens; ``evicted_ahead``: what they cost.
    """

    cached_tokens: int
    now: int
    stored_ahead: int
    evicted_ahead: int


class Victims(NamedTuple):
    """Blocks of one group that are evicted next.

    :ivar names: in the order in which they go.
    """

    group_id: int
    names: tuple[int, ...]


class RankMemory(UnderWay):
    """One rank, followed by its events and by what is sent there."""

    def apply(self, event: Event) -> None:
        """One event of the rank, in order. A layout or an unknown group changes nothing here."""
        match event:
            case Stored():
                self._stored(event)
            case Removed():
                group = self.shape.by_id.get(event.group_id)
                if group is not None:
                    self.evicted[group.pool] = self.evicts[group.pool] = True
                    for name in event.sequence_hashes:
                        self._removed(key_of(group.index, name), group.pool)
            case Cleared():
                self._cleared(event.group_id)
            case Moved() | Layout():
                pass

    def _stored(self, event: Stored) -> None:
        group = self.shape.by_id.get(event.group_id)
        if group is None or not event.sequence_hashes:
            return
        request = self._owner_of(event, group.stride)
        reached = 0
        for number, name in enumerate(event.sequence_hashes):
            key = key_of(group.index, name)
            position = (event.position + number + 1) * group.stride - 1
            place = -1 if request is None else self._place(request, position, name)
            if request is None or place < 0:
                self._orphan(key, group.index)
                continue
            block = (place + 1) // group.stride - 1
            self.hold(request, group.index, block, key, computed=True)
            if group.index in self.shape.telling:
                reached = (place + 1) * self.shape.unit
        if group.trailing is not None and len(event.sequence_hashes) > 2 * group.trailing:
            # Sparse groups keep one window at an end, and one where prompts part.
            self.dense[group.index] = True
        if request is not None:
            before = request.computed if request.began is None else reached - 1
            self._advance(request, reached)
            if reached:
                self._heard += 1
                request.heard = self._heard
                self.calibrate()
            # vLLM lets go as a step begins, the others as it ends.
            self._let_go(request, before if self.shape.eviction == VLLM else request.tokens(self.shape))
            self._expire()
        self.measure(group.pool)

    def _owner_of(self, event: Stored, stride: int) -> Request | None:
        first, parent = event.sequence_hashes[0], event.parent_hash
        request = self._owner.get(first)
        if request is None and parent is not None:
            request = self._owner.get(parent)
        if request is not None and request.key in self.running:
            return request
        place = (event.position + 1) * stride - 1
        for other in self.running.values():  # one that shares the name with a request that came later
            if len(other.names) > place and other.names[place] == first:
                return other
        if request is not None and request.key in self._presumed:
            if parent != request.names[-1]:
                return None
            self._revive(request.key, stride * self.shape.unit)  # its answer goes on
        elif request is not None and request.key in self.waiting:
            self.admitted(request.key)
        return request

    def _place(self, request: Request, position: int, name: int) -> int:
        """The index of a name in a request; -1: it has none. What it generates is named as it comes."""
        names = request.names
        if position < len(names):
            if names[position] == name:
                return position
        elif position == len(names) and request.prompt_done(self.shape):
            names.append(name)
            self._owner[name] = request
            return position
        try:
            return names.index(name)
        except ValueError:
            return -1

    def _orphan(self, key: int, group_index: int) -> None:
        """A block that belongs to no request that is known: held by nobody, used just now."""
        if key not in self.users:
            pool = self.free[self.shape.groups[group_index].pool]
            pool.take(key)
            pool.begin()
            pool.add(key, group_index)

    def _removed(self, key: int, pool: int) -> None:
        if key not in self.users:
            self.free[pool].evicted(key)
            return
        for request in list(self.running.values()):
            if any(key in table.values() for table in request.tables):
                if not self._ends_reported:
                    self.ended(request.key)
                else:
                    self._forget(request, key)
        self.users.pop(key, None)
        self.copies.pop(key, None)
        self.free[pool].evicted(key)

    @staticmethod
    def _forget(request: Request, key: int) -> None:
        for table in request.tables:
            for block in [block for block, held in table.items() if held == key]:
                del table[block]

    def _cleared(self, group_id: int | None) -> None:
        gone = [each.index for each in self.shape.groups if group_id in (None, each.group_id)]
        for index in gone:
            self.free[self.shape.groups[index].pool].clear(index)
        for request in self.running.values():
            for index in gone:
                for key in request.tables[index].values():
                    self.users.pop(key, None)
                request.tables[index].clear()

    def now(self) -> Future:
        """The rank as it is: it can be run forward by whoever knows the order of what is to come."""
        self._reconcile()
        return Future(self)

    def future(self) -> Future:
        """The rank when all that waits there now has been admitted and computed."""
        future = self.now()
        future.run()
        return future

    def forecast(self, names: Sequence[int], prompt_len: int) -> Forecast:
        """What a prompt would find there if it were sent now."""
        now = self.shape.score(names, prompt_len, self.holds)
        future = self.future()
        cached = self.shape.score(names, prompt_len, future.holds)
        kept = self.shape.score(
            names, prompt_len, lambda group, name: self.holds(group, name) and future.holds(group, name)
        )
        return Forecast(cached, now, cached - kept, now - kept)

    def promise(self, names: Sequence[int], prompt_len: int, now: int) -> int:
        """Cached tokens when the turn of a prompt comes that would find ``now`` tokens at once."""
        future = self.future()
        if not future.stored and not future.evicted:
            return now
        return self.shape.score(names, prompt_len, future.holds)

    def victims(self, blocks: Sequence[int]) -> Iterator[Victims]:
        """What is evicted next where so many blocks are taken from each pool, in runs of one group.

        :param blocks: per pool.
        """
        for pool, count in enumerate(blocks):
            count -= max(0, self.empty(pool))
            run: list[int] = []
            last = -1
            for key, index, lost in self.free[pool]:
                if count <= 0:
                    break
                count -= 1
                if not lost or key < 0:
                    continue
                if index != last and run:
                    yield Victims(self.shape.groups[last].group_id, tuple(run))
                    run = []
                last = index
                run.append(name_of(index, key))
            if run:
                yield Victims(self.shape.groups[last].group_id, tuple(run))
