"""Load books that several routers share: what is lost or late is made up for by the next digest."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from vswa_plugin.router.replicas import messages as load_messages
from vswa_plugin.router.replicas.load import SharedLoad
from vswa_plugin.router.replicas.messages import Digest, State, encode
from vswa_plugin.selection import Load, LoadBook
from vswa_plugin.wire.events import Rank

A, B = Rank(1), Rank(2, 1)
MODELS = ("m", "n")


class Net:
    """Routers 1.. that reach each other through queues, one per direction, in order."""

    def __init__(self, count: int) -> None:
        self.now = 0.0
        self.loads = {router: SharedLoad(router) for router in range(1, count + 1)}
        self.books = {
            (router, model): load.book(model, 16) for router, load in self.loads.items() for model in MODELS
        }
        self.queues: dict[tuple[int, int], list[bytes]] = {}
        self._keys = 0

    def send(self, router: int, lost: bool = False) -> None:
        """Say what there is to say, or lose it."""
        for payload in self.loads[router].take():
            for other in self.loads:
                if other != router and not lost:
                    self.queues.setdefault((router, other), []).append(payload)

    def deliver(self, source: int, target: int) -> None:
        for payload in self.queues.pop((source, target), []):
            if target in self.loads:
                self.loads[target].receive(payload, self.now)

    def settle(self) -> None:
        """Until nobody has anything to say."""
        while any(self.queues.values()) or any(self._quiet()):
            for router in self.loads:
                self.send(router)
            for pair in list(self.queues):
                self.deliver(*pair)

    def digests(self) -> None:
        """One interval later everybody sends a digest, and nothing is lost any more."""
        self.now += 1.0
        for load in self.loads.values():
            load.tick(self.now, True)
        self.settle()

    def begin(self, router: int, model: str, rank: Rank, hashes: range, prefill: int, shared: bool) -> int:
        self._keys += 1
        size = 16 * len(hashes) + 3
        self.books[router, model].add(
            self._keys, rank, tuple(hashes), size, prefill, cached_blocks=1, shared=shared
        )
        return self._keys

    def _quiet(self) -> Iterator[bool]:
        for load in self.loads.values():
            yield bool(load._changed or load._wants or load._digest_due)


def loads_of(book: LoadBook) -> dict[Rank, Load]:
    return {rank: book.load(rank) for rank in (A, B)}


class Sum:
    """One book with all that is under way, whosever it is: what every router must have."""

    def __init__(self) -> None:
        self.books = {model: LoadBook(16) for model in MODELS}

    def equals(self, net: Net) -> bool:
        return all(
            loads_of(net.books[router, model]) == loads_of(book)
            and all(
                net.books[router, model].projected(rank, range(start, start + 9), 1)
                == book.projected(rank, range(start, start + 9), 1)
                for rank in (A, B)
                for start in (0, 100)
            )
            for router in net.loads
            for model, book in self.books.items()
        )


OPERATION = st.one_of(
    st.tuples(
        st.just("begin"),
        st.integers(0, 7),
        st.sampled_from(MODELS),
        st.sampled_from((A, B)),
        st.sampled_from((range(0, 6), range(0, 9), range(100, 104))),
        st.sampled_from((0, 40)),
        st.booleans(),
    ),
    st.tuples(st.sampled_from(("first", "free")), st.integers(0, 200)),
    st.tuples(st.just("output"), st.integers(0, 200), st.integers(1, 40)),
    st.tuples(st.just("send"), st.integers(0, 7), st.booleans()),
    st.tuples(st.just("deliver"), st.integers(0, 7), st.integers(0, 7), st.booleans()),
    st.tuples(st.just("tick"), st.integers(0, 7)),
    st.tuples(st.just("drop"), st.sampled_from((1, 2))),
)


def perform(net: Net, total: Sum, live: dict[int, tuple[int, str]], operation: tuple) -> None:  # type: ignore[type-arg]
    kind, *arguments = operation
    routers = sorted(net.loads)
    if kind == "begin":
        router, model, rank, hashes, prefill, shared = arguments
        router = routers[router % len(routers)]
        key = net.begin(router, model, rank, hashes, prefill, shared)
        live[key] = (router, model)
        total.books[model].add(
            key, rank, hashes, 16 * len(hashes) + 3, prefill, cached_blocks=1, shared=shared
        )
    elif kind == "send":
        net.send(routers[arguments[0] % len(routers)], lost=arguments[1])
    elif kind == "deliver":
        source, target, lost = arguments
        pair = routers[source % len(routers)], routers[target % len(routers)]
        if lost:
            net.queues.pop(pair, None)
        else:
            net.deliver(*pair)
    elif kind == "tick":
        net.now += 0.3
        net.loads[routers[arguments[0] % len(routers)]].tick(net.now, True)
    elif kind == "drop":  # every router sees the worker leave
        for book in (*net.books.values(), *total.books.values()):
            book.drop(arguments[0])
    elif live:
        key = sorted(live)[arguments[0] % len(live)]
        router, model = live[key]
        for book in (net.books[router, model], total.books[model]):
            step(book, kind, key, *arguments[1:])
        if kind == "free":
            del live[key]


def step(book: LoadBook, kind: str, key: int, *arguments: object) -> None:
    if kind == "first":
        book.first_token(key)
    elif kind == "output":
        book.output(key, arguments[0])  # type: ignore[arg-type]
    else:
        book.free(key)


@examples(250)
@given(st.integers(2, 3), st.lists(OPERATION, max_size=40))
def test_after_any_loss_that_ends_every_book_is_the_sum_of_what_all_have_under_way(
    count: int,
    operations: list[tuple],  # type: ignore[type-arg]
) -> None:
    net, total = Net(count), Sum()
    net.digests()
    live: dict[int, tuple[int, str]] = {}
    for operation in operations:
        perform(net, total, live, operation)
    net.digests()

    assert total.equals(net)
    for load in net.loads.values():
        assert load.stats.malformed == load.stats.left_out == 0
    for router in net.loads:  # and all of it ends with its request
        for key, (owner, model) in live.items():
            if owner == router:
                net.books[router, model].free(key)
    net.settle()
    assert {Load()} == {load for book in net.books.values() for load in loads_of(book).values()}


def pair(router_requests: int = 0) -> tuple[Net, list[int]]:
    """Two routers that know each other; the first has so many requests under way."""
    net = Net(2)
    net.digests()
    keys = [net.begin(1, "m", A, range(n, n + 4), 40, True) for n in range(0, 10 * router_requests, 10)]
    net.settle()
    return net, keys


def test_each_step_of_a_request_is_told_at_once() -> None:
    net, (key,) = pair(1)
    theirs, ours = net.books[2, "m"], net.books[1, "m"]

    seen = [theirs.load(A)]
    for kind, arguments in (("first", ()), ("output", (30,)), ("free", ())):
        step(ours, kind, key, *arguments)
        net.settle()
        seen.append(theirs.load(A))
        assert theirs.load(A) == ours.load(A)

    assert seen == [Load(4, 40, 1), Load(4, 0, 1), Load(6, 0, 1), Load()]


def test_what_is_computed_elsewhere_for_another_router_counts_as_in_flight_here() -> None:
    net, _ = pair(1)

    assert net.books[2, "m"].projected(A, range(4), 1).in_flight_blocks == 3


def test_nothing_is_told_but_presence_while_nobody_else_is_there() -> None:
    load = SharedLoad(7)
    load.book("m", 16).add(1, A, (1, 2), 40, 40)
    load.tick(0.0, True)
    (payload,) = load.take()

    assert load_messages.decode(payload).words == (Digest(0, 0, ()),)
    assert load.take() == []


def test_a_router_that_comes_later_learns_all_in_one_exchange() -> None:
    net, _ = pair(5)
    net.loads[3] = SharedLoad(3)
    net.books |= {(3, model): net.loads[3].book(model, 16) for model in MODELS}
    net.loads[3].tick(net.now, True)
    net.settle()

    assert net.books[3, "m"].load(A) == net.books[1, "m"].load(A) == Load(20, 200, 5)


def test_a_book_that_is_made_later_begins_with_what_the_others_have() -> None:
    net, _ = pair(2)
    made = net.loads[2].book("m", 16)

    assert made.load(A) == Load(8, 80, 2)


def test_a_router_that_says_of_a_request_that_it_is_elsewhere_is_believed() -> None:
    net, (key,) = pair(1)
    (payload,) = encode(1, [State(key, *B, 40, 20)])
    net.loads[2].receive(payload, net.now)

    assert loads_of(net.books[2, "m"]) == {A: Load(), B: Load(5, 40, 1)}


def test_what_is_on_a_worker_that_only_we_thought_gone_comes_back_with_the_next_digest() -> None:
    net, _ = pair(1)
    net.books[2, "m"].drop(A.worker_id)
    gone = net.books[2, "m"].load(A)
    net.digests()

    assert (gone, net.books[2, "m"].load(A)) == (Load(), Load(4, 40, 1))


def test_a_router_does_not_count_itself_twice() -> None:
    net, _ = pair(1)
    net.loads[1].tick(net.now, True)
    for payload in net.loads[1].take():
        net.loads[1].receive(payload, net.now)

    assert net.loads[1].others.keys() == {2}


def test_a_silent_router_has_nothing_under_way_after_three_and_a_half_intervals() -> None:
    net, _ = pair(2)
    there = []
    for _ in range(4):
        net.now += 1.0
        net.loads[2].tick(net.now, True)
        there.append(net.books[2, "m"].load(A).requests)

    assert there == [2, 2, 2, 0]
    assert net.loads[2].stats.expired == 1


@pytest.mark.parametrize("fault", ["disconnected", "held up"])
def test_silence_counts_only_while_we_could_have_heard(fault: str) -> None:
    net, _ = pair(2)
    if fault == "disconnected":
        for _ in range(10):
            net.now += 1.0
            net.loads[2].tick(net.now, False)
    else:
        net.now += 10.0
        net.loads[2].tick(net.now, True)

    assert net.books[2, "m"].load(A).requests == 2


def test_a_router_that_says_goodbye_is_gone_at_once() -> None:
    net, _ = pair(2)
    net.loads[2].receive(net.loads[1].farewell(), net.now)

    assert net.books[2, "m"].load(A) == Load()


def test_a_long_digest_comes_in_parts_that_repair_their_own_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_messages, "MAX_KEYS", 4)
    net, keys = pair(10)
    for key in keys[::3]:
        net.books[1, "m"].free(key)
    net.send(1, lost=True)
    net.loads[1].tick(net.now, True)
    digests = [word for payload in net.loads[1].take() for word in load_messages.decode(payload).words]
    for word in reversed(digests):
        (payload,) = encode(1, [word])
        net.loads[2].receive(payload, net.now)

    assert [len(word.states) for word in digests if isinstance(word, Digest)] == [4, 2]
    assert all(a.end == b.first for a, b in pairwise(d for d in digests if isinstance(d, Digest)))
    assert net.books[2, "m"].load(A) == net.books[1, "m"].load(A) == Load(24, 240, 6)
