"""One pull from the prefill side: what is offered, what may be requested, how it is sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from vswa_plugin.errors import InvariantError, VswaError

from .messages import Ack, BlocksHeader, Done, Pull, checksum, decode_verdict
from .plan import GroupBlocks
from .tickets import Outcome
from .wire import Connection

#: Contiguous in memory; of an array, its ``data``.
BytesLike: TypeAlias = bytes | bytearray | memoryview


class ReadBlocks(Protocol):
    def __call__(self, group: int, first: int, stop: int, /) -> BytesLike:
        """Keys and values of blocks [first, stop) of a group, ``(stop - first) * block_bytes`` bytes.

        Called from the server's threads; what it returns must not change before the next call.
        """


class Released(Protocol):
    def __call__(self, ticket: str, outcome: Outcome, bytes_per_group: tuple[int, ...], /) -> None:
        """The blocks are not read any more. Called once per offer, from a thread of the server: be quick."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Finished blocks of one prompt. They stay where they are, unchanged, until ``released`` is called.

    :param fingerprint: from :func:`~.plan.fingerprint`.
    :param groups: what may be asked for, per cache group, in order.
    """

    fingerprint: str
    groups: tuple[GroupBlocks, ...]
    read: ReadBlocks
    released: Released


class Refusal(VswaError):
    """The pull is not served; the message goes to the decode side."""


def wrong_fingerprint(pull: Pull, offer: Offer) -> Refusal:
    """Why a pull with another fingerprint is not served."""
    return Refusal(
        f"expected fingerprint {offer.fingerprint!r}, got {pull.fingerprint!r}; run the same model, "
        "dtype and cache options on prefill and decode workers"
    )


def wanted_groups(pull: Pull, offer: Offer) -> list[GroupBlocks]:
    """The blocks that the pull requests.

    :raises Refusal: another fingerprint, or blocks that are not offered.
    """
    if pull.fingerprint != offer.fingerprint:
        raise wrong_fingerprint(pull, offer)
    if len(pull.ranges) != len(offer.groups):
        raise Refusal(f"expected ranges for {len(offer.groups)} cache groups, got {len(pull.ranges)}")
    return [_within(index, pull.ranges[index], group) for index, group in enumerate(offer.groups)]


def _within(index: int, wanted: tuple[int, int], offered: GroupBlocks) -> GroupBlocks:
    first, stop = wanted
    low, high = offered.bounds
    if first != stop and not low <= first < stop <= high:
        raise Refusal(f"cache group {index}: expected blocks within [{low}, {high}), got [{first}, {stop})")
    return GroupBlocks(range(first, stop), offered.block_bytes)


def send_blocks(connection: Connection, pull: Pull, offer: Offer, sent: list[int]) -> None:
    """Send all that the pull requests and wait for the acknowledgement.

    :param sent: bytes per group, counted up as they go.
    :raises Refusal: not served, or not acknowledged.
    :raises OSError: the connection is lost or too slow. Whatever ``offer.read`` raises comes out too.
    """
    wanted = wanted_groups(pull, offer)
    for index, group in enumerate(wanted):
        for first, stop in group.runs():
            data = _read(offer, index, first, stop)
            connection.send(BlocksHeader(index, first, stop - first, len(data), checksum(data)))
            connection.send_bytes(data)
            sent[index] += len(data)
    connection.send(Done(sum(sent)))
    _await_acknowledgement(connection, sent)


def _read(offer: Offer, group: int, first: int, stop: int) -> memoryview:
    data = memoryview(offer.read(group, first, stop)).cast("B")
    expected = (stop - first) * offer.groups[group].block_bytes
    if len(data) != expected:
        raise InvariantError(
            f"cache group {group}, blocks [{first}, {stop}): expected {expected} bytes, got {len(data)}"
        )
    return data


def _await_acknowledgement(connection: Connection, sent: Sequence[int]) -> None:
    verdict = connection.receive(decode_verdict)
    if not isinstance(verdict, Ack):
        raise Refusal(f"the decode worker gave up: {verdict.reason!r}")
    if verdict.total != sum(sent):
        raise Refusal(f"expected an acknowledgement of {sum(sent)} bytes, got one of {verdict.total}")
