"""Bugs that a run must find: each changes one thing of the project's code, for as long as it is planted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vswa_plugin.following.fleet import Fleet
from vswa_plugin.following.reader import BecameLive, Reader
from vswa_plugin.following.subscriber import Subscriber
from vswa_plugin.following.view import View
from vswa_plugin.index.window_index import WindowIndex
from vswa_plugin.publishing.healing import Healing
from vswa_plugin.publishing.residency import Residency
from vswa_plugin.wire.events import Batch, Removed
from vswa_plugin.wire.numbering import Numbering

Bug = tuple[Any, str, Callable[[Any], Any]]


def _drops_nothing_at_a_restart(real: Any) -> Any:
    return lambda self: None


def _of(result: Any) -> Callable[[Any], Any]:
    """Whatever it is called with, it returns ``result``."""
    return lambda real: lambda *args, **kwargs: result


def _ends_a_repair_at_any_answer(real: Any) -> Any:
    def whole(self: Reader) -> bool:
        return not self._waiting

    return whole


def _counts_any_message_as_life(real: Any) -> Any:
    def heard(self: Subscriber, view: View, batch: Batch | None, now: float) -> bool:
        view.heard()
        return real(self, view, batch, now)

    return heard


def _takes_any_gap(real: Any) -> Any:
    def take(self: Reader, batch: Batch) -> list[Any]:
        first = self.next_event_id == 0
        self.next_event_id = max(self.next_event_id, batch.next_event_id)
        return self._applied(batch.events) + ([BecameLive()] if first and self._repair is None else [])

    return take


def _applies_no_removal(real: Any) -> Any:
    def apply(self: WindowIndex, rank: Any, event: Any) -> None:
        if not isinstance(event, Removed) or event.group_id:
            real(self, rank, event)

    return apply


def _believes_old_claims(real: Any) -> Any:
    def changes(self: Healing, claim: Any) -> Any:
        self._restarted_at, before = 0, self._restarted_at
        try:
            return real(self, claim)
        finally:
            self._restarted_at = before

    return changes


def _follows_strangers(real: Any) -> Any:
    async def start(self: Fleet, timeout: float = 10.0) -> None:
        await real(self, timeout)
        self.subscriber.announced_only = False

    return start


def _repeats_an_epoch(real: Any) -> Any:
    def new_epoch(self: Numbering) -> None:
        self.epoch = self.epoch or self._clock_ns()
        self.next_event_id = 0

    return new_epoch


def _announces_only_upwards(real: Any) -> Any:
    def announce(self: Subscriber, source: Any, epoch: int) -> None:
        view = self.view(source.rank)
        if view is None or epoch >= view.reader.epoch:
            real(self, source, epoch)

    return announce


#: What is changed, and to what.
PLANTED: dict[str, Bug] = {
    "a restart of the stream keeps what was resident": (Residency, "clear", _drops_nothing_at_a_restart),
    "a repair ends though ids are missing": (Reader, "_whole", _ends_a_repair_at_any_answer),
    "any message is a sign of life": (Subscriber, "_heard", _counts_any_message_as_life),
    "a gap is not noticed": (Reader, "_take", _takes_any_gap),
    "removals of one group are not applied": (WindowIndex, "apply", _applies_no_removal),
    "a higher epoch forgets nothing": (WindowIndex, "clear", _of(None)),
    "a request that came before a loss proves blocks": (Healing, "changes", _believes_old_claims),
    "ranks that nobody registered are followed": (Fleet, "start", _follows_strangers),
    "epochs far ahead are believed": (Subscriber, "_is_plausible", _of(True)),
    "a worker that left stays in the index": (WindowIndex, "drop", _of(None)),
    "an epoch is begun twice": (Numbering, "new_epoch", _repeats_an_epoch),
    "views stay live while the broker is away": (View, "current", lambda real: property(lambda self: True)),
    "nobody is ever silent": (View, "silent", lambda real: property(lambda self: False)),
    "a failed repair is not tried again": (Reader, "on_tick", _of([])),
    "the publisher's own end does not correct a promise": (Reader, "_end_is", _of(None)),
    "a silent rank stays at an epoch that is over": (
        Subscriber, "announce", _announces_only_upwards,
    ),
}  # fmt: skip


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The bug of that name, for as long as this lasts."""
    owner, attribute, change = PLANTED[name]
    real = owner.__dict__[attribute]
    setattr(owner, attribute, change(real))
    try:
        yield
    finally:
        setattr(owner, attribute, real)
