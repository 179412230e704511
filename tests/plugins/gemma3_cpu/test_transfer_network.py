"""Both sides with a faulty network between them: what is stored is right, and each offer ends once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from vswa_plugins.gemma3_cpu.transfer.errors import TransferError
from vswa_plugins.gemma3_cpu.transfer.messages import (
    Done,
    frame,
)
from vswa_plugins.gemma3_cpu.transfer.server import ServerOptions

from tests.gemma3_transfer_helpers import (
    OFFERED,
    QUICK,
    TOTAL,
    Decode,
    Fault,
    Prefill,
    expected_blocks,
    header,
    proxy,
    read_offered,
)
from tests.properties import examples


def pull_through(fault: Fault, deadline_s: float = 10.0) -> tuple[TransferError | None, Decode, str]:
    """What came of a pull through a faulty network: its error, what was stored, how the offer ended."""
    decode = Decode()
    error = None
    options = ServerOptions(hello_s=0.25, timeouts=QUICK)
    with Prefill(options) as prefill:
        ticket = prefill.offer(deadline_s=deadline_s)
        with proxy(prefill.server.address, fault) as address:
            try:
                decode.pull(address, ticket, QUICK)
            except TransferError as caught:
                error = caught
        outcome = prefill.released()[1]
    assert decode.blocks.items() <= expected_blocks(OFFERED).items()
    return error, decode, outcome


def test_a_sound_network_changes_nothing() -> None:
    error, decode, outcome = pull_through(Fault())

    assert error is None
    assert expected_blocks(OFFERED) == decode.blocks
    assert "acknowledged" == outcome


#: What the server sends: two headers and the raw bytes, and the end.
DOWN_BYTES = (
    sum(
        len(frame(message))
        for message in (
            header(0, 6, 4, bytes(read_offered(0, 6, 10))),
            header(1, 0, 10, bytes(read_offered(1, 0, 10))),
            Done(TOTAL),
        )
    )
    + TOTAL
)


@examples(40)
@given(st.integers(0, DOWN_BYTES - 1))
def test_any_byte_that_changes_on_its_way_ends_the_transfer(position: int) -> None:
    error, _, outcome = pull_through(Fault(flip_at=position))

    assert error is not None
    assert "failed" == outcome


@examples(30)
@given(st.integers(0, DOWN_BYTES - 1))
def test_a_connection_cut_after_any_byte_ends_the_transfer(position: int) -> None:
    error, _, outcome = pull_through(Fault(cut_at=position))

    assert error is not None
    assert "lost" == error.cause
    assert "failed" == outcome


@examples(20)
@given(st.integers(0, 120), st.booleans())
def test_faults_on_the_way_to_the_prefill_worker_never_store_a_wrong_block(position: int, cut: bool) -> None:
    fault = Fault(down=False, cut_at=position) if cut else Fault(down=False, flip_at=position)
    error, decode, outcome = pull_through(fault, deadline_s=0.15)

    # Only the acknowledgement itself may be lost without the decode side knowing.
    assert error is not None or expected_blocks(OFFERED) == decode.blocks
    assert outcome in (("failed", "expired") if error else ("acknowledged", "failed"))
