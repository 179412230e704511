"""One relayed worker: found, connected, registered; and once more whenever it was away.

    waiting ──instance listed──► connecting ──reached──► catching up ──► relayed
       ▲                                                                    │
       └── the connection or the instance is gone, or something is wrong ───┘

Each time it is a new epoch with what the worker still tells of itself: nothing is known of what went by.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import NamedTuple

import msgspec

from vswa_plugin import __version__
from vswa_plugin.blocks.layout import CacheGroup
from vswa_plugin.engine import EngineInfo, EventSource
from vswa_plugin.errors import ConnectError, VswaError
from vswa_plugin.host.host import PluginHost
from vswa_plugin.publishing.publisher import PublisherOptions
from vswa_plugin.registry import Entry, Registry, apart, last_epoch
from vswa_plugin.relay.instances import Instances, instance_on
from vswa_plugin.relay.listed import Listed
from vswa_plugin.relay.ranks import Ranks
from vswa_plugin.wire.events import Rank
from vswa_plugin.wire.transport import Transport

logger = logging.getLogger(__name__)

#: How often it is looked whether a worker is still what it was.
TICK_S = 0.2
#: The pause before the next try, after one that failed; doubled each time, up to the second number.
RETRY_S, LONGEST_RETRY_S = 0.2, 10.0

WAITING, CONNECTING, CATCHING_UP, RELAYED = STATES = ("waiting", "connecting", "catching_up", "relayed")


class Shared(NamedTuple):
    """What all workers of the relay use.

    :param registry: a new registry, for one worker.
    :param instances: Dynamo's; None: every worker has its id from the user.
    """

    host: PluginHost
    transport: Transport
    registry: Callable[[], Registry]
    instances: Instances | None
    options: PublisherOptions
    status_url: str | None


class RelayedWorker:
    """One worker of the list, until :meth:`run` is cancelled.

    :ivar state: one of :data:`STATES`.
    :ivar ranks: what is published of it now; None while it is away.
    :ivar counts: what its sources have counted; of those before this one, see :meth:`totals`.
    """

    def __init__(self, listed: Listed, shared: Shared) -> None:
        self.listed = listed
        self.state = WAITING
        self.ranks: Ranks | None = None
        self.worker_id = listed.worker_id
        self.connections = 0
        self._shared = shared
        self._settings = listed.source
        self._source: EventSource | None = None
        self._counts: Counter[str] = Counter()
        self._epochs: dict[int, int] = {}
        self._told: tuple[dict[int, int], tuple[CacheGroup, ...]] = ({}, ())
        self._said = ""
        self._cautioned = False

    def totals(self) -> Counter[str]:
        """What its sources have counted, from the first one on."""
        now = Counter() if self._source is None else Counter(self._source.stats())
        return self._counts + now

    async def run(self) -> None:
        """Relay it, again and again. Whatever goes wrong costs this worker alone."""
        pause = RETRY_S
        while True:
            before = self.connections
            try:
                reason = await self._once()
            except (VswaError, OSError) as error:
                reason = str(error) or type(error).__name__
            except Exception as error:  # a bug, or a plugin's: the other workers shall not pay for it
                logger.exception("%s: the relay of this worker has failed", self.listed.name)
                reason = f"{type(error).__name__}: {error}"
            self.state = WAITING
            self._say(reason)
            pause = RETRY_S if self.connections > before else min(2 * pause, LONGEST_RETRY_S)
            await asyncio.sleep(pause)

    async def _once(self) -> str:
        """From finding the worker until it is lost; returns why."""
        source = self._shared.host.event_source(self._settings)
        self._caution(source)
        worker_id = self.worker_id = await self._found()
        registry = self._shared.registry()
        async with AsyncExitStack() as ending:
            ending.push_async_callback(registry.close)
            known = await self._alone(registry, worker_id)
            ranks = self._published(worker_id, source, known)
            ending.push_async_callback(self._over, ranks, source)
            ending.push_async_callback(registry.leave)  # first of all: nobody shall choose it any more
            return await self._relay(source, ranks, registry, worker_id)

    async def _relay(self, source: EventSource, ranks: Ranks, registry: Registry, worker_id: int) -> str:
        changed, loop = asyncio.Event(), asyncio.get_running_loop()
        self.state, self._source = CONNECTING, source

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the relay has stopped
                loop.call_soon_threadsafe(changed.set)

        await asyncio.to_thread(source.start, ranks.take, wake)
        watch = _Watch(source, ranks, changed, lambda: self._is_listed(worker_id))
        if (gone := await watch.until(lambda: source.state().connected)) is not None:
            return gone
        self.state = CATCHING_UP
        self.ranks = ranks
        await ranks.begin()
        if (gone := await watch.until(lambda: source.state().ready and ranks.settled)) is not None:
            return self._corrected(source, gone)
        entry = self._entry(worker_id, source.info, ranks)
        await registry.join(entry)
        self._told = (entry.epochs, entry.groups)
        self.connections += 1
        self.state = RELAYED
        self._say("")
        logger.info("%s: relayed as worker %d of %s", self.listed.name, worker_id, self.listed.endpoint)
        gone = await watch.until_gone(lambda: self._update(registry, ranks))
        return self._corrected(source, gone)

    def _corrected(self, source: EventSource, gone: str) -> str:
        """Take over what the events have said of the options, for the next connection."""
        fitting = source.state().options
        if fitting is not None and fitting != self._settings.options:
            self._settings = msgspec.structs.replace(self._settings, options=fitting)
            logger.warning("%s: %s; the options now are %s", self.listed.name, gone, fitting)
        return gone

    async def _over(self, ranks: Ranks, source: EventSource) -> None:
        ranks.hold()
        await asyncio.to_thread(source.stop)
        self._counts, self._source = self._counts + Counter(source.stats()), None
        self._epochs |= ranks.epochs
        self.ranks = None
        await ranks.close()

    # -- which worker it is ------------------------------------------------------------------------

    async def _found(self) -> int:
        """The worker's number in Dynamo; waits for it."""
        if self.listed.worker_id is not None:
            return self.listed.worker_id
        assert self._shared.instances is not None, "it is there where a worker has no id"
        while True:
            found = await self._shared.instances.at(self.listed.endpoint)
            worker_id, why = instance_on(self.listed.host, found)
            if worker_id is not None:
                return worker_id
            self._say(why)
            await asyncio.sleep(TICK_S)

    async def _is_listed(self, worker_id: int) -> str | None:
        """Why the worker is not there any more, where discovery says so."""
        if self._shared.instances is None or self.listed.worker_id is not None:
            return None
        found = await self._shared.instances.at(self.listed.endpoint)
        return None if worker_id in found else f"Dynamo's discovery does not list worker {worker_id} any more"

    async def _alone(self, registry: Registry, worker_id: int) -> list[Entry]:
        """What the registry knows, once nobody else registers this worker: another relay, or the worker."""
        while True:
            known = await registry.entries(self.listed.endpoint.namespace)
            others = [each for each in known if each.worker_id == worker_id]
            if not others:
                return known
            self._say(
                f"worker {worker_id} is registered already, by process {others[0].pid} on "
                f"{others[0].host or 'an unknown host'}; this one stands by"
            )
            await asyncio.sleep(5 * TICK_S)

    # -- what is published of it -------------------------------------------------------------------

    def _published(self, worker_id: int, source: EventSource, known: list[Entry]) -> Ranks:
        endpoint, shared = self.listed.endpoint, self._shared
        last = {
            rank: apart(max(last_epoch(known, Rank(worker_id, rank)), self._epochs.get(rank, 0)))
            for rank in self._settings.dp_ranks
        }
        return Ranks(
            (endpoint.namespace, endpoint.component, worker_id),
            self._settings.dp_ranks,
            source,
            shared.host,
            shared.transport,
            shared.options,
            last,
        )

    def _entry(self, worker_id: int, info: EngineInfo, ranks: Ranks) -> Entry:
        settings, endpoint, layout = self._settings, self.listed.endpoint, ranks.layout
        return Entry(
            namespace=endpoint.namespace,
            component=endpoint.component,
            endpoint=endpoint.endpoint,
            worker_id=worker_id,
            mode=settings.mode,
            engine=settings.engine,
            served_model_name=settings.served_model_name,
            model_path=settings.model_path,
            context_length=info.context_length,
            block_size=layout.block_size,
            rule=layout.rule,
            hash_scheme=layout.hash_scheme,
            groups=layout.groups,
            epochs=ranks.epochs,
            total_kv_blocks=info.total_kv_blocks,
            host=socket.gethostname(),
            pid=os.getpid(),
            visible=self.listed.visible,
            status_url=self._shared.status_url,
            version=__version__,
            engine_version=info.engine_version,
            engine_reason="relayed: another process runs it",
            resumption=layout.resumption,
            capacity=info.capacity,
        )

    async def _update(self, registry: Registry, ranks: Ranks) -> None:
        """Keep the registry true after a restart of a stream."""
        now = (ranks.epochs, ranks.layout.groups)
        if now == self._told:
            return
        try:
            await registry.update(epochs=now[0], groups=now[1])
        except ConnectError as error:
            logger.warning("%s: the registry does not know of a new epoch yet: %s", self.listed.name, error)
        else:
            self._told = now

    # -- what is said of it ------------------------------------------------------------------------

    def _caution(self, source: EventSource) -> None:
        if not self._cautioned:
            self._cautioned = True
            for caveat in source.caveats:
                logger.warning("%s: %s", self.listed.name, caveat)

    def _say(self, reason: str) -> None:
        """Log why it is not relayed, once for as long as that is so."""
        if reason and reason != self._said:
            logger.warning("%s: not relayed: %s", self.listed.name, reason)
        self._said = reason


class _Watch:
    """Waits for something of one worker, unless it is lost before."""

    def __init__(
        self,
        source: EventSource,
        ranks: Ranks,
        changed: asyncio.Event,
        is_listed: Callable[[], Awaitable[str | None]],
    ) -> None:
        self._source, self._ranks, self._changed, self._is_listed = source, ranks, changed, is_listed

    async def until(self, true: Callable[[], bool]) -> str | None:
        """None once ``true()``; else why that will not come."""
        while (gone := await self._lost()) is None:
            if true():
                return None
            await self._tick()
        return gone

    async def until_gone(self, meanwhile: Callable[[], Awaitable[None]]) -> str:
        while (gone := await self._lost()) is None:
            await meanwhile()
            await self._tick()
        return gone

    async def _lost(self) -> str | None:
        return self._source.state().ended or self._ranks.failure or await self._is_listed()

    async def _tick(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TICK_S):
                await self._changed.wait()
        self._changed.clear()
