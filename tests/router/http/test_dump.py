"""All that the index holds, over HTTP: whole, bounded, and never in the way of routing."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from tests.e2e_helpers import eventually
from tests.index_helpers import BOTH_PATHS
from tests.router_http_helpers import A1, HASHES, A, Api, B, run, stored
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.following.fleet import Fleet
from vswa_plugin.index import WindowIndex
from vswa_plugin.registry.file import FileRegistry
from vswa_plugin.router.http import dump, messages, server
from vswa_plugin.router.http.dump import DumpQuery
from vswa_plugin.wire.events import Moved, Removed, Stored
from vswa_plugin.wire.transport import Transport


@pytest.mark.parametrize("piece", [2, 8_192])
def test_a_dump_is_all_that_is_held_and_can_be_loaded_again(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dump, "PIECE", piece)

    async def body() -> tuple[Any, Any]:
        async with Api() as api:
            await api.holds(
                A, stored(sliding=[0, 1, 5], whole=range(8)) + stored(sliding=[6, 7], tier="host")
            )
            await api.holds(A1)
            await api.holds(B, stored(whole=range(5)))
            return (await api.get("/dump"))[1], api.fleet.index

    dumped, index = run(body())
    loaded = WindowIndex.load(dumped)

    msgspec.convert(dumped, messages.DumpAnswer)
    assert {rank: loaded.contents(rank) for rank in loaded.ranks} == {
        rank: index.contents(rank) for rank in index.ranks
    }
    assert dumped["ranks"][0]["groups"][0]["blocks"] == {
        "device": sorted([*HASHES[0:2], HASHES[5]]),
        "host": sorted(HASHES[6:8]),
    }
    assert [group["window"] for group in dumped["ranks"][0]["groups"]] == ["32", "global"]
    assert (dumped["ranks"][0]["epoch"], dumped["ranks"][0]["next_event_id"]) == (5, 14)


def test_a_dump_of_some_and_of_none() -> None:
    async def body() -> list[Any]:
        async with Api() as api:
            await api.all_live()
            asked = ("worker_id=1", "worker_id=1&dp_rank=1", "model_name=other", "worker_id=x")
            return [await api.get(f"/dump?{each}") for each in asked]

    found = run(body())

    assert [status for status, _ in found] == [200, 200, 200, 400]
    assert [len(answer["ranks"]) for _, answer in found[:3]] == [2, 1, 0]
    assert (
        "worker_id: expected a whole number of at most 18446744073709551615, got 'x'" in found[3][1]["error"]
    )


def test_a_dump_that_is_too_much_at_once_says_how_to_ask_for_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank, and every window, looks at all blocks of its windows: 1 and 16."""
    monkeypatch.setattr(dump, "MAX_VISITS", 16)

    async def body() -> list[Any]:
        async with Api() as api:
            await api.all_live()
            await api.holds(B, stored(sliding=[0], whole=range(8)))
            await api.holds(A, [Stored(1, 0, None, tuple(range(1, 9)))])
            asked = ("", "worker_id=2", "worker_id=2&group_id=1", "worker_id=1&group_id=1", "group_id=0")
            return [await api.get(f"/dump?{each}") for each in asked]

    found = run(body())

    assert [status for status, _ in found] == [413, 413, 200, 413, 200]
    assert "got 3 ranks and 51; ask for one worker with ?worker_id=" in found[0][1]["error"]
    assert "got 1 ranks and 17" in found[1][1]["error"], "one rank is bounded too"
    shown = [
        [len(group["blocks"]["device"]) for group in found[at][1]["ranks"][-1]["groups"]] for at in (2, 4)
    ]
    assert shown == [[8], [1]]


def test_one_dump_at_a_time() -> None:
    async def body() -> Any:
        async with Api() as api:
            await api.all_live()
            api.server._dumping = True
            return await api.get("/dump")

    assert run(body())[0] == 503


def spread(count: int) -> list[int]:
    """As evenly as hashes are."""
    return [number * 0x9E3779B97F4A7C15 % 2**64 for number in range(count)]


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 40, 1_000])
def test_hashes_come_in_ascending_order_in_small_runs(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dump, "PIECE", 8)
    pieces = list(dump._tiers(dump._Taken(count, iter([spread(count)]), [], [])))

    shown = json.loads(b"{" + b"".join(pieces) + b"}")
    assert shown == ({"device": sorted(spread(count))} if count else {})
    assert max(piece.count(b",") for piece in pieces) <= 2 * 8


def test_a_dump_gives_way_after_every_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dump, "PIECE", 8)

    async def body() -> tuple[int, int]:
        async with Api() as api:
            await api.all_live()
            api.fleet.index.apply(B, Stored(1, 0, None, tuple(spread(1_000))))
            turns = 0

            async def routing() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            other = asyncio.create_task(routing())
            pieces = [piece async for piece in dump.dump(api.fleet, dump.DumpQuery())]
            other.cancel()
            assert len(json.loads(b"".join(pieces))["ranks"][2]["groups"][1]["blocks"]["device"]) == 1_000
            return turns, len(pieces)

    turns, pieces = run(body())

    assert pieces > 1_000 // 16
    assert turns >= pieces - 2 + 1_000 // 8, "while they are put in order too"


@pytest.mark.parametrize("kernel", BOTH_PATHS)
def test_a_rank_is_shown_as_of_one_moment_while_it_changes(
    kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its blocks come, go and move between any two pieces, in the group being sent and in the next."""
    monkeypatch.setattr(dump, "PIECE", 8)
    names = spread(200)

    async def body() -> tuple[Any, Any]:
        index = WindowIndex(kernel=kernel)
        index.join(A, CacheLayout((CacheGroup(0, 64, 32), CacheGroup(1, None, 32)), "trtllm_v2", "m"))
        for group in (0, 1):
            index.apply(A, Stored(group, 0, None, tuple(names[:100])))
            index.apply(A, Stored(group, 0, None, tuple(names[100:150]), "disk"))
        before, pieces = json.loads(json.dumps(index.dump())), []
        async for piece in dump.dump(
            Fleet(Transport(), FileRegistry("/nonexistent"), index=index), DumpQuery()
        ):
            pieces.append(piece)
            at = len(pieces) % 50
            if at == 1:
                continue  # the first piece comes before any rank is taken in
            for group in (0, 1):
                index.apply(A, Moved(group, (names[at], names[100 + at]), "host"))
                index.apply(A, Removed(group, (names[50 + at], names[149 - at])))
                index.apply(A, Stored(group, 0, None, (names[150 + at],)))
        return before, json.loads(b"".join(pieces))

    before, shown = run(body())

    assert [group["blocks"] for group in before["ranks"][0]["groups"]] == [
        group["blocks"] for group in shown["ranks"][0]["groups"]
    ]


def test_a_dump_gives_way_while_blocks_that_are_not_on_the_device_are_parted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dump, "PIECE", 8)
    names = spread(1_000)
    pieces = list(dump._tiers(dump._Taken(1_000, iter([]), names[:], ["host"] * 1_000)))

    assert pieces.count(b"") >= 1_000 // 8
    assert {"host": sorted(names)} == json.loads(b"{" + b"".join(pieces) + b"}")


def test_a_client_that_does_not_read_is_waited_for_and_left_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "DUMP_TIMEOUT_S", 0.5)
    monkeypatch.setattr(dump, "PIECE", 512)
    encoded = 0
    real = dump.dump

    async def counted(*arguments: Any) -> AsyncIterator[bytes]:
        nonlocal encoded
        async for piece in real(*arguments):
            encoded += len(piece)
            yield piece

    monkeypatch.setattr(server, "dump", counted)

    async def body() -> None:
        loop = asyncio.get_running_loop()
        async with Api() as api:
            await api.all_live()
            api.fleet.index.apply(B, Stored(1, 0, None, tuple(spread(50_000))))
            assert api.server._runner is not None
            for site in api.server._runner.sites:  # what it accepts has its buffers
                site._server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)  # type: ignore[attr-defined]
            with socket.socket() as lazy:
                lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
                lazy.setblocking(False)
                await loop.sock_connect(lazy, ("127.0.0.1", int(api.url.rpartition(":")[2])))
                await loop.sock_sendall(lazy, b"GET /dump HTTP/1.1\r\nHost: router\r\n\r\n")
                await eventually(lambda: encoded > 1_000, "it has begun")
                assert (await api.get("/dump"))[0] == 503, "one at a time"
                await eventually(lambda: not api.server._dumping, "it is left")
                got = [b""]
                while data := await loop.sock_recv(lazy, 65_536):
                    got.append(data)
                assert not b"".join(got[-2:]).endswith(b"\r\n0\r\n\r\n"), "it can see that this is not all"
            assert (await api.get("/dump?worker_id=3"))[0] == 200

    run(body())

    assert encoded < 500_000, "of a million bytes no more than what the buffers take"
