"""Choices that a gateway carries out itself: they count as load until it says that they have ended.

A gateway may crash between choice and end, so each ends by itself after its time.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import Counter

import msgspec

from vswa_plugin.errors import Overloaded, RequestError
from vswa_plugin.router.decide import Decision
from vswa_plugin.router.tallies import Names
from vswa_plugin.selection import LoadBook

logger = logging.getLogger(__name__)

#: More are refused: a gateway that never releases must not fill the memory.
MAX_RESERVATIONS = 65_536
#: What ends one: the gateway, its time, or the end of this router.
ENDED_BY = ("release", "ttl", "shutdown")


class UnknownReservation(RequestError):
    """It was never made here, was released, or its time is over."""


class SelectionIdTaken(RequestError):
    """The caller chose the id of a reservation that has not ended."""


class Reservation(msgspec.Struct, frozen=True):
    """:param book: that it is in.
    :param computes: the choice of the worker that computes the prompt.
    :param generates: that of the worker that generates; the same object where one worker does both.
    :param live: whether the view of the rank that computes was live when it was chosen.
    """

    selection_id: str
    book: LoadBook
    block_size: int
    computes: Decision
    generates: Decision
    live: bool

    def computed(self) -> None:
        """The prompt is computed; a worker that does only that is free of it. A second call does nothing."""
        if self.computes is self.generates:
            self.book.first_token(self.computes.key)
        else:
            self.book.free(self.computes.key)

    def end(self) -> None:
        """The request counts as load no more. A second call does nothing."""
        self.book.free(self.computes.key)
        self.book.free(self.generates.key)


class Reservations:
    """All that are active. Event loop only. Those made are those that ended and those that are active.

    :ivar made: by model.
    :ivar ended: by model and by what: one of :data:`ENDED_BY`.
    :ivar active: by model.
    """

    def __init__(self) -> None:
        self.made: Counter[str] = Counter()
        self.ended: Counter[tuple[str, str]] = Counter()
        self.active: Counter[str] = Counter()
        self._names = Names()
        self._active: dict[str, tuple[Reservation, asyncio.TimerHandle]] = {}

    def __len__(self) -> int:
        return len(self._active)

    def check(self, selection_id: str | None) -> str:
        """An id for the next reservation: the one that is wished for, or a new one.

        :raises SelectionIdTaken: it is in use.
        :raises Overloaded: there are too many.
        """
        if len(self._active) >= MAX_RESERVATIONS:
            raise Overloaded(
                f"expected fewer than {MAX_RESERVATIONS} active reservations, got one more; release what has "
                "ended, or ask for a shorter ttl_s"
            )
        if selection_id in self._active:
            raise SelectionIdTaken(
                f"selection_id: expected one that is not in use, got {selection_id!r}; release it, or leave "
                "the id out to be given a new one"
            )
        return selection_id or uuid.uuid4().hex

    def add(self, reservation: Reservation, ttl_s: float) -> None:
        """Keep it for ``ttl_s`` seconds at most; its id is one that :meth:`check` returned just now."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(ttl_s, self._expire, reservation.selection_id)
        self._active[reservation.selection_id] = reservation, timer
        model = self._model(reservation)
        self.made[model] += 1
        self.active[model] += 1

    def first_token(self, selection_id: str) -> Reservation:
        """Its prompt is computed. Raises UnknownReservation."""
        reservation, _ = self._get(selection_id)
        reservation.computed()
        return reservation

    def release(self, selection_id: str) -> Reservation:
        """It has ended. Raises UnknownReservation."""
        reservation, timer = self._get(selection_id)
        timer.cancel()
        self._end(reservation, "release")
        return reservation

    def give_up(self, selection_id: str) -> None:
        """As :meth:`release`, also where it has ended by its time."""
        if selection_id in self._active:
            self.release(selection_id)

    def close(self) -> None:
        """End all: this router gives no more account of them."""
        for reservation, timer in list(self._active.values()):
            timer.cancel()
            self._end(reservation, "shutdown")

    def _get(self, selection_id: str) -> tuple[Reservation, asyncio.TimerHandle]:
        active = self._active.get(selection_id)
        if active is None:
            raise UnknownReservation(
                f"selection_id: expected an active reservation of this router, got {selection_id!r}; it was "
                "released, its ttl_s is over, or another replica made it"
            )
        return active

    def _expire(self, selection_id: str) -> None:
        reservation, _ = self._active[selection_id]
        first = not any(by == "ttl" for _, by in self.ended)
        self._end(reservation, "ttl")
        if first:
            logger.warning(
                "a reservation ended by its time, not by /release (further ones are only counted); "
                "does the gateway release what it is done with, and is ttl_s longer than its requests?"
            )

    def _model(self, reservation: Reservation) -> str:
        return self._names.label(reservation.computes.model)

    def _end(self, reservation: Reservation, by: str) -> None:
        """:param by: what ends it."""
        del self._active[reservation.selection_id]
        model = self._model(reservation)
        self.ended[model, by] += 1
        self.active[model] -= 1
        reservation.end()
