"""The decode side against prefill workers that misbehave, and against a network that does.

Whatever comes: only whole, checked blocks that were asked for are stored, and all else is a TransferError.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import msgspec
import pytest
from vswa_plugins.gemma3_cpu.transfer import client, plan
from vswa_plugins.gemma3_cpu.transfer.client import Cancellation, PullRequest, pull
from vswa_plugins.gemma3_cpu.transfer.errors import TransferError
from vswa_plugins.gemma3_cpu.transfer.messages import (
    LENGTH,
    MAX_HEADER_BYTES,
    Ack,
    BlocksHeader,
    Done,
    Nack,
    PullRefused,
    decode_verdict,
    frame,
)
from vswa_plugins.gemma3_cpu.transfer.wire import Connection, Timeouts

from tests.gemma3_transfer_helpers import (
    FINGERPRINT,
    OFFERED,
    PATIENT,
    QUICK,
    TOTAL,
    Decode,
    Prefill,
    content,
    expected_blocks,
    header,
    peer,
    prefill_script,
    read_offered,
)

TICKET = "0" * 32


def send_run(connection: Connection, group: int, first: int, stop: int) -> None:
    data = bytes(read_offered(group, first, stop))
    connection.send(header(group, first, stop - first, data))
    connection.send_bytes(data)


def send_sliding(connection: Connection) -> None:
    send_run(connection, 0, 6, 10)


def failed_pull(
    script: Callable[[Connection], None], decode: Decode | None = None, timeouts: Timeouts = PATIENT
) -> TransferError:
    """The error of a pull from a prefill worker that follows ``script``."""
    with prefill_script(script) as address, pytest.raises(TransferError) as caught:
        (decode or Decode()).pull(address, TICKET, timeouts)
    assert address == caught.value.address
    assert f"prefill worker at {address[0]}:{address[1]}" in str(caught.value)
    assert str(caught.value).endswith("the prompt will be computed locally")
    return caught.value


def test_a_transfer_is_acknowledged_only_after_the_last_block_is_stored() -> None:
    decode, stored_at_ack = Decode(), []

    def script(connection: Connection) -> None:
        send_sliding(connection)
        send_run(connection, 1, 0, 10)
        connection.send(Done(TOTAL))
        assert Ack(TOTAL) == connection.receive(decode_verdict)
        stored_at_ack.append(dict(decode.blocks))

    with prefill_script(script) as address:
        result = decode.pull(address, TICKET)

    assert [expected_blocks(OFFERED)] == stored_at_ack
    assert (4 * 24, 10 * 40) == result.bytes_per_group
    assert 0 < result.seconds < 5


def wrong_group(connection: Connection) -> None:
    send_run(connection, 1, 6, 10)


def unknown_group(connection: Connection) -> None:
    connection.send(BlocksHeader(2**63, 6, 4, 96, 0))


def wrong_block(connection: Connection) -> None:
    connection.send(header(0, 5, 4, bytes(96)))


def more_blocks(connection: Connection) -> None:
    connection.send(header(0, 6, 5, bytes(120)))


def no_blocks(connection: Connection) -> None:
    connection.send(header(0, 6, 0, b""))


def too_many_bytes(connection: Connection) -> None:
    connection.send(BlocksHeader(0, 6, 4, 97, 0))


def absurdly_many_bytes(connection: Connection) -> None:
    connection.send(BlocksHeader(0, 6, 4, 2**62, 0))


def absurdly_many_blocks(connection: Connection) -> None:
    connection.send(BlocksHeader(0, 6, 2**40, 24 << 40, 0))


def too_few_bytes(connection: Connection) -> None:
    connection.send(header(0, 6, 4, bytes(95)))


@pytest.mark.parametrize(
    "script",
    [
        wrong_group,
        unknown_group,
        wrong_block,
        more_blocks,
        no_blocks,
        too_many_bytes,
        absurdly_many_bytes,
        absurdly_many_blocks,
        too_few_bytes,
    ],
)
def test_blocks_that_were_not_asked_for_are_refused_by_their_header(
    script: Callable[[Connection], None],
) -> None:
    nacks = []

    def whole(connection: Connection) -> None:
        script(connection)
        nacks.append(connection.receive(decode_verdict))

    error = failed_pull(whole, decode := Decode())

    assert "protocol" == error.cause
    assert "cache group 0: expected blocks from 6 to 10" in str(error)
    assert {} == decode.blocks
    assert isinstance(nacks[0], Nack)
    assert nacks[0].reason in str(error)


def test_a_run_that_is_larger_than_any_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "RUN_BYTES", 100)

    def too_large(connection: Connection) -> None:
        send_sliding(connection)
        connection.send(header(1, 0, 3, bytes(120)))

    error = failed_pull(too_large)
    assert "protocol" == error.cause
    assert "runs of at most 96 bytes" in str(error)


def repeats(connection: Connection) -> None:
    send_sliding(connection)
    send_sliding(connection)


def ends_early(connection: Connection) -> None:
    send_sliding(connection)
    connection.send(Done(96))


def goes_on(connection: Connection) -> None:
    send_sliding(connection)
    send_run(connection, 1, 0, 10)
    send_run(connection, 1, 0, 10)


def counts_otherwise(connection: Connection) -> None:
    send_sliding(connection)
    send_run(connection, 1, 0, 10)
    connection.send(Done(TOTAL + 1))


def acknowledges(connection: Connection) -> None:
    connection.send(Ack(0))


def oversized(connection: Connection) -> None:
    connection.send_bytes(LENGTH.pack(MAX_HEADER_BYTES + 1))


def unknown_tag(connection: Connection) -> None:
    payload = msgspec.msgpack.encode(["compressed", 1])
    connection.send_bytes(LENGTH.pack(len(payload)) + payload)


@pytest.mark.parametrize(
    ("script", "what"),
    [
        (repeats, "cache group 1: expected blocks from 0 to 10, got 4 blocks from 6 of cache group 0"),
        (ends_early, "cache group 1: expected blocks from 0 to 10, got the end of the transfer"),
        (goes_on, "expected the end of the transfer after 496 bytes, got more blocks"),
        (counts_otherwise, "expected 496 bytes in all, the prefill worker counts 497"),
        (acknowledges, "expected a run of blocks or the end of the transfer"),
        (oversized, f"expected a message of at most {MAX_HEADER_BYTES} bytes, got one of"),
        (unknown_tag, "expected a run of blocks or the end of the transfer"),
    ],
)
def test_an_answer_that_does_not_fit_ends_the_transfer_saying_what_came(
    script: Callable[[Connection], None], what: str
) -> None:
    error = failed_pull(script)

    assert "protocol" == error.cause
    assert what in str(error)


def test_a_run_whose_checksum_differs_is_never_stored() -> None:
    def script(connection: Connection) -> None:
        send_sliding(connection)
        data = bytearray(read_offered(1, 0, 10))
        connection.send(header(1, 0, 10, bytes(data)))
        data[200] ^= 1
        connection.send_bytes(bytes(data))
        assert isinstance(connection.receive(decode_verdict), Nack)

    error = failed_pull(script, decode := Decode())

    assert "corrupt" == error.cause
    assert "cache group 1, 10 blocks from 0: expected checksum" in str(error)
    assert expected_blocks(OFFERED[:1]) == decode.blocks


def test_a_refusal_is_told_with_its_reason_even_in_the_middle() -> None:
    def script(connection: Connection) -> None:
        send_sliding(connection)
        connection.send(PullRefused("out of\nwords", version=7))

    error = failed_pull(script)

    assert "refused" == error.cause
    assert r"refused (its transfer version is 7): 'out of\nwords'" in str(error)


def closes_at_once(connection: Connection) -> None:
    """Ends without an answer."""


def closes_within_a_length(connection: Connection) -> None:
    connection.send_bytes(b"\0\0")


def closes_within_a_header(connection: Connection) -> None:
    connection.send_bytes(frame(Done(0))[:-1])


def closes_within_a_run(connection: Connection) -> None:
    data = bytes(read_offered(0, 6, 10))
    connection.send(header(0, 6, 4, data))
    connection.send_bytes(data[:-1])


@pytest.mark.parametrize(
    "script", [closes_at_once, closes_within_a_length, closes_within_a_header, closes_within_a_run]
)
def test_a_connection_that_ends_early_is_lost_and_the_cut_run_is_not_stored(
    script: Callable[[Connection], None],
) -> None:
    error = failed_pull(script, decode := Decode())

    assert "lost" == error.cause
    assert {} == decode.blocks


@pytest.mark.parametrize("first", [b"", b"\0", frame(BlocksHeader(0, 6, 4, 96, 0)) + b"x" * 95])
def test_a_prefill_worker_that_falls_silent_is_given_up(first: bytes) -> None:
    def script(raw: socket.socket) -> None:
        raw.sendall(first)
        while raw.recv(100):
            pass

    with peer(script) as address, pytest.raises(TransferError, match="in time") as caught:
        Decode().pull(address, TICKET, QUICK)

    assert "timeout" == caught.value.cause


def test_a_prefill_worker_that_is_always_just_in_time_is_given_up_in_the_end() -> None:
    sizes = (plan.GroupBlocks(range(1000), 8),)
    timeouts = Timeouts(connect_s=1.0, io_s=0.3, total_s=0.5)

    def script(connection: Connection) -> None:
        gone = 0
        while gone < 1000:
            connection.send(header(0, gone, 1, content(0, gone, 8)))
            connection.send_bytes(content(0, gone, 8))
            gone += 1
            try:
                connection.receive(decode_verdict, within_s=0.05)
            except TimeoutError:
                continue
            except OSError:
                return

    started = time.monotonic()
    error = failed_pull(script, Decode(groups=sizes), timeouts)

    assert "timeout" == error.cause
    assert 0.5 <= time.monotonic() - started < 1.5


def test_where_nobody_listens_the_prompt_is_computed_locally() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()[:2]
    for where in (address, ("no such host!", 1), ("a" * 300, 1), ("127.0.0.1", 70_000)):
        with pytest.raises(TransferError, match="expected a connection within 5") as caught:
            Decode().pull(where, TICKET)
        assert "connect" == caught.value.cause


def test_a_block_that_cannot_be_stored_ends_the_transfer_and_the_prefill_worker_hears_of_it() -> None:
    def write(group: int, first: int, data: memoryview) -> None:
        raise ValueError("no page")

    with Prefill() as prefill:
        request = PullRequest(prefill.server.address, prefill.offer(), FINGERPRINT, OFFERED, write)
        with pytest.raises(TransferError, match="could not be stored: ValueError: no page") as caught:
            pull(request)

        assert "write" == caught.value.cause
        assert "failed" == prefill.released()[1]


def test_a_request_and_its_errors_never_show_the_ticket() -> None:
    ticket = "0123456789abcdef" * 2
    request = Decode().request(("127.0.0.1", 1), ticket)
    with pytest.raises(TransferError) as caught:
        pull(request)

    assert ticket not in repr(request)
    assert ticket not in repr(caught.value)


def test_a_cancelled_pull_ends_wherever_it_is() -> None:
    cancellation = Cancellation()

    def script(connection: Connection) -> None:
        send_sliding(connection)
        cancellation.cancel()
        with pytest.raises(ConnectionError):
            connection.receive(decode_verdict)

    decode = Decode()
    with prefill_script(script) as address, pytest.raises(TransferError) as caught:
        pull(decode.request(address, TICKET), PATIENT, cancellation)

    assert "cancelled" == caught.value.cause
    assert not [key for key in decode.blocks if key[0] == 1]


def test_a_pull_that_is_cancelled_before_it_begins_asks_for_nothing() -> None:
    cancellation = Cancellation()
    cancellation.cancel()
    with Prefill() as prefill:
        ticket = prefill.offer()
        with pytest.raises(TransferError) as caught:
            pull(Decode().request(prefill.server.address, ticket), PATIENT, cancellation)

        assert "cancelled" == caught.value.cause
        assert 0 == prefill.server.counts().taken


def test_buffers_are_as_large_as_this_side_needs_whatever_the_peer_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []

    class Counted(bytearray):
        def __init__(self, size: int) -> None:
            made.append(size)
            super().__init__(size)

    monkeypatch.setattr(client, "bytearray", Counted, raising=False)
    failed_pull(absurdly_many_bytes)

    assert [400] == made
