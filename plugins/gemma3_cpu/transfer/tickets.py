"""Tickets: each is good for one fetch of its blocks until a deadline. Pure: no I/O, no thread, a given clock.

    offered ── take ──► taken ── finish ──► gone (acknowledged or failed)
       └─ expire, withdraw, close ──► gone (expired; released or displaced; stopped)

A ticket that is gone is forgotten: a request with a used ticket gets the same answer as one with a false one.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

import msgspec

T = TypeVar("T")


class State(StrEnum):
    OFFERED = "offered"
    TAKEN = "taken"


class Outcome(StrEnum):
    """How an offer ended."""

    ACKNOWLEDGED = "acknowledged"
    FAILED = "failed"
    EXPIRED = "expired"
    #: Nobody will fetch it, as a router says whose call of a decode worker failed.
    RELEASED = "released"
    #: Nobody had fetched it for a while, and another prompt needed its blocks.
    DISPLACED = "displaced"
    STOPPED = "stopped"


class TicketCounts(msgspec.Struct):
    """Totals since the book was made, and how many tickets are in each state now."""

    offered: int = 0
    taken: int = 0
    acknowledged: int = 0
    failed: int = 0
    expired: int = 0
    released: int = 0
    displaced: int = 0
    stopped: int = 0
    #: Asked for with a ticket that is unknown, used or past its deadline.
    refused: int = 0
    waiting: int = 0
    moving: int = 0


@dataclass(slots=True)
class _Entry(Generic[T]):
    item: T
    ticket: str
    deadline: float
    state: State = State.OFFERED


class TicketBook(Generic[T]):
    """Tickets and what each stands for. Not thread-safe.

    :param clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._counts = TicketCounts()
        # By digest: the time that a look-up takes says nothing about the tickets.
        self._entries: dict[bytes, _Entry[T]] = {}

    def offer(self, item: T, deadline_s: float) -> str:
        """A new ticket for ``item``, to be taken within ``deadline_s`` seconds: 32 random hex digits."""
        ticket = secrets.token_hex(16)
        self._entries[_digest(ticket)] = _Entry(item, ticket, self.clock() + deadline_s)
        self._counts.offered += 1
        return ticket

    def peek(self, ticket: str) -> T | None:
        """What :meth:`take` would give; the ticket stays good."""
        entry = self._open(ticket)
        return None if entry is None else entry.item

    def take(self, ticket: str) -> T | None:
        """What the ticket stands for, the first time and before its deadline; else None."""
        entry = self._open(ticket)
        if entry is None:
            self._counts.refused += 1
            return None
        entry.state = State.TAKEN
        self._counts.taken += 1
        return entry.item

    def finish(self, ticket: str, outcome: Outcome) -> T | None:
        """Forget a taken ticket. What it stood for, to be freed now; None where it is not a taken one."""
        return self._end(ticket, State.TAKEN, outcome)

    def withdraw(self, ticket: str, outcome: Outcome) -> T | None:
        """Forget a ticket that was not taken. What it stood for, to be freed now; None: taken or gone."""
        return self._end(ticket, State.OFFERED, outcome)

    def expire(self) -> list[tuple[str, T]]:
        """Forget the tickets that were not taken in time; what they stood for is to be freed."""
        now = self.clock()
        return self._forget(Outcome.EXPIRED, lambda entry: entry.deadline <= now)

    def close(self) -> list[tuple[str, T]]:
        """Forget the tickets that were not taken; what they stood for is to be freed."""
        return self._forget(Outcome.STOPPED, lambda entry: True)

    def next_deadline(self) -> float | None:
        """When :meth:`expire` has something to do; None for never as it stands."""
        waiting = (e.deadline for e in self._entries.values() if e.state is State.OFFERED)
        return min(waiting, default=None)

    def state(self, ticket: str) -> State | None:
        """None: unknown or gone."""
        entry = self._entries.get(_digest(ticket))
        return None if entry is None else entry.state

    def counts(self) -> TicketCounts:
        moving = sum(entry.state is State.TAKEN for entry in self._entries.values())
        return msgspec.structs.replace(self._counts, waiting=len(self._entries) - moving, moving=moving)

    def _open(self, ticket: str) -> _Entry[T] | None:
        entry = self._entries.get(_digest(ticket))
        if entry is None or entry.state is not State.OFFERED or entry.deadline <= self.clock():
            return None
        return entry

    def _end(self, ticket: str, state: State, outcome: Outcome) -> T | None:
        key = _digest(ticket)
        entry = self._entries.get(key)
        if entry is None or entry.state is not state:
            return None
        del self._entries[key]
        self._count(outcome)
        return entry.item

    def _forget(self, outcome: Outcome, over: Callable[[_Entry[T]], bool]) -> list[tuple[str, T]]:
        keys = [key for key, e in self._entries.items() if e.state is State.OFFERED and over(e)]
        entries = [self._entries.pop(key) for key in keys]
        for _ in entries:
            self._count(outcome)
        return [(entry.ticket, entry.item) for entry in entries]

    def _count(self, outcome: Outcome) -> None:
        setattr(self._counts, outcome.value, getattr(self._counts, outcome.value) + 1)


def _digest(ticket: str) -> bytes:
    return hashlib.sha256(ticket.encode("utf-8", "surrogatepass")).digest()
