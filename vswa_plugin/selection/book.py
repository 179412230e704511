"""The load that this router has put on each rank: a book of its requests under way. Pure.

Prompt blocks that several requests of a rank share count once. Prompt tokens count until the first token,
blocks until the request ends. Every operation costs at most the blocks of one request.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Protocol

import msgspec

from vswa_plugin.errors import InvariantError
from vswa_plugin.wire.events import Rank


class Load(msgspec.Struct, frozen=True, gc=False):
    """What is on a rank, counted by the requests that were given to it.

    :param blocks: held by active requests; shared ones once.
    :param prefill_tokens: of prompts that wait for their first token, without what was cached.
    :param requests: active.
    """

    blocks: int = 0
    prefill_tokens: int = 0
    requests: int = 0


class Projection(msgspec.Struct, frozen=True, gc=False):
    """A prompt on a rank before it is given to it.

    :param new_blocks: of the prompt, those that no active request of the rank holds.
    :param in_flight_blocks: blocks right behind the cached ones that wait there for their first token.
    """

    load: Load
    new_blocks: int
    in_flight_blocks: int = 0


class _Shelf:
    """One rank. Both counts: sequence hash -> active requests, and of these those still in their prompt."""

    __slots__ = ("computing", "keys", "prefill_tokens", "shared", "unshared")

    def __init__(self) -> None:
        self.shared: dict[int, int] = {}
        #: Only blocks that were not cached when the request came.
        self.computing: dict[int, int] = {}
        #: Blocks without a name: output, and prompts that are not assumed to share.
        self.unshared = 0
        self.prefill_tokens = 0
        self.keys: set[Hashable] = set()

    def load(self) -> Load:
        return Load(len(self.shared) + self.unshared, self.prefill_tokens, len(self.keys))


def _run(counts: Mapping[int, int], hashes: Sequence[int], start: int = 0) -> int:
    """Blocks of ``hashes`` from ``start`` on that are counted: a request that has one has all before it."""
    low, high = start, len(hashes)
    if not counts or start >= high or hashes[start] not in counts:
        return 0
    while low < high:
        middle = (low + high) // 2
        if hashes[middle] in counts:
            low = middle + 1
        else:
            high = middle
    return low - start


def _count(counts: dict[int, int], hashes: Iterable[int]) -> None:
    for sequence_hash in hashes:
        counts[sequence_hash] = counts.get(sequence_hash, 0) + 1


def _uncount(counts: dict[int, int], hashes: Iterable[int]) -> None:
    for sequence_hash in hashes:
        remaining = counts[sequence_hash] - 1
        if remaining:
            counts[sequence_hash] = remaining
        else:
            del counts[sequence_hash]


class Booked(msgspec.Struct):
    """One request under way; arguments of :meth:`LoadBook.add`, and how far it is.

    :param prefill_tokens: 0 from its first token on.
    :param output_tokens: generated so far.
    """

    rank: Rank
    hashes: Sequence[int]
    prompt_len: int
    prefill_tokens: int
    cached_blocks: int
    shared: bool
    output_tokens: int = 0

    @property
    def names(self) -> Sequence[int]:
        """Its blocks that count once with those of others."""
        return self.hashes if self.shared else ()

    @property
    def computing(self) -> Sequence[int]:
        """Blocks of its prompt to compute, until the first token."""
        return self.hashes[self.cached_blocks :] if self.prefill_tokens else ()

    def unshared(self, block_size: int) -> int:
        """Its other blocks; the prompt's own last one is not full and not counted."""
        prompt = 0 if self.shared else len(self.hashes)
        total = self.prompt_len + self.output_tokens
        return prompt - (-total // block_size) + (-self.prompt_len // block_size)


class Watcher(Protocol):
    """What is shown all changes of a load book."""

    def sent(self, rank: Rank, key: Hashable, names: Sequence[int], prompt_len: int) -> None: ...
    def first_token(self, key: Hashable) -> None: ...
    def ended(self, key: Hashable) -> None: ...


#: Step of a request: it has been given to a rank.
SENT = "sent"
#: Step of a request: its prompt is computed. One that is cancelled before has no such step.
FIRST_TOKEN = "first_token"
#: Step of a request: it has ended, or its worker has gone.
ENDED = "ended"
#: (key, one of these steps, the request): see :attr:`LoadBook.watch`.
Watch = Callable[[Hashable, str, Booked], None]


class LoadBook:
    """All requests under way, by a key that the caller chooses. Not thread safe.

    :param block_size: tokens per block.
    :ivar watcher: is shown each request that is given to a rank, its first token and its end; None: nobody.
    :ivar watch: called after each such step; None: nobody wants to know.
    """

    def __init__(self, block_size: int) -> None:
        self.watcher: Watcher | None = None
        self.watch: Watch | None = None
        self._block_size = block_size
        self._shelves: dict[Rank, _Shelf] = {}
        self._requests: dict[Hashable, Booked] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def get(self, key: Hashable) -> Booked | None:
        """The request, or None once it is gone."""
        return self._requests.get(key)

    def load(self, rank: Rank) -> Load:
        shelf = self._shelves.get(rank)
        return Load() if shelf is None else shelf.load()

    def projected(
        self, rank: Rank, hashes: Sequence[int], cached_blocks: int = 0, *, shared: bool = True
    ) -> Projection:
        """What is on the rank, and what a prompt would add to it; arguments as in :meth:`add`."""
        shelf = self._shelves.get(rank)
        if shelf is None:
            return Projection(Load(), len(hashes))
        held = _run(shelf.shared, hashes) if shared else 0
        in_flight = _run(shelf.computing, hashes, cached_blocks)
        return Projection(shelf.load(), len(hashes) - held, in_flight)

    def add(
        self,
        key: Hashable,
        rank: Rank,
        hashes: Sequence[int],
        prompt_len: int,
        prefill_tokens: int,
        *,
        cached_blocks: int = 0,
        shared: bool = True,
    ) -> None:
        """A request was given to ``rank``.

        :param hashes: sequence hashes of its prompt's full blocks.
        :param prompt_len: tokens of the prompt.
        :param prefill_tokens: of them, those to compute.
        :param cached_blocks: whole blocks that were cached there.
        :param shared: False: its blocks are counted by themselves, also where others hold them.
        :raises InvariantError: ``key`` is in the book.
        """
        if key in self._requests:
            raise InvariantError(f"load book: expected a new request, got {key!r} again")
        request = Booked(rank, hashes, prompt_len, prefill_tokens, cached_blocks, shared)
        self._requests[key] = request
        shelf = self._shelves.get(rank)
        if shelf is None:
            shelf = self._shelves[rank] = _Shelf()
        shelf.keys.add(key)
        shelf.prefill_tokens += prefill_tokens
        shelf.unshared += request.unshared(self._block_size)
        _count(shelf.shared, request.names)
        _count(shelf.computing, request.computing)
        self._changed(key, True)
        self._tell(key, SENT, request)

    def first_token(self, key: Hashable) -> None:
        """The request's prompt is computed; again, or for a request that is gone, this does nothing."""
        request = self._requests.get(key)
        if request is None:
            return
        if request.prefill_tokens:
            shelf = self._shelves[request.rank]
            shelf.prefill_tokens -= request.prefill_tokens
            _uncount(shelf.computing, request.computing)
            request.prefill_tokens = 0
            self._changed(key)
        self._tell(key, FIRST_TOKEN, request)

    def output(self, key: Hashable, tokens: int) -> None:
        """The request has generated so many tokens more."""
        request = self._requests.get(key)
        if request is not None:
            before = request.unshared(self._block_size)
            request.output_tokens += tokens
            self._shelves[request.rank].unshared += request.unshared(self._block_size) - before
            self._changed(key)

    def free(self, key: Hashable) -> None:
        """The request has ended; again, or for a request that is gone, this does nothing."""
        request = self._requests.pop(key, None)
        if request is None:
            return
        shelf = self._shelves[request.rank]
        shelf.keys.discard(key)
        shelf.prefill_tokens -= request.prefill_tokens
        shelf.unshared -= request.unshared(self._block_size)
        _uncount(shelf.shared, request.names)
        _uncount(shelf.computing, request.computing)
        if not shelf.keys:
            del self._shelves[request.rank]
        self._changed(key)
        self._tell(key, ENDED, request)

    def drop(self, worker_id: int) -> None:
        """The worker is gone with all that was on it."""
        for rank in [rank for rank in self._shelves if rank.worker_id == worker_id]:
            for key in self._shelves.pop(rank).keys:
                request = self._requests.pop(key)
                self._changed(key)
                self._tell(key, ENDED, request)

    def _tell(self, key: Hashable, step: str, request: Booked) -> None:
        if self.watcher is not None:
            if step == SENT:
                self.watcher.sent(request.rank, key, request.hashes, request.prompt_len)
            else:
                (self.watcher.first_token if step == FIRST_TOKEN else self.watcher.ended)(key)
        if self.watch is not None:
            self.watch(key, step, request)

    def _changed(self, key: Hashable, new: bool = False) -> None:
        """A request has come (``new``), is further on, or is gone: for books whose changes are shared."""
