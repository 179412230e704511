"""The prefill side against decode workers that vanish, fall silent or answer nonsense."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from vswa_plugins.gemma3_cpu.transfer.messages import (
    Ack,
    Done,
    Nack,
    decode_answer,
)
from vswa_plugins.gemma3_cpu.transfer.server import ServerOptions
from vswa_plugins.gemma3_cpu.transfer.tickets import Outcome
from vswa_plugins.gemma3_cpu.transfer.wire import Connection

from tests.gemma3_transfer_helpers import (
    HUGE,
    QUICK,
    Prefill,
    ask,
    connect,
    read_all,
    read_huge,
)


def silent_from_the_start(connection: Connection) -> None:
    """Takes no byte of what it asked for."""


def silent_at_the_end(connection: Connection) -> None:
    read_all(connection)


@pytest.mark.parametrize("behave", [silent_from_the_start, silent_at_the_end])
def test_a_decode_worker_that_falls_silent_is_cut_and_the_blocks_are_freed(
    behave: Callable[[Connection], None],
) -> None:
    with Prefill(ServerOptions(timeouts=QUICK)) as prefill:
        ticket = prefill.offer(read_huge, HUGE)
        with connect(prefill.server.address) as connection:
            ask(connection, ticket, ((0, 32),))
            behave(connection)
            assert (ticket, Outcome.FAILED) == prefill.released()[:2]


def leaves(connection: Connection) -> None:
    connection.receive(decode_answer)


def leaves_at_the_end(connection: Connection) -> None:
    read_all(connection)


def gives_up(connection: Connection) -> None:
    read_all(connection)
    connection.send(Nack("no room"))


def acknowledges_less(connection: Connection) -> None:
    connection.send(Ack(read_all(connection) - 1))


def acknowledges_nonsense(connection: Connection) -> None:
    read_all(connection)
    connection.send(Done(1))


def acknowledges_at_length(connection: Connection) -> None:
    read_all(connection)
    connection.send_bytes(b"\xff" * 100)


@pytest.mark.parametrize(
    "behave",
    [leaves, leaves_at_the_end, gives_up, acknowledges_less, acknowledges_nonsense, acknowledges_at_length],
)
def test_without_an_acknowledgement_of_all_of_it_a_transfer_has_failed(
    behave: Callable[[Connection], None],
) -> None:
    with Prefill() as prefill:
        ticket = prefill.offer(read_huge, HUGE)
        with connect(prefill.server.address) as connection:
            ask(connection, ticket, ((0, 32),))
            behave(connection)

        assert (ticket, Outcome.FAILED) == prefill.released()[:2]


def test_the_reason_of_a_decode_worker_that_gives_up_is_logged() -> None:
    with Prefill() as prefill:
        ticket = prefill.offer()
        with connect(prefill.server.address) as connection:
            ask(connection, ticket)
            read_all(connection)
            connection.send(Nack("no room\nleft"))
        prefill.released()

        assert any(r"the decode worker gave up: 'no room\nleft'" in line for line in prefill.log)
