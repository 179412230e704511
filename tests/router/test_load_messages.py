"""What other routers say of their load is bounded and may be garbage: it is counted, and does no harm."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.router.replicas.test_replicas import A, loads_of, pair
from vswa_plugin.router.replicas import load as shared_load
from vswa_plugin.router.replicas.load import SharedBook, SharedLoad
from vswa_plugin.router.replicas.messages import LOAD_VERSION, Digest, Free, Message, Put, State, encode
from vswa_plugin.selection import Load


def put(key: int, **changes: object) -> bytes:
    made = Put(State(key, 1, 0, 40), "m", (1, 2), 40, 0, True)
    (payload,) = encode(1, [msgspec.structs.replace(made, **changes)])
    return payload


WHOLE = put(1)
UNREADABLE = {
    "empty": b"",
    "cut": WHOLE[:-3],
    "no array": msgspec.msgpack.encode({"version": LOAD_VERSION}),
    "unknown word": msgspec.msgpack.encode([LOAD_VERSION, 1, [["later", 1]]]),
    "negative": msgspec.msgpack.encode([LOAD_VERSION, 1, [["free", -1]]]),
    "deep": b"\x91" * 5_000,
    "oversized": msgspec.msgpack.encode(Message(LOAD_VERSION, 1, (Free(2**60),) * 60_000)),
    "too many hashes": msgspec.msgpack.encode(
        [LOAD_VERSION, 1, [["put", ["state", 1, 1, 0, 1], "m", [1] * 40_000, 1, 0, True]]]
    ),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_counted_and_changes_nothing(kind: str) -> None:
    net, _ = pair(1)
    before = loads_of(net.books[2, "m"])
    net.loads[2].receive(UNREADABLE[kind], net.now)

    assert net.loads[2].stats.malformed == 1, len(UNREADABLE[kind])
    assert loads_of(net.books[2, "m"]) == before


def test_another_version_is_counted_apart_whatever_it_looks_like() -> None:
    net, _ = pair(1)
    net.loads[2].receive(msgspec.msgpack.encode([LOAD_VERSION + 1, {"what": "ever"}]), net.now)

    assert (net.loads[2].stats.foreign_version, net.loads[2].stats.malformed) == (1, 0)


@given(st.binary(max_size=60))
@example(b"\x93\x01\x05\x91\x91\xa1\x80").via("a tag that is not UTF-8")
def test_no_bytes_break_a_router(payload: bytes) -> None:
    load = SharedLoad(2)
    book = load.book("m", 16)
    load.receive(payload, 0.0)
    load.receive(WHOLE[:3] + payload, 0.0)

    assert book.load(A).requests <= 1


def test_routers_and_requests_above_the_limits_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_load, "MAX_ROUTERS", 2)
    monkeypatch.setattr(shared_load, "MAX_REQUESTS", 3)
    load = SharedLoad(9)
    book = load.book("m", 16)
    for router in (1, 2, 3):
        (payload,) = encode(router, [Put(State(n, 1, 0, 0), "m", (n,), 16, 0, True) for n in range(5)])
        load.receive(payload, 0.0)

    assert book.load(A).requests == 6
    assert load.stats.left_out == 2 + 2 + 1


def test_what_is_kept_of_one_router_and_of_all_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_load, "MAX_ROUTER_HASHES", 40)
    monkeypatch.setattr(shared_load, "MAX_ALL_HASHES", 60)
    load = SharedLoad(9)
    load.book("m", 16)
    for router in (1, 2):
        puts = [
            Put(State(n, 1, 0, 0), "m", tuple(range(20 * n, 20 * n + 20)), 320, 0, True) for n in range(4)
        ]
        for payload in encode(router, puts):
            load.receive(payload, 0.0)

    kept = {
        router: [len(put.hashes) for put in other.requests.values()] for router, other in load.others.items()
    }
    assert {1: [20, 4], 2: [12]} == kept, "each counts as 8 hashes besides its own"
    assert 2 + 3 == load.stats.left_out


def test_what_there_is_no_room_for_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_load, "MAX_ROUTER_HASHES", 15)
    load = SharedLoad(9)
    load.book("m", 16)
    for word in (
        Put(State(1, 1, 0, 0), "m", (1, 2, 3), 48, 0, True),
        Digest(0, None, (State(1, 1, 0, 0), State(2, 1, 0, 0))),
    ):
        (payload,) = encode(1, [word])
        load.receive(payload, 0.0)
    load.take()

    assert 0 == load.stats.wanted


def test_room_comes_back_when_requests_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_load, "MAX_ROUTER_HASHES", 20)
    load = SharedLoad(9)
    book = load.book("m", 16)
    for key in range(10):
        (payload,) = encode(1, [Put(State(key, 1, 0, 0), "m", tuple(range(12)), 192, 0, True), Free(key)])
        load.receive(payload, 0.0)
        assert 0 == load.others[1].hashes

    assert (0, Load()) == (load.stats.left_out, book.load(A))


def test_a_router_is_heard_on_its_own_subject_only() -> None:
    load = SharedLoad(9)
    book = load.book("m", 16)
    load.receive(WHOLE, 0.0, "2")
    assert (1, Load()) == (load.stats.foreign_subject, book.load(A))

    load.receive(WHOLE, 0.0, "1")
    assert 1 == book.load(A).requests


def test_a_repeated_request_counts_once_and_an_unknown_end_is_no_matter() -> None:
    load = SharedLoad(9)
    book = load.book("m", 16)
    (unknown,) = encode(1, [Free(99)])
    for payload in (WHOLE, WHOLE, unknown):
        load.receive(payload, 0.0)

    assert book.load(A) == Load(2, 40, 1)


def test_only_whole_block_names_travel() -> None:
    assert "token_ids" not in {name for kind in (Put, State, Digest) for name in kind.__struct_fields__}
    assert isinstance(SharedLoad(1).book("m", 16), SharedBook)
