"""The wire: what is encoded comes back, what is broken is refused with a reason, newer fields are ignored."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vswa_plugin.blocks.layout import HASH_SCHEME, CacheGroup
from vswa_plugin.errors import ProtocolError
from vswa_plugin.wire.events import (
    MAX_MESSAGE_BYTES,
    TIERS,
    VERSION,
    Batch,
    Cleared,
    Layout,
    Moved,
    Removed,
    ReuseReport,
    Stored,
    Unknown,
    decode,
    encode,
)

U64 = st.integers(0, 2**64 - 1)
GROUP = st.integers(0, 7)
HASHES = st.lists(U64, max_size=5).map(tuple)
EVENTS = st.one_of(
    st.builds(Stored, GROUP, st.integers(0, 10**6), st.none() | U64, HASHES, st.sampled_from(TIERS)),
    st.builds(Removed, GROUP, HASHES),
    st.builds(Moved, GROUP, HASHES, st.sampled_from(TIERS)),
    st.builds(Cleared, st.none() | GROUP),
    st.builds(
        Layout,
        st.lists(st.builds(CacheGroup, GROUP, st.none() | st.just(512), st.just(32)), max_size=3).map(tuple),
        st.text(max_size=5),
        st.just(HASH_SCHEME),
        st.text(max_size=5),
    ),
)
BATCHES = st.builds(Batch, st.just(VERSION), U64, U64, U64, st.lists(EVENTS, max_size=4).map(tuple))


@given(BATCHES)
def test_a_batch_survives_the_wire(batch: Batch) -> None:
    assert batch == decode(encode(batch))


@given(st.binary(max_size=200))
@example(b"\x95\x01\x05\x00\x00\x91\x91\xa1\x80").via("a tag that is not UTF-8")
def test_arbitrary_bytes_are_refused_and_nothing_else_happens(payload: bytes) -> None:
    try:
        decode(payload)
    except ProtocolError as error:
        assert str(error).startswith("expected ")


@given(BATCHES, st.data())
def test_a_truncated_batch_is_refused(batch: Batch, data: st.DataObject) -> None:
    payload = encode(batch)
    cut = data.draw(st.integers(0, len(payload) - 1))

    with pytest.raises(ProtocolError):
        decode(payload[:cut])


def test_a_deeply_nested_payload_is_refused() -> None:
    with pytest.raises(ProtocolError, match="expected a batch of wire version 1"):
        decode(b"\x91" * 100_000 + b"\x90")


def test_fields_that_a_later_version_appends_are_ignored() -> None:
    payload = msgspec.msgpack.encode([VERSION, 1, 2, 3, [["removed", 0, [9], "new"]], "new", {"a": 1}])

    assert decode(payload) == Batch(VERSION, 1, 2, 3, (Removed(0, (9,)),))


def test_an_event_of_a_later_version_keeps_its_id_beside_those_that_are_known() -> None:
    payload = msgspec.msgpack.encode(
        [VERSION, 1, 2, 3, [["removed", 0, [9]], ["grown", 1, {}], ["cleared", None]]]
    )
    batch = decode(payload)

    assert batch.events == (Removed(0, (9,)), Unknown("grown"), Cleared(None))
    assert batch.next_event_id == 5


def test_a_batch_of_a_later_version_counts_its_ids_and_means_nothing_else() -> None:
    payload = msgspec.msgpack.encode([2, 1, 2, 3, [["removed", 0, [9]], 7, []], "more"])

    assert decode(payload) == Batch(2, 1, 2, 3, (Unknown("removed"), Unknown("(int)"), Unknown("(list)")))


def test_a_malformed_event_beside_an_unknown_one_is_still_refused() -> None:
    payload = msgspec.msgpack.encode([VERSION, 1, 2, 3, [["grown"], ["removed", 0, ["x"]]]])

    with pytest.raises(ProtocolError):
        decode(payload)


def test_a_message_that_is_too_large_is_refused_unread() -> None:
    with pytest.raises(ProtocolError, match="more than 8388608 bytes"):
        decode(b"\x90" * (MAX_MESSAGE_BYTES + 1))


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(ProtocolError, match="Expected `int` >= 0"):
        decode(msgspec.msgpack.encode([VERSION, 1, 2, 3, [["removed", 0, [-1]]]]))


def test_a_malformed_field_is_named_by_its_path() -> None:
    payload = msgspec.msgpack.encode([VERSION, 1, 2, 3, [["removed", 0, ["x"]]]])

    with pytest.raises(ProtocolError, match=r"Expected `int`, got `str` - at `\$\[4\]\[0\]\[2\]\[0\]`"):
        decode(payload)


def test_token_ids_have_no_place_on_the_wire() -> None:
    names = {
        field.name
        for struct in (Batch, Layout, Stored, Removed, Moved, Cleared)
        for field in msgspec.structs.fields(struct)
    }

    assert not [name for name in names if "token" in name]
    assert "sequence_hashes" in names


@pytest.mark.parametrize("reports", [7, [7], [["id"]], [["id", "many", 0]], [[1, 2, 3]], {}])
def test_reports_that_cannot_be_read_cost_nothing_but_themselves(reports: object) -> None:
    batch = Batch(VERSION, 5, 0, 0, (Removed(0, (7,)), Cleared()))
    raw = msgspec.msgpack.decode(encode(batch))

    assert batch == decode(msgspec.msgpack.encode([*raw[:5], reports]))
    with pytest.raises(ProtocolError, match="expected a batch"):
        decode(msgspec.msgpack.encode([*raw[:4], [["removed", 0]], reports]))


def test_what_a_later_version_appends_to_a_report_is_ignored() -> None:
    payload = msgspec.msgpack.encode([VERSION, 5, 0, 0, [], [["id", 10, 4, 0.5, "more"]], "and more"])

    assert (ReuseReport("id", 10, 4, 0.5),) == decode(payload).reports
