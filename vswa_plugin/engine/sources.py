"""The contract between the relay and a plugin that reads the KV events of workers of another project.

Such a worker runs on its own: it is neither started nor stopped here, and its requests do not pass. An
:class:`EventSource` reads its events over the network for as long as one connection lasts. They stay in the
engine's own format, for which there is an event adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import msgspec

from vswa_plugin.engine.contract import EngineInfo, EventSink


class SourceSettings(msgspec.Struct, frozen=True):
    """One worker whose events are read; given to ``vswa_event_source``.

    :param engine: the engine that the worker runs, by the name that ``--engine`` takes.
    :param mode: of the worker, one of ``MODES``.
    :param model_path: directory of the model on this machine, for its configuration.
    :param endpoint: where data-parallel rank 0 publishes its events, as a subscriber connects.
    :param replay: where they can be asked for again; None: nowhere.
    :param dp_ranks: the data-parallel ranks of the worker.
    :param options: of the engine, as far as they decide what it caches.
    :param where: where the settings come from, for error messages.
    """

    engine: str
    mode: str
    model_path: str
    served_model_name: str
    endpoint: str
    replay: str | None = None
    dp_ranks: tuple[int, ...] = (0,)
    options: dict[str, Any] = {}
    where: str = "the command line"


class SourceState(NamedTuple):
    """How far one source is.

    :param connected: every rank has been reached.
    :param ready: and all that the worker still keeps of its earlier events has been handed on.
    :param ended: why nothing comes any more, or why what comes is of no use; None while it works.
    :param options: where the events have contradicted the options: those that fit, for the next source.
    """

    connected: bool = False
    ready: bool = False
    ended: str | None = None
    options: dict[str, Any] | None = None


class EventSource(Protocol):
    """The events of one worker, from one connection to its end. Built with local checks only."""

    #: Format of the events, as ``vswa_event_adapter`` gets it.
    event_format: str
    #: What cannot be known of this worker from its events, one sentence each; said once per worker.
    caveats: tuple[str, ...]

    @property
    def info(self) -> EngineInfo:
        """What the settings and the model say of the worker."""

    def start(self, on_events: EventSink, on_change: Callable[[], None]) -> None:
        """Begin to connect, for as long as it takes, and return. Called once, in a thread.

        :param on_events: as of an engine, but that it returns late where the events come too fast.
        :param on_change: called from any thread when :meth:`state` has changed; returns at once.
        """

    def state(self) -> SourceState:
        """How far it is. Cheap, from any thread."""

    def stats(self) -> dict[str, int]:
        """What has been counted since the start: ``events``, ``batches`` and, of these, ``repaired_batches``;
        ``lost_batches``; ``unreadable_messages``. Cheap, from any thread."""

    def stop(self) -> None:
        """Disconnect. Called once, in a thread."""
