"""The prefill side against decode workers of every kind: each offer is served once and released once.

That no offer is released twice or never, and no ticket logged, is checked wherever a ``Prefill`` ends.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vswa_plugins.gemma3_cpu.transfer import plan
from vswa_plugins.gemma3_cpu.transfer.client import PullRequest, pull
from vswa_plugins.gemma3_cpu.transfer.errors import TransferError
from vswa_plugins.gemma3_cpu.transfer.messages import (
    MAX_HEADER_BYTES,
    VERSION,
    Ack,
    Pull,
    PullRefused,
    decode_answer,
    frame,
)
from vswa_plugins.gemma3_cpu.transfer.plan import GroupBlocks
from vswa_plugins.gemma3_cpu.transfer.server import UNKNOWN_TICKET, ServerOptions, TransferServer
from vswa_plugins.gemma3_cpu.transfer.tickets import Outcome
from vswa_plugins.gemma3_cpu.transfer.wire import Connection

from tests.gemma3_transfer_helpers import (
    FINGERPRINT,
    FULL,
    HUGE,
    OFFERED,
    Decode,
    Prefill,
    ask,
    connect,
    expected_blocks,
    read_huge,
    read_offered,
)
from tests.properties import examples
from vswa_plugin.errors import ConfigError, Unavailable


def refusal(connection: Connection) -> str:
    answer = connection.receive(decode_answer)
    assert isinstance(answer, PullRefused)
    return answer.reason


def test_what_is_asked_for_arrives_in_runs_and_is_released_on_acknowledgement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "RUN_BYTES", 100)
    reads: list[tuple[int, int, int]] = []

    def read(group: int, first: int, stop: int) -> bytes:
        reads.append((group, first, stop))
        return bytes(read_offered(group, first, stop))

    with Prefill() as prefill:
        ticket, decode = prefill.offer(read), Decode()
        result = decode.pull(prefill.server.address, ticket)

        assert expected_blocks(OFFERED) == decode.blocks
        assert (4 * 24, 10 * 40) == result.bytes_per_group
        assert (ticket, Outcome.ACKNOWLEDGED, (4 * 24, 10 * 40)) == prefill.released()
        assert [(0, 6, 10), *((1, first, first + 2) for first in range(0, 10, 2))] == reads


@examples(30)
@given(st.data())
def test_any_part_of_the_offer_may_be_asked_for(data: st.DataObject) -> None:
    groups = []
    for group in OFFERED:
        low, high = group.bounds
        first = data.draw(st.integers(low, high))
        groups.append(GroupBlocks(range(first, data.draw(st.integers(first - 1, high))), group.block_bytes))
    wanted = tuple(groups)

    with Prefill() as prefill:
        ticket, decode = prefill.offer(), Decode(groups=wanted)
        result = decode.pull(prefill.server.address, ticket)

        assert expected_blocks(wanted) == decode.blocks
        assert (ticket, Outcome.ACKNOWLEDGED, result.bytes_per_group) == prefill.released()


def test_a_wrong_ticket_a_used_one_and_a_late_one_are_answered_alike_and_cost_nothing() -> None:
    with Prefill() as prefill:
        used, late, good = prefill.offer(), prefill.offer(deadline_s=0.0), prefill.offer()
        Decode().pull(prefill.server.address, used)
        answers = []
        for ticket in ("0" * 32, "", "é" * 64, used, late):
            with connect(prefill.server.address) as connection:
                ask(connection, ticket)
                answers.append(refusal(connection))
        Decode().pull(prefill.server.address, good)

        assert {UNKNOWN_TICKET} == set(answers)
        assert (3, 2, 5, 0) == (
            (counts := prefill.server.counts()).offered,
            counts.taken,
            counts.refused,
            counts.waiting,
        )


def test_of_many_that_bring_one_ticket_at_the_same_time_one_is_served() -> None:
    with Prefill() as prefill, ThreadPoolExecutor(8) as pool:
        ticket = prefill.offer()
        start = threading.Barrier(8)

        def attempt(_: int) -> bool:
            decode = Decode()
            start.wait(5)
            try:
                decode.pull(prefill.server.address, ticket)
            except TransferError as error:
                assert "refused" == error.cause
                assert {} == decode.blocks
                return False
            return expected_blocks(OFFERED) == decode.blocks

        assert 1 == sum(pool.map(attempt, range(8)))


def test_another_fingerprint_is_refused_naming_both_and_the_blocks_are_freed() -> None:
    with Prefill() as prefill:
        ticket = prefill.offer()
        with pytest.raises(TransferError) as caught:
            pull(Decode().request(prefill.server.address, ticket, FINGERPRINT.replace("32", "16")))

        assert "refused" == caught.value.cause
        assert FINGERPRINT in str(caught.value)
        assert FINGERPRINT.replace("32", "16") in str(caught.value)
        assert str(caught.value).endswith("the prompt will be computed locally")
        assert (ticket, Outcome.FAILED, (0, 0)) == prefill.released()


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (((5, 10), (0, 10)), r"cache group 0: expected blocks within [6, 10), got [5, 10)"),
        (((6, 10), (0, 11)), r"cache group 1: expected blocks within [0, 10), got [0, 11)"),
        (((6, 10), (7, 3)), r"cache group 1: expected blocks within [0, 10), got [7, 3)"),
        (((6, 10), (2**63, 2**64 - 1)), "cache group 1: expected blocks within [0, 10), got"),
        (((6, 10),), "expected ranges for 2 cache groups, got 1"),
        ((), "expected ranges for 2 cache groups, got 0"),
    ],
)
def test_blocks_that_are_not_offered_are_refused_and_the_offer_is_freed(
    ranges: tuple[tuple[int, int], ...], message: str
) -> None:
    with Prefill() as prefill:
        ticket = prefill.offer()
        with connect(prefill.server.address) as connection:
            ask(connection, ticket, ranges)

            assert message in refusal(connection)
            assert (ticket, Outcome.FAILED, (0, 0)) == prefill.released()


def test_a_foreign_version_is_refused_and_the_ticket_stays_good() -> None:
    with Prefill() as prefill:
        ticket = prefill.offer()
        with connect(prefill.server.address) as connection:
            connection.send(Pull(VERSION + 1, ticket, FINGERPRINT, FULL))
            assert "expected a pull of transfer version 1, got version 2" in refusal(connection)
        Decode().pull(prefill.server.address, ticket)


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (struct.pack(">I", MAX_HEADER_BYTES + 1), f"at most {MAX_HEADER_BYTES} bytes, got one of"),
        (b"GET / HTTP/1.1\r\n", "expected a message of at most"),
        (struct.pack(">I", 0), "expected a pull, got 0 bytes"),
        (frame(Ack(5)), "expected a pull, got"),
    ],
)
def test_what_is_no_pull_is_refused_unread(sent: bytes, message: str) -> None:
    with Prefill() as prefill, connect(prefill.server.address) as connection:
        connection.send_bytes(sent)

        assert message in refusal(connection)


def test_a_truncated_pull_harms_nobody() -> None:
    with Prefill() as prefill:
        ticket = prefill.offer()
        whole = frame(Pull(VERSION, ticket, FINGERPRINT, FULL))
        for length in (0, 3, 4, len(whole) - 1):
            with socket.create_connection(prefill.server.address) as raw:
                raw.sendall(whole[:length])
        Decode().pull(prefill.server.address, ticket)


def test_who_says_nothing_or_trickles_is_cut_and_makes_room_for_others() -> None:
    options = ServerOptions(max_connections=2, hello_s=0.2)
    with (
        Prefill(options) as prefill,
        socket.create_connection(prefill.server.address) as silent,
        socket.create_connection(prefill.server.address) as trickling,
    ):
        started = time.monotonic()
        trickling.settimeout(0.05)
        with pytest.raises(ConnectionError):
            while time.monotonic() < started + 3:
                trickling.sendall(b"\0")
                try:
                    if not trickling.recv(1):
                        raise ConnectionResetError
                except TimeoutError:
                    continue
        assert time.monotonic() - started < 2

        Decode().pull(prefill.server.address, prefill.offer())
        silent.settimeout(1)
        assert b"" == silent.recv(1)


def test_more_peers_than_connections_wait_for_their_turn() -> None:
    inside, allowed = threading.Semaphore(0), threading.Semaphore(0)
    active: list[int] = []

    def read(group: int, first: int, stop: int) -> bytes:
        if group == 0:
            inside.release()
            assert allowed.acquire(timeout=5)
            active.append(prefill.server.counts().moving)
        return bytes(read_offered(group, first, stop))

    with Prefill(ServerOptions(max_connections=2)) as prefill, ThreadPoolExecutor(5) as pool:
        pulls = [pool.submit(Decode().pull, prefill.server.address, prefill.offer(read)) for _ in range(5)]
        for _ in pulls:
            assert inside.acquire(timeout=5)
            allowed.release()
        for each in pulls:
            each.result(5)

        assert max(active) <= 2


def test_a_ticket_that_nobody_brings_is_freed_at_its_deadline_the_earliest_first() -> None:
    with Prefill() as prefill:
        late = prefill.offer(deadline_s=0.2)
        early = prefill.offer(deadline_s=0.05)
        prefill.offer(deadline_s=float("inf"))

        assert (early, Outcome.EXPIRED, (0, 0)) == prefill.released()
        assert (late, Outcome.EXPIRED, (0, 0)) == prefill.released()
        assert 1 == prefill.server.counts().waiting


def test_a_transfer_under_way_outlives_the_deadline_of_its_ticket() -> None:
    with Prefill() as prefill:
        expired = threading.Event()

        def read(group: int, first: int, stop: int) -> bytes:
            assert expired.wait(5)
            return bytes(read_offered(group, first, stop))

        ticket = prefill.offer(read, deadline_s=0.1)
        other = prefill.offer(deadline_s=0.15)
        with ThreadPoolExecutor(1) as pool:
            pulling = pool.submit(Decode().pull, prefill.server.address, ticket)
            assert (other, Outcome.EXPIRED) == prefill.released()[:2]
            expired.set()
            pulling.result(5)

        assert (ticket, Outcome.ACKNOWLEDGED) == prefill.released()[:2]


def test_stopping_frees_what_waits_cuts_what_moves_and_takes_no_more_offers() -> None:
    with Prefill() as prefill:
        waiting, moving = prefill.offer(), prefill.offer(read_huge, HUGE)
        with connect(prefill.server.address) as connection:
            ask(connection, moving, ((0, 32),))
            connection.receive(decode_answer)
            started = time.monotonic()
            prefill.server.stop()
            prefill.server.stop()
            assert time.monotonic() - started < 3

            ended = {prefill.released()[:2], prefill.released()[:2]}
            assert {(waiting, Outcome.STOPPED), (moving, Outcome.STOPPED)} == ended
        with pytest.raises(Unavailable, match="has stopped"):
            prefill.offer()
        with pytest.raises(TransferError) as caught:
            Decode().pull(prefill.server.address, waiting)
        assert "connect" == caught.value.cause


def broken_read(group: int, first: int, stop: int) -> bytes:
    raise ZeroDivisionError


def short_read(group: int, first: int, stop: int) -> bytes:
    return bytes(read_offered(group, first, stop))[:-1]


@pytest.mark.parametrize("read", [broken_read, short_read])
def test_blocks_that_cannot_be_read_are_refused_and_freed(read: Callable[[int, int, int], bytes]) -> None:
    with Prefill() as prefill:
        ticket, decode = prefill.offer(read), Decode()
        with pytest.raises(TransferError, match="could not be read") as caught:
            decode.pull(prefill.server.address, ticket)

        assert "refused" == caught.value.cause
        assert {} == decode.blocks
        assert (ticket, Outcome.FAILED, (0, 0)) == prefill.released()


def test_a_callback_that_fails_costs_no_other_offer() -> None:
    with Prefill() as prefill:
        original = prefill._released

        def failing(ticket: str, outcome: Outcome, moved: tuple[int, ...]) -> None:
            original(ticket, outcome, moved)
            raise ZeroDivisionError

        prefill._released = failing  # type: ignore[method-assign]
        prefill.offer(deadline_s=0.0)
        prefill.offer(deadline_s=0.0)
        Decode().pull(prefill.server.address, prefill.offer())

        assert {Outcome.EXPIRED, Outcome.ACKNOWLEDGED} == {prefill.released()[1] for _ in range(3)}


def test_an_address_that_cannot_be_listened_on_is_a_config_error() -> None:
    with Prefill() as prefill:
        for address in (prefill.server.address, ("192.0.2.1", 0), ("127.0.0.1", 70_000)):
            with pytest.raises(ConfigError, match="expected an address of this machine with a free port"):
                TransferServer(*address).start()


def test_it_listens_on_the_loopback_address_unless_told_otherwise() -> None:
    with Prefill() as prefill:
        assert "127.0.0.1" == prefill.server.address[0]
        assert prefill.server.address[1] > 0


def test_an_unpulled_request_may_ask_for_nothing_and_frees_the_blocks_at_once() -> None:
    nothing = tuple(GroupBlocks(range(0), group.block_bytes) for group in OFFERED)
    with Prefill() as prefill:
        ticket = prefill.offer()
        result = pull(PullRequest(prefill.server.address, ticket, FINGERPRINT, nothing, Decode().write))

        assert (0, 0) == result.bytes_per_group
        assert (ticket, Outcome.ACKNOWLEDGED, (0, 0)) == prefill.released()
