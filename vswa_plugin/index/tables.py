"""What a part of the index keeps its blocks in, compiled or not: sequence hash -> ranks, per cache group.

A rank is a bit. ``group`` is the index of a cache group in the layout. Everything is idempotent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any, Protocol, TypeAlias

from vswa_plugin.index.plans import ScorePlan
from vswa_plugin.wire.events import Rank

#: Sequence hashes; the kernel reads those of an ``array("Q")`` in memory, and so faster than a list.
Hashes: TypeAlias = Sequence[int]
ALL_GROUPS = -1
UNLIMITED = -1


class Table(Protocol):
    """On any error nothing has changed. TypeError, OverflowError: a hash is not an int of 64 bits."""

    def add(self, group: int, bit: int, hashes: Hashes, room: int) -> tuple[int, int]:
        """Set the bit; returns how many were not set before, and how many were left out.

        :param room: at most so many hashes that the group holds for no rank yet; negative: any number.
        """

    def discard(self, group: int, bit: int, hashes: Hashes) -> int:
        """Clear the bit; returns how many were set."""

    def masks(self, group: int, hashes: Hashes) -> list[int]:
        """For each hash the ranks that hold it."""

    def items(self, group: int) -> Iterable[tuple[int, int]]:
        """Every hash of the group, with its ranks (never none)."""

    def held(self, group: int, bit: int, piece: int) -> Iterator[Hashes]:
        """The hashes that one rank holds at the moment of the call, in no order.

        The call takes them in at once, as fast as memory can be read; what comes later changes nothing of
        them. They are then handed out with the work of looking at ``piece`` hashes at a time, and some of the
        pieces may be empty.
        """

    def score(
        self, hashes: Hashes, plan: ScorePlan, wanted: int, ranks: list[Rank | None]
    ) -> dict[Rank, int]:
        """For the ranks of the mask ``wanted`` the deepest boundary, as the plan reports it; none at 0.

        :param ranks: bit -> rank; a list that is not changed afterwards, so that what it says may be kept.
        """

    def sweep(self, dead: int, budget: int, group: int = ALL_GROUPS) -> bool:
        """Take the ranks of ``dead`` out of the next ``budget`` hashes; True at the end of the pass."""

    def rewind(self) -> None:
        """The next sweep starts a pass."""

    def resident(self) -> Sequence[int]:
        """Per group, the hashes that some rank holds, those to be swept among them."""

    def rows(self) -> int:
        """How many hashes a whole pass of a sweep looks at."""

    def nbytes(self) -> int:
        """Memory, in bytes."""

    def check(self) -> str | None:
        """What is wrong inside, or None."""


def mask_bytes(mask: int) -> bytes:
    return mask.to_bytes((mask.bit_length() + 7) // 8, "little")


def bits_of(mask: int) -> list[int]:
    """The bits that are set, the lowest first."""
    bits = []
    while mask:
        low = mask & -mask
        bits.append(low.bit_length() - 1)
        mask ^= low
    return bits


class KernelTable:
    """The compiled table; most of its methods are the compiled ones themselves."""

    def __init__(self, kernel: ModuleType, groups: int) -> None:
        table: Any = kernel.Table(groups)
        self.add = table.add
        self.discard = table.discard
        self.masks = table.masks
        self.items = table.items
        self.rewind = table.rewind
        self.resident = table.resident
        self.rows = table.rows
        self.nbytes = table.nbytes
        self.check = table.check
        self._held = table.held
        self._score = table.score
        self._sweep = table.sweep

    def score(
        self, hashes: Hashes, plan: ScorePlan, wanted: int, ranks: list[Rank | None]
    ) -> dict[Rank, int]:
        scores: dict[Rank, int] = self._score(hashes, plan, mask_bytes(wanted), ranks)
        return scores

    def held(self, group: int, bit: int, piece: int) -> Iterator[Hashes]:
        packed: bytes = self._held(group, bit)
        hashes = memoryview(packed).cast("Q")
        return (hashes[at : at + piece] for at in range(0, len(hashes), piece))

    def sweep(self, dead: int, budget: int, group: int = ALL_GROUPS) -> bool:
        done: bool = self._sweep(mask_bytes(dead), budget, group)
        return done
