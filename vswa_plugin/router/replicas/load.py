"""Load books that several routers share, so that each knows what the others have put on a worker.

The messages are those of messages.py. A router that lost messages is right again after the next
digest; one whose digests stay away for three seconds and a half has nothing under way any more. As long as
no other router is there, only presence is sent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator

import msgspec

from vswa_plugin.errors import ProtocolError
from vswa_plugin.router.replicas.messages import (
    MAX_HASHES,
    MAX_KEYS,
    Bye,
    Digest,
    ForeignVersion,
    Free,
    Put,
    State,
    Want,
    Word,
    decode,
    encode,
    parts,
)
from vswa_plugin.selection import Booked, LoadBook

logger = logging.getLogger(__name__)

#: More routers, or more requests of one, are left out and counted.
MAX_ROUTERS, MAX_REQUESTS = 64, 65_536
#: What is kept of the requests of one router, and of all, in hashes: some 200 bytes each. A request counts as
#: so many besides its own. Where there is no room, the end of its prompt is left out, or all of it.
MAX_ROUTER_HASHES, MAX_ALL_HASHES, REQUEST_HASHES = 1 << 18, 1 << 19, 8
#: Requests of one router that are asked for at a time; the next digest names the others.
MAX_WANTED = 4 * MAX_KEYS
INTERVAL_S = 1.0
#: After so many intervals without a message a router counts as gone.
SILENCE = 3.5


class ReplicaStats(msgspec.Struct):
    """Counters since start. ``left_out``: routers or requests above the limits."""

    received: int = 0
    sent: int = 0
    bytes_sent: int = 0
    malformed: int = 0
    foreign_version: int = 0
    foreign_subject: int = 0
    send_errors: int = 0
    wanted: int = 0
    left_out: int = 0
    expired: int = 0


class SharedBook(LoadBook):
    """The load of one model, of this router and of all others. Made by :meth:`SharedLoad.book`.

    This router's own requests have numbers as keys, those of others (router, number).
    """

    def __init__(self, block_size: int, model: str, shared: SharedLoad) -> None:
        super().__init__(block_size)
        self.model = model
        self._with = shared

    def state(self, key: int) -> State:
        """How far a request is that is in the book."""
        return _state(key, self._requests[key])

    def whole(self, key: int) -> Put:
        """The request as the other routers get it."""
        request = self._requests[key]
        hashes = tuple(request.hashes[:MAX_HASHES])
        state = _state(key, request)
        return Put(state, self.model, hashes, request.prompt_len, request.cached_blocks, request.shared)

    def _changed(self, key: Hashable, new: bool = False) -> None:
        if isinstance(key, int):
            self._with.changed(self, key, new)
        elif isinstance(key, tuple) and self.get(key) is None:
            self._with.left(*key)


def _state(key: int, request: Booked) -> State:
    return State(key, *request.rank, request.prefill_tokens, request.output_tokens)


class _Router(msgspec.Struct):
    """Another router: what it has under way, how much that is, and when its last message came."""

    heard_at: float
    requests: dict[int, Put] = msgspec.field(default_factory=dict)
    hashes: int = 0

    def keep(self, put: Put) -> None:
        self.requests[put.state.key] = put
        self.hashes += REQUEST_HASHES + len(put.hashes)

    def pop(self, key: int) -> Put | None:
        put = self.requests.pop(key, None)
        if put is not None:
            self.hashes -= REQUEST_HASHES + len(put.hashes)
        return put


class SharedLoad:
    """What all routers have under way. No I/O; times are seconds of one monotonic clock.

    :param router: id of this one.
    :param wake: called when there is something for :meth:`take`.
    """

    def __init__(self, router: int, wake: Callable[[], None] = lambda: None) -> None:
        self.router = router
        self.stats = ReplicaStats()
        #: This router's own requests, by the book they are in.
        self.mine: dict[int, SharedBook] = {}
        self.others: dict[int, _Router] = {}
        self._books: dict[str, SharedBook] = {}
        #: Own requests that have changed; True: send all of it.
        self._changed: dict[int, bool] = {}
        self._wants: dict[int, set[int]] = {}
        self._digest_due = False
        self._last_tick: float | None = None
        self._wake = wake

    def book(self, model: str, block_size: int) -> SharedBook:
        """The book of a model, new, with what the other routers have there."""
        book = self._books[model] = SharedBook(block_size, model, self)
        for router, other in self.others.items():
            for put in other.requests.values():
                if put.model == model:
                    self._enter(router, put)
        return book

    # -- changes of the books ----------------------------------------------------------------------

    def changed(self, book: SharedBook, key: int, new: bool) -> None:
        """A request of this router has come (``new``), is further on, or is gone."""
        if book.get(key) is None:
            del self.mine[key]
        else:
            self.mine[key] = book
        if self.others:
            self._changed[key] = new or self._changed.get(key, False)
            self._wake()

    def left(self, router: int, key: int) -> None:
        """A request of another router is in its book no more."""
        other = self.others.get(router)
        if other is not None:
            other.pop(key)

    # -- time and messages -------------------------------------------------------------------------

    def tick(self, now: float, connected: bool, interval_s: float = INTERVAL_S) -> None:
        """Once per interval: forget routers that are silent, and let a digest be sent.

        :param connected: whether their messages could have arrived.
        """
        late = self._last_tick is not None and now - self._last_tick > 2 * interval_s
        self._last_tick = now
        for router, other in list(self.others.items()):
            if not connected or late:
                other.heard_at = now
            elif now - other.heard_at > SILENCE * interval_s:
                self.stats.expired += 1
                self._forget(router, f"no message for {now - other.heard_at:.1f} s")
        self._digest_due = True
        self._wake()

    def receive(self, payload: bytes, now: float, sender: str | None = None) -> None:
        """Take in a message of another router; one that cannot be used is counted.

        :param sender: the router, hexadecimal, on whose subject it came; None: whoever it says.
        """
        try:
            message = decode(payload)
        except ForeignVersion as error:
            self.stats.foreign_version += 1
            if self.stats.foreign_version == 1:
                logger.warning("load of another router is ignored, as all of its kind: %s", error)
            return
        except ProtocolError as error:
            self.stats.malformed += 1
            if self.stats.malformed == 1:
                logger.warning("load of another router is ignored (further ones are only counted): %s", error)
            return
        if sender is not None and sender != f"{message.router:x}":
            self.stats.foreign_subject += 1
            return
        if message.router == self.router:
            return
        self.stats.received += 1
        other = self.others.get(message.router) or self._met(message.router, now)
        if other is not None:
            other.heard_at = now
            for word in message.words:
                if message.router in self.others:
                    self._hear(message.router, other, word)
        if self._wants or self._changed:
            self._wake()

    def take(self) -> list[bytes]:
        """All messages that are to be sent now, to all other routers."""
        words: list[Word] = []
        for key, whole in self._changed.items():
            book = self.mine.get(key)
            words.append(Free(key) if book is None else book.whole(key) if whole else book.state(key))
        for router, keys in self._wants.items():
            self.stats.wanted += len(keys)
            words += [Want(router, part) for part in parts(sorted(keys))]
        if self._digest_due:
            words += self._digest()
        self._changed, self._wants, self._digest_due = {}, {}, False
        return list(encode(self.router, words))

    def farewell(self) -> bytes:
        return next(encode(self.router, [Bye()]))

    def _digest(self) -> Iterator[Digest]:
        if not self.others:
            yield Digest(0, 0, ())
            return
        first = 0
        ranges = list(parts(sorted(self.mine))) or [()]
        for number, keys in enumerate(ranges):
            end = None if number == len(ranges) - 1 else keys[-1] + 1
            yield Digest(first, end, tuple(self.mine[key].state(key) for key in keys))
            first = end or 0

    # -- news of the others ------------------------------------------------------------------------

    def _met(self, router: int, now: float) -> _Router | None:
        if len(self.others) >= MAX_ROUTERS:
            self.stats.left_out += 1
            return None
        logger.info("router %d shares its load", router)
        other = self.others[router] = _Router(now)
        self._digest_due = True  # it knows nothing of ours yet
        self._wake()
        return other

    def _forget(self, router: int, reason: str) -> None:
        other = self.others.pop(router)
        for key in list(other.requests):
            self._leave(router, other, key)
        logger.info("router %d shares its load no more: %s", router, reason)

    def _hear(self, router: int, other: _Router, word: Word) -> None:
        match word:
            case Put():
                self._leave(router, other, word.state.key)
                if (fits := self._fitting(other, word)) is None:
                    self.stats.left_out += 1
                    return
                self._take_in(router, other, fits)
            case State():
                self._update(router, other, word)
            case Free():
                self._leave(router, other, word.key)
            case Digest():
                self._reconcile(router, other, word)
            case Want():
                for key in word.keys if word.router == self.router else ():
                    if key in self.mine:
                        self._changed[key] = True
            case Bye():
                self._forget(router, "it has ended")

    def _fitting(self, other: _Router, put: Put) -> Put | None:
        """The request, as much of it as there is room for; None: not even for its name."""
        room = self._room(other)
        if room < 0:
            return None
        return put if len(put.hashes) <= room else msgspec.structs.replace(put, hashes=put.hashes[:room])

    def _room(self, other: _Router) -> int:
        """Hashes that one more request of a router may have; below 0: there is no room for it."""
        if len(other.requests) >= MAX_REQUESTS:
            return -1
        held = sum(each.hashes for each in self.others.values())
        return min(MAX_ALL_HASHES - held, MAX_ROUTER_HASHES - other.hashes) - REQUEST_HASHES

    def _reconcile(self, router: int, other: _Router, digest: Digest) -> None:
        listed = {state.key for state in digest.states}
        end = digest.end
        for key in [key for key in other.requests if key >= digest.first and (end is None or key < end)]:
            if key not in listed:
                self._leave(router, other, key)
        for state in digest.states:
            self._update(router, other, state)

    def _update(self, router: int, other: _Router, state: State) -> None:
        put = other.requests.get(state.key)
        if put is None:
            wanted = self._wants.setdefault(router, set())
            if len(wanted) < MAX_WANTED and self._room(other) >= 0:
                wanted.add(state.key)
            return
        put.state = state
        name, book = (router, state.key), self._books.get(put.model)
        booked = book.get(name) if book is not None else None
        if book is None or booked is None:
            return
        if state.rank != booked.rank:
            self._leave(router, other, state.key)
            self._take_in(router, other, put)
            return
        if not state.prefill_tokens:
            book.first_token(name)
        if state.output_tokens > booked.output_tokens:
            book.output(name, state.output_tokens - booked.output_tokens)

    def _take_in(self, router: int, other: _Router, put: Put) -> None:
        other.keep(put)
        self._enter(router, put)

    def _enter(self, router: int, put: Put) -> None:
        book = self._books.get(put.model)
        if book is not None:
            state, name = put.state, (router, put.state.key)
            book.add(
                name,
                state.rank,
                put.hashes,
                put.prompt_len,
                state.prefill_tokens,
                cached_blocks=put.cached_blocks,
                shared=put.shared,
            )
            book.output(name, state.output_tokens)

    def _leave(self, router: int, other: _Router, key: int) -> None:
        put = other.pop(key)
        book = self._books.get(put.model) if put is not None else None
        if book is not None:
            book.free((router, key))
