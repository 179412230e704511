"""All machines of one schedule, and its run from the first action until every view is right again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from typing import NamedTuple

from tests.sim.checks import CURRENT_S, at_any_moment, in_the_end
from tests.sim.engine import LAYOUT
from tests.sim.loop import VirtualLoop
from tests.sim.network import CALM, MAX_DELAY_S, Network, Weather
from tests.sim.schedule import FORGERIES, Action, Schedule
from tests.sim.store import Store, StoreReader
from tests.sim.worker import HEARTBEAT_S, Book, Worker
from vswa_plugin.errors import ProtocolError
from vswa_plugin.following.fleet import Fleet
from vswa_plugin.following.options import SubscriberOptions
from vswa_plugin.following.reader import ReaderOptions
from vswa_plugin.following.view import ViewOptions
from vswa_plugin.tasks import Tasks
from vswa_plugin.wire import control
from vswa_plugin.wire.events import Batch, Rank, Source, Stored, encode, layout_event
from vswa_plugin.wire.subjects import subject

#: Seconds between two looks at everything.
LOOK_S = 0.5
#: After the faults: the longest pause between two repairs, a request that is out, a lease that must end, and
#: heartbeats.
CONVERGED_S = 8.0 + 2.0 + 10.0 + 3 * HEARTBEAT_S
#: What a quiet deployment is watched for, in which nothing may be asked any more.
QUIET_S = 3.0
OPTIONS = SubscriberOptions(
    view=ViewOptions(heartbeat_s=HEARTBEAT_S), reader=ReaderOptions(buffer_events=40, max_backoff_s=8.0)
)
STRANGER = Source("n", "c", 99, 0)
#: An epoch that every publisher has left behind.
PAST = 5


class Outcome(NamedTuple):
    """:ivar wrong: what did not hold; empty where all did.
    :ivar converged_s: seconds from the end of the faults until every view was right.
    :ivar checks: how often everything was looked at.
    """

    wrong: tuple[str, ...]
    converged_s: float
    checks: int


class _Machine(Worker):
    """A worker, and until when two lives of it may have been heard."""

    shared_until = 0.0


class World:
    """What one schedule runs in."""

    def __init__(self, schedule: Schedule, loop: VirtualLoop) -> None:
        self.loop = loop
        self.rng = random.Random(schedule.seed ^ 0x5EED)
        self.network = Network(random.Random(schedule.seed ^ 0xBAD))
        self.store = Store(loop.time)
        self.book = Book(self)
        self.workers = [_Machine(self, number + 1) for number in range(schedule.workers)]
        self.fleets: list[Fleet] = []
        self.tasks = Tasks()
        self.checks = 0
        self._next_look = 0.0
        self._readings = 0
        self._schedule = schedule
        self._attacker = self.network.connection("attacker")

    def clock_ns(self) -> int:
        """The wall clock of all machines; no two readings are equal, as on a real one."""
        self._readings += 1
        return self._readings + 1_700_000_000 * 10**9 + int(self.loop.time() * 1e9)

    def worker(self, rank: Rank) -> _Machine | None:
        return next((each for each in self.workers if each.source.rank == rank), None)

    async def run(self) -> Outcome:
        """Everything, until all is right or something is wrong."""
        await self._attacker.connect()
        for number in range(self._schedule.routers):
            self.fleets.append(await self._router(number))
        for worker in self.workers:
            worker.start()
        began = self.loop.time()
        for action in self._schedule.actions:
            if wrong := await self._looking_until(began + action.at):
                return Outcome(wrong, 0.0, self.checks)
            await self._act(action)
        return await self._converge()

    async def _looking_until(self, moment: float) -> tuple[str, ...]:
        """Let time pass, and look at everything now and then; what was wrong."""
        while (left := moment - self.loop.time()) > 0:
            if self.loop.time() >= self._next_look:
                self._next_look = self.loop.time() + LOOK_S
                if wrong := self._look():
                    return wrong
            await asyncio.sleep(min(left, max(0.0, self._next_look - self.loop.time())))
        return ()

    async def stop(self) -> None:
        for worker in self.workers:
            worker.crash()
        for fleet in self.fleets:
            await fleet.stop()
        await asyncio.sleep(1.0)

    async def _converge(self) -> Outcome:
        """The faults end; what is cut comes back by itself."""
        while any(link.cut for link in self.network.links.values()) or self.store.away:
            await asyncio.sleep(LOOK_S)
            if wrong := self._look():
                return Outcome(wrong, 0.0, self.checks)
        for link in self.network.links.values():
            link.weather = CALM
        for life in (life for worker in self.workers for life in worker.running):
            life.notice_loss()
        ended = self.loop.time()
        await asyncio.sleep(2 * MAX_DELAY_S)  # what is on its way still comes
        while wrong := tuple(in_the_end(self)):
            if self.loop.time() - ended > CONVERGED_S:
                return Outcome((*wrong, f"not right {CONVERGED_S:g} s after the faults"), 0.0, self.checks)
            if found := self._look():
                return Outcome(found, 0.0, self.checks)
            await asyncio.sleep(LOOK_S)
        converged = self.loop.time() - ended
        return Outcome(await self._stays_quiet(), converged, self.checks)

    async def _stays_quiet(self) -> tuple[str, ...]:
        asked = [fleet.subscriber.stats.requests for fleet in self.fleets]
        await asyncio.sleep(QUIET_S)
        wrong = self._look() + tuple(in_the_end(self))
        if asked != [fleet.subscriber.stats.requests for fleet in self.fleets]:
            wrong += ("something is still asked for though every view is right",)
        return wrong

    def _look(self) -> tuple[str, ...]:
        self.checks += 1
        self.store.expire()
        for worker in self.workers:
            if len(worker.running) > 1:
                worker.shared_until = self.loop.active + CURRENT_S
        ended = () if self.tasks.ended is None else (f"a long-lived task has ended: {self.tasks.ended}",)
        return (*at_any_moment(self), *ended)

    async def _router(self, number: int) -> Fleet:
        fleet = Fleet(
            self.network.connection(f"router {number}"),  # type: ignore[arg-type]
            StoreReader(self.store),  # type: ignore[arg-type]
            options=OPTIONS,
            tasks=self.tasks,
        )
        fleet.subscriber._clock_ns = self.clock_ns
        self._watch_answers(fleet)
        await fleet.start(60.0)
        return fleet

    def _watch_answers(self, fleet: Fleet) -> None:
        """When an answer has been taken in, a live view has all that there was when it was given."""
        request = fleet._transport.request

        def check(subject_of: str, reply: control.Reply) -> None:
            end = getattr(reply, "end_event_id", None)
            for view in fleet.subscriber.views() if end is not None else ():
                reader = view.reader
                of_it = subject(view.source, "control") == subject_of and reader.epoch == reply.epoch
                if of_it and view.state == "live" and reader.next_event_id < end:
                    self.network.failures.append(
                        f"{view.source}: live before the end of what it has asked for"
                    )

        async def watched(to_subject: str, payload: bytes, timeout: float) -> bytes:
            answer = await request(to_subject, payload, timeout)
            with contextlib.suppress(ProtocolError):
                self.loop.call_soon(check, to_subject, control.decode_reply(answer))
            return answer

        fleet._transport.request = watched  # type: ignore[method-assign]

    # -- what happens --------------------------------------------------------------------------------

    async def _act(self, action: Action) -> None:
        rng = random.Random(action.seed)
        worker = self.workers[action.who % len(self.workers)]
        machines = sorted(self.network.links)
        machine = machines[action.who % len(machines)]
        lives = worker.running
        life = lives[action.who % len(lives)] if lives else None
        match action.kind:
            case "weather":
                self.network.links[machine].weather = _weather(rng)
            case "cut":
                self.network.cut(machine, rng.uniform(0.2, 8.0))
            case "broker away":
                seconds = rng.uniform(0.5, 15.0)
                for each in machines:
                    self.network.cut(each, seconds)
            case "registry away":
                self.store.leave(rng.uniform(0.5, 15.0))
            case "crash":
                worker.crash()
            case "start" if not lives:
                worker.start()
            case "twin" if len(lives) == 1:
                worker.start()
            case "clock":
                worker.clock_off_ns = int(rng.choice([-3600, -5, 0, 5, 3600]) * 1e9)
            case "forge":
                if worker.lives:
                    await self._forge(worker, rng.choice(FORGERIES), rng)
            case "suspend":
                self.loop.suspend(rng.uniform(0.5, 40.0))
            case "restart a router":
                number = action.who % len(self.fleets)
                await self.fleets[number].stop()
                self.fleets[number] = await self._router(number)
        if life is not None:
            match action.kind:
                case "step":
                    life.step(rng)
                case "lose events":
                    life.step(rng, losing=rng.randint(1, 3))
                case "spoil an event":
                    life.spoil()
                case "burst":
                    life.burst(rng)

    async def _forge(self, worker: Worker, what: str, rng: random.Random) -> None:
        """What anybody on the broker may send.

        Only the broker itself can keep a stranger from the next events of an epoch, or from an epoch that a
        clock allows: these are not tried.
        """
        if not self._attacker.connected:
            return
        victim = worker.source
        epoch, next_event_id = self.book.end_before(worker.lives[-1], self.loop.active)
        lie = (layout_event(LAYOUT), Stored(0, 0, None, (7, 8)), Stored(1, 0, None, (7, 8)))
        high = (Batch(1, epoch, next_event_id + 3, 1), Batch(1, epoch, 2**40, 1, lie[1:]))
        far = self.clock_ns() + 10**9 * 86_400 * rng.choice([3, 10_000])
        to_subject, payload = {
            "garbage": (victim, bytes([0xC1, 1, 2])),
            "past epoch": (victim, encode(Batch(1, PAST, next_event_id, 1, lie))),
            "far epoch": (victim, encode(Batch(1, far, 0, 1, lie))),
            "high id": (victim, encode(rng.choice(high))),
            "alias": ("vswa.v1.n.evil.1.0.events", encode(Batch(1, epoch + 1, 0, 1, lie))),
            "stranger": (STRANGER, encode(Batch(1, self.clock_ns(), 0, 1, lie))),
            "odd subject": ("vswa.v1.n.c.0001.0.events", encode(Batch(1, epoch, next_event_id, 1, lie[1:]))),
            "later version": (victim, encode(Batch(2, PAST, 0, 1))),
        }[what]
        event_subject = to_subject if isinstance(to_subject, str) else subject(to_subject, "events")
        if epoch or not isinstance(to_subject, Source) or to_subject is STRANGER:
            await self._attacker.publish(event_subject, payload)


def _weather(rng: random.Random) -> Weather:
    return rng.choice(
        [
            CALM,
            Weather(lost=rng.uniform(0.05, 0.5)),
            Weather(repeated=0.3, delayed_s=0.05),
            Weather(delayed_s=MAX_DELAY_S),
            Weather(0.2, 0.2, 0.1, 0.3),
        ]
    )


def run_schedule(schedule: Schedule, loop: VirtualLoop | None = None) -> Outcome:
    """What one schedule came to; the same each time."""
    loop = loop or VirtualLoop()
    logging.disable(logging.CRITICAL)
    random.seed(schedule.seed)  # the jitter of repairs
    asyncio.set_event_loop(loop)
    world = World(schedule, loop)
    try:
        return loop.run_until_complete(world.run())
    finally:
        loop.run_until_complete(world.stop())
        logging.disable(logging.NOTSET)
