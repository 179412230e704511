"""One worker: an engine, a real publisher, its place in the registry, and lives that end and begin."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from tests.sim.engine import LAYOUT, Engine, a_prompt
from vswa_plugin.engine.contract import EngineEvent, EventsLost
from vswa_plugin.errors import ConnectError, ProtocolError
from vswa_plugin.publishing.healing import Claim
from vswa_plugin.publishing.history import Ring
from vswa_plugin.publishing.ledger import Published
from vswa_plugin.publishing.publisher import Publisher, PublisherOptions, Superseded
from vswa_plugin.publishing.residency import Residency
from vswa_plugin.registry import Entry, apart, last_epoch
from vswa_plugin.wire.events import Batch, Cleared, Layout, Moved, Rank, Removed, Source, Stored
from vswa_plugin.wire.subjects import subject

if TYPE_CHECKING:
    from tests.sim.world import World

HEARTBEAT_S = 1.0
#: So small that batches are split, answers are cut, rings run out and inboxes run over.
OPTIONS = PublisherOptions(heartbeat_s=HEARTBEAT_S, inbox_events=24, batch_bytes=400)
RING_BATCHES, ANSWER_BYTES = 8, 500
Held = dict[int, frozenset[int]]


class Adapter:
    """Hands engine events on as they are; one that is None cannot be read."""

    def feed(self, raw: Mapping[str, Any]) -> list[EngineEvent]:
        if raw["event"] is None:
            raise ProtocolError("expected an event, got nothing")
        return [raw["event"]]


class Life:
    """One process of a worker.

    :ivar lost: events of its engine were lost, so that it may hold more than it says.
    :ivar unnoticed: such a loss that the worker cannot know of yet.
    """

    def __init__(self, world: World, worker: Worker) -> None:
        self.world, self.worker = world, worker
        self.engine = Engine()
        self.residency = Residency(LAYOUT)
        self.lost = self.unnoticed = self.ended = False
        self.ended_at = 0.0
        self.publisher: Publisher | None = None
        self.transport = world.network.connection(worker.machine, echo=False)
        self.entry: Entry | None = None
        self._steps = 0
        self._task = asyncio.get_running_loop().create_task(self._live())

    async def _live(self) -> None:
        keeping: asyncio.Task[None] | None = None
        try:
            known = await self._reach()
            source = self.worker.source
            self.publisher = self._made(apart(last_epoch(known, source.rank)))
            await self.transport.serve(subject(source, "control"), self.publisher.answer)
            await self.transport.subscribe(subject(source, "events"), self._foreign)
            keeping = asyncio.get_running_loop().create_task(self._keep_registered(self.publisher))
            await self.publisher.run()
        except (ConnectError, Superseded):
            pass  # the process exits
        finally:
            if not self.ended:
                self.ended, self.ended_at = True, self.world.loop.active
            if keeping is not None:
                keeping.cancel()
            await self.transport.close()

    async def _reach(self) -> list[Entry]:
        while True:
            try:
                await self.transport.connect(60.0)
                return self.world.store.entries()
            except ConnectError:
                await asyncio.sleep(0.5)

    def _made(self, last: int) -> Publisher:
        loop = asyncio.get_running_loop()
        publisher = Publisher(
            self.worker.source,
            Adapter(),
            self.residency,
            self._send,
            lambda *_: None,
            OPTIONS,
            last,
            clock_ns=self.worker.clock_ns,
            clock=loop.time,
        )
        history = publisher.ledger.history
        history.ring = Ring(RING_BATCHES, 1 << 20)
        history._options = msgspec.structs.replace(
            history._options, message_bytes=ANSWER_BYTES, expire_s=3.0, snapshots=2
        )
        flush = publisher.ledger.flush

        def noted() -> list[Published]:
            published = flush()
            self.world.book.published(self.worker.source.rank, [each.batch for each in published], self)
            return published

        publisher.ledger.flush = noted  # type: ignore[method-assign]
        return publisher

    async def _send(self, payload: bytes) -> None:
        await self.transport.publish(subject(self.worker.source, "events"), payload)

    async def _foreign(self, _: str, payload: bytes) -> None:
        assert self.publisher is not None
        self.publisher.on_foreign(payload)

    async def _keep_registered(self, publisher: Publisher) -> None:
        """Join once the layout is out, then keep the lease alive and the epochs true."""
        refreshed = -10.0
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(0.5)
            epochs = {self.worker.source.dp_rank: publisher.ledger.epoch}
            if not self.transport.link.up or not publisher.ledger.next_event_id:
                continue
            try:
                if self.entry is None or self.entry.epochs != epochs:
                    self.entry = self.worker.entry(epochs)
                    self.world.store.put(self.entry, self)
                elif loop.time() - refreshed > 3.0:
                    self.world.store.keep_alive(self.entry, self)
                    refreshed = loop.time()
            except ConnectError:
                self.entry = None

    # -- what the engine does ------------------------------------------------------------------------

    def step(self, rng: random.Random, *, losing: int = 0) -> None:
        """The engine does something; of its events the last ``losing`` are lost."""
        publisher = self.publisher
        if publisher is None:
            return
        events: list[EngineEvent] = []
        action = rng.random()
        if action < 0.55:
            tokens = a_prompt(rng)
            self.engine.admit(tokens, publisher.engine_events)
            events = self.engine.compute(tokens, rng)
        elif action < 0.75:
            events = self.engine.evict(rng)
        elif action < 0.85:
            events = self.engine.move(rng)
        if losing and events:
            events = events[: max(0, len(events) - losing)]
            self.lost = self.unnoticed = True
        self._offer(events)
        if action >= 0.7 and self.engine.running:
            request = self.engine.running.pop(rng.randrange(len(self.engine.running)))
            publisher.claim(Claim(request.tokens, request.cached_tokens, request.mark))

    def _offer(self, events: list[EngineEvent]) -> None:
        assert self.publisher is not None
        raw: list[dict[str, Any]] = [{"event": event} for event in events]
        if self.unnoticed and raw:
            raw.insert(0, {"event": EventsLost(self._steps, self._steps + 2)})
            self.unnoticed = False
        self._steps += 1
        if len(self.publisher._inbox) + len(raw) > OPTIONS.inbox_events:
            self.lost = True
        self.publisher.offer(raw)

    def notice_loss(self) -> None:
        """An engine that lost events says so with the next one, which comes in the end."""
        if self.unnoticed and self.publisher is not None:
            self.unnoticed = False
            self.publisher.offer([{"event": EventsLost(self._steps, self._steps + 2)}])

    def spoil(self) -> None:
        """One event of the engine cannot be read."""
        if self.publisher is not None:
            self.lost = True
            self.publisher.offer([{"event": None}])

    def burst(self, rng: random.Random) -> None:
        """More at once than the inbox takes."""
        for _ in range(30):
            self.step(rng)

    def kill(self) -> None:
        """As SIGKILL."""
        if not self.ended:
            self.ended, self.ended_at = True, self.world.loop.active
        self._task.cancel()


class Worker:
    """:ivar lives: processes that run, or did; more than one at a time where somebody starts it twice.

    :ivar clock_off_ns: by how much the clock of its machine is wrong.
    """

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.machine = f"worker {number}"
        self.source = Source("n", "c", number, 0)
        self.clock_off_ns = 0
        self.lives: list[Life] = []

    def clock_ns(self) -> int:
        return self.world.clock_ns() + self.clock_off_ns

    def start(self) -> None:
        self.lives.append(Life(self.world, self))

    def crash(self) -> None:
        for life in self.lives:
            life.kill()

    @property
    def running(self) -> list[Life]:
        return [life for life in self.lives if not life.ended]

    def entry(self, epochs: dict[int, int]) -> Entry:
        source = self.source
        return Entry(
            namespace=source.namespace, component=source.component, worker_id=source.worker_id,
            mode="agg", engine="simulated", served_model_name="m", model_path="/m", context_length=64,
            block_size=LAYOUT.block_size, rule=LAYOUT.rule, hash_scheme=LAYOUT.hash_scheme,
            groups=LAYOUT.groups, epochs=epochs, total_kv_blocks=14, host="simulated",
        )  # fmt: skip


class Book:
    """What was published, and when: what a view may hold at an event id, and how old that is.

    :ivar held: (rank, epoch) -> next event id -> sequence hashes by group.
    :ivar ends: by life: (active time, epoch, next event id), in order.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.held: dict[tuple[Rank, int], dict[int, Held]] = {}
        self.ends: dict[Life, list[tuple[float, int, int]]] = {}

    def published(self, rank: Rank, batches: list[Batch], life: Life) -> None:
        """In the moment in which batches get their ids."""
        now = self._world.loop.active
        for batch in batches:
            held = self.held.setdefault((rank, batch.epoch), {0: {}})
            held[batch.next_event_id] = _after(held[batch.first_event_id], batch)
            self.ends.setdefault(life, []).append((now, batch.epoch, batch.next_event_id))

    def end_before(self, life: Life, moment: float) -> tuple[int, int]:
        """Epoch and next event id of a life at an active time."""
        end = (0, 0)
        for at, epoch, next_event_id in self.ends.get(life, ()):
            if at <= moment:
                end = (epoch, next_event_id)
        return end


def _after(held: Held, batch: Batch) -> Held:
    now = dict(held)
    for event in batch.events:
        match event:
            case Layout():
                now = {group.group_id: frozenset() for group in event.groups}
            case Stored():
                now[event.group_id] |= set(event.sequence_hashes)
            case Removed():
                now[event.group_id] -= set(event.sequence_hashes)
            case Cleared():
                for group in now if event.group_id is None else [event.group_id]:
                    now[group] = frozenset()
            case Moved():
                pass
    return now
