"""All ranks of a deployment, followed: registry, event streams and window index put together.

What a router, ``vswa index`` and ``vswa explain`` have in common.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable

import msgspec

from vswa_plugin.errors import ConnectError, VswaError
from vswa_plugin.following.subscriber import Subscriber, SubscriberOptions
from vswa_plugin.following.view import View
from vswa_plugin.forecast import Forecasts
from vswa_plugin.index import WindowIndex
from vswa_plugin.registry import Connected, Disconnected, Entry, Joined, Left, Registry, Updated
from vswa_plugin.tasks import Tasks
from vswa_plugin.wire.events import Rank, Source
from vswa_plugin.wire.transport import Transport

__all__ = [
    "Fleet",
]

logger = logging.getLogger(__name__)


class RankStatus(msgspec.Struct, frozen=True):
    """One rank as the fleet sees it now.

    :param state: ``live``, ``stale``, ``silent``, ``unreadable`` or ``waiting``.
    :param blocks: window label -> tier -> blocks held.
    :param lag_ms: age of the last message, by the two machines' clocks; None before the first one.
    """

    source: Source
    model: str
    state: str
    reason: str
    registered: bool
    epoch: int
    next_event_id: int
    lag_ms: float | None
    blocks: dict[str, dict[str, int]]


class NoWorkers(VswaError):
    """There is no deployment where one was looked for."""


class Fleet:
    """Follows one namespace, or all. ``start`` connects, ``stop`` ends all of it."""

    def __init__(
        self,
        transport: Transport,
        registry: Registry,
        *,
        namespace: str | None = None,
        options: SubscriberOptions | None = None,
        index: WindowIndex | None = None,
        tasks: Tasks | None = None,
        forecasts: Forecasts | None = None,
    ) -> None:
        self.index = index if index is not None else WindowIndex()
        #: Where the long-lived tasks of a fleet are watched.
        self.tasks = tasks if tasks is not None else Tasks()
        self.subscriber = Subscriber(
            transport,
            self.index,
            namespace=namespace,
            options=options,
            tasks=self.tasks,
            forecasts=forecasts,
        )
        #: Live workers by registry key.
        self.entries: dict[str, Entry] = {}
        self._transport = transport
        self._registry = registry
        self._namespace = namespace
        self._listed = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        self._unread = "no answer"

    def check_found(self) -> None:
        """Check that there is a deployment to look at; call it after :meth:`start`.

        :raises ConnectError: the registry has not been read yet.
        :raises NoWorkers: it was read, and no worker is there.
        """
        if not self._listed.is_set():
            raise ConnectError(f"the registry cannot be read: {self._unread}")
        if not self.entries and next(iter(self.subscriber.views()), None) is None:
            where = f"namespace {self._namespace!r}" if self._namespace else "any namespace"
            raise NoWorkers(
                f"expected a worker of {where} in {self._registry}, got none; start one "
                "(`vswa worker --help`), or correct ETCD_ENDPOINTS, VSWA_REGISTRY or --namespace"
            )

    async def start(self, timeout: float = 10.0) -> None:
        """Connect and follow; returns when the registry has been listed once, or after ``timeout`` s.

        :raises ConnectError: NATS cannot be reached.
        """
        await self._transport.connect(timeout)
        self.subscriber.announced_only = True  # from now on the registry says which ranks there are
        await self.subscriber.start()
        self._watching = self.tasks.start(self._watch(), "watch the registry")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._listed.wait()

    async def stop(self) -> None:
        if self._watching is not None:
            await self.tasks.stop([self._watching])
        await self.subscriber.stop()
        await self._registry.close()
        await self._transport.close()

    async def settled(self, timeout: float) -> bool:
        """Wait until every registered rank is live or cannot become so; returns whether all are live.

        :param timeout: seconds after which the wait ends in any case.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while not all(view is not None and (_live(view) or view.broken) for view in self._wanted()):
                    self.subscriber.changed.clear()
                    await self.subscriber.changed.wait()
        return all(view is not None and _live(view) for view in self._wanted())

    def statuses(self, now_ns: int) -> list[RankStatus]:
        """All ranks, sorted. ``now_ns`` is the wall clock, for the lag figure."""
        statuses = []
        for view in self.subscriber.views():
            reader = view.reader
            heard_ns = reader.last_published_at_ns
            statuses.append(
                RankStatus(
                    source=view.source,
                    model=view.layout.model if view.layout else "",
                    state=view.state,
                    reason=view.reason,
                    registered=view.registered,
                    epoch=reader.epoch,
                    next_event_id=reader.next_event_id,
                    lag_ms=(now_ns - heard_ns) / 1e6 if heard_ns else None,
                    blocks=self.blocks(view),
                )
            )
        return sorted(statuses, key=lambda status: (str(status.source), status.epoch))

    def blocks(self, view: View) -> dict[str, dict[str, int]]:
        """Window label -> tier -> blocks that the rank of ``view`` holds; empty where it is in no index."""
        rank = view.source.rank
        if view.layout is None or self.subscriber.view(rank) is not view:
            return {}
        layout = self.index.layout(rank)
        totals: dict[str, dict[str, int]] = {}
        for group_id, tiers in self.index.blocks(rank).items():
            of_window = totals.setdefault(layout.group(group_id).label, {})
            for tier, count in tiers.items():
                of_window[tier] = of_window.get(tier, 0) + count
        return totals

    def _wanted(self) -> list[View | None]:
        """The views of all registered ranks; None where there is none yet."""
        return [self.subscriber.view(rank) for entry in self.entries.values() for rank in _ranks(entry)]

    async def _watch(self) -> None:
        async with self._registry.watch(self._namespace) as changes:
            async for change in changes:
                match change:
                    case Joined() | Updated():
                        self._joined(change.entry)
                    case Left():
                        self._left(change.entry)
                    case Connected():
                        self._listed.set()
                    case Disconnected():
                        self._unread = change.reason
                        logger.warning("registry not readable, its last content stands: %s", change.reason)

    def _joined(self, entry: Entry) -> None:
        self.entries[entry.key] = entry
        for dp_rank, epoch in entry.epochs.items():
            source = Source(entry.namespace, entry.component, entry.worker_id, dp_rank)
            self.subscriber.announce(source, epoch)

    def _left(self, entry: Entry) -> None:
        self.entries.pop(entry.key, None)
        for rank in _ranks(entry):
            self.subscriber.withdraw(rank)


def _live(view: View) -> bool:
    return view.layout is not None and not view.reader.stale


def _ranks(entry: Entry) -> Iterable[Rank]:
    return (Rank(entry.worker_id, dp_rank) for dp_rank in entry.epochs)
