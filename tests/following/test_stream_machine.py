"""Readers against real publishers' state over a network that loses, repeats, delays and reorders.

Two ranks, three groups (two of equal window). The invariants use what the model knows, never the reader's
own flags: after every step a reader's view is what the publisher held when it gave out that event id; a view
that an answer made live has all that was published when that answer was given; and once the faults end, one
heartbeat and the answers to what is asked make every view exact and live.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.properties import examples
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.contract import BlocksMoved, BlocksRemoved, BlocksStored, EngineBlock, EngineEvent
from vswa_plugin.following.reader import Apply, Ask, BecameLive, BecameStale, Reader, ReaderOptions, Reset
from vswa_plugin.publishing.history import HistoryOptions
from vswa_plugin.publishing.ledger import Ledger, LedgerOptions
from vswa_plugin.publishing.residency import Residency
from vswa_plugin.wire import control
from vswa_plugin.wire.events import Event, Layout, Moved, Removed, Stored, Unknown, decode

LAYOUT = CacheLayout((CacheGroup(0, 4, 2), CacheGroup(1, 4, 2), CacheGroup(2, None, 2)), "trtllm_v2", "m")
View = dict[int, dict[int, str]]


class Naive:
    """What a reader's effects add up to: plain dicts, set semantics checked."""

    def __init__(self) -> None:
        self.view: View = {}

    def apply(self, event: Event) -> None:
        match event:
            case Layout():
                self.view = {group.group_id: {} for group in event.groups}
            case Stored():
                for value in event.sequence_hashes:
                    self.view[event.group_id][value] = event.tier
            case Removed():
                for value in event.sequence_hashes:
                    self.view[event.group_id].pop(value, None)
            case Moved():
                for value in event.sequence_hashes:
                    if value in self.view[event.group_id]:
                        self.view[event.group_id][value] = event.tier


class Publishing:
    """One rank's publisher without I/O, and what it held at every event id it gave out."""

    def __init__(self) -> None:
        limits = HistoryOptions(ring_batches=4, message_bytes=70, share_s=1.0, expire_s=3.0, snapshots=2)
        options = LedgerOptions(batch_bytes=300, history=limits)
        self.now = 0.0
        self.ledger = Ledger("rank", Residency(LAYOUT), options, clock_ns=lambda: 1, clock=lambda: self.now)
        self.truth = Naive()
        #: (epoch, next event id) -> what was resident then.
        self.held: dict[tuple[int, int], View] = {}

    def begin(self) -> list[bytes]:
        self.ledger.begin()
        return self.published()

    def restart(self) -> list[bytes]:
        """A new life: nothing resident, a higher epoch."""
        self.ledger.lose("the test says so")
        return self.published()

    def step(self, *engine_events: EngineEvent) -> list[bytes]:
        for event in engine_events:
            self.ledger.add(event)
        return self.published()

    def published(self) -> list[bytes]:
        payloads = []
        for batch, payload in self.ledger.flush():
            payloads.append(payload)
            if batch.first_event_id == 0:
                self.truth = Naive()
                self.held[batch.epoch, 0] = {}
            for event_id, event in enumerate(batch.events, batch.first_event_id + 1):
                assert not isinstance(event, Unknown)
                self.truth.apply(event)
                self.held[batch.epoch, event_id] = {
                    group: dict(blocks) for group, blocks in self.truth.view.items()
                }
        return payloads

    def heartbeat(self) -> list[bytes]:
        return [self.ledger.heartbeat()]


class Following:
    """One rank's reader, its view, and what it has asked and not been answered."""

    def __init__(self) -> None:
        self.reader = Reader(ReaderOptions(buffer_events=12, first_backoff_s=0.5, max_backoff_s=4.0))
        self.naive = Naive()
        self.asked: list[control.Request] = []
        #: Answers that were given up on and may still come.
        self.late: list[tuple[control.Request, control.Reply]] = []
        self.live = False
        #: Epoch, and the next event id that the publisher had when it gave the last answer that was awaited.
        self.answered = (0, 0)

    @property
    def pending(self) -> control.Request | None:
        return self.reader._repair.pending if self.reader._repair else None

    def carry_out(self, effects: list[Any]) -> None:
        for effect in effects:
            match effect:
                case Reset():
                    self.naive.view = {}
                case Apply():
                    for event in effect.events:
                        self.naive.apply(event)
                case Ask():
                    self.asked.append(effect.request)
                case BecameStale():
                    self.live = False
                case BecameLive():
                    self.live = True


RANKS = st.integers(0, 1)
#: What becomes of a message: most arrive, so that the run gets somewhere.
FATES = st.sampled_from(["now", "now", "now", "later", "lost", "twice", "corrupt"])
PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple)


def engine_block(path: tuple[int, ...]) -> EngineBlock:
    return EngineBlock("/".join(map(str, path)), (path[-1], 7))


class StreamMachine(RuleBasedStateMachine):
    @initialize(fate=FATES)
    def begin(self, fate: str) -> None:
        self.now = 0.0
        self.publishers = [Publishing(), Publishing()]
        self.followers = [Following(), Following()]
        self.network: list[list[bytes]] = [[], []]
        for rank, publisher in enumerate(self.publishers):
            self.send(rank, fate, publisher.begin())

    # -- what engines do ---------------------------------------------------------------------------

    @rule(fate=FATES, rank=RANKS, group=st.integers(0, 2), path=PATHS)
    def store(self, fate: str, rank: int, group: int, path: tuple[int, ...]) -> None:
        blocks = tuple(engine_block(path[: depth + 1]) for depth in range(len(path)))
        self.send(rank, fate, self.publishers[rank].step(BlocksStored(group, None, blocks)))

    @rule(fate=FATES, rank=RANKS, group=st.integers(0, 2), paths=st.lists(PATHS, min_size=1, max_size=3))
    def remove(self, fate: str, rank: int, group: int, paths: list[tuple[int, ...]]) -> None:
        hashes = tuple(engine_block(path).hash for path in paths)
        self.send(rank, fate, self.publishers[rank].step(BlocksRemoved(group, hashes)))

    @rule(
        fate=FATES, rank=RANKS, group=st.integers(0, 2), path=PATHS, tier=st.sampled_from(["device", "host"])
    )
    def move(self, fate: str, rank: int, group: int, path: tuple[int, ...], tier: str) -> None:
        event = BlocksMoved(group, (engine_block(path).hash,), tier)
        self.send(rank, fate, self.publishers[rank].step(event))

    @rule(fate=FATES, rank=RANKS)
    def restart(self, fate: str, rank: int) -> None:
        self.send(rank, fate, self.publishers[rank].restart())

    @rule(fate=FATES, rank=RANKS)
    def heartbeat(self, fate: str, rank: int) -> None:
        self.send(rank, fate, self.publishers[rank].heartbeat())

    def send(self, rank: int, fate: str, payloads: list[bytes]) -> None:
        follower = self.followers[rank]
        for payload in payloads:
            match fate:
                case "now":
                    self.hand_over(rank, payload)
                case "twice":
                    self.hand_over(rank, payload)
                    self.network[rank].append(payload)
                case "later":
                    self.network[rank].append(payload)
                case "corrupt":
                    follower.carry_out(follower.reader.on_malformed(self.now))

    # -- what the network does ---------------------------------------------------------------------

    @rule(rank=RANKS)
    def deliver(self, rank: int) -> None:
        if self.network[rank]:
            self.hand_over(rank, self.network[rank].pop(0))

    @rule(rank=RANKS, data=st.data())
    def deliver_out_of_order(self, rank: int, data: st.DataObject) -> None:
        if self.network[rank]:
            at = data.draw(st.integers(0, len(self.network[rank]) - 1))
            self.hand_over(rank, self.network[rank].pop(at))

    def hand_over(self, rank: int, payload: bytes) -> None:
        follower = self.followers[rank]
        follower.carry_out(follower.reader.on_batch(decode(payload), self.now))

    # -- what repairs do ---------------------------------------------------------------------------

    @rule(rank=RANKS)
    def answer(self, rank: int) -> None:
        follower = self.followers[rank]
        if follower.asked:
            request = follower.asked.pop(0)
            history = self.publishers[rank].ledger.history
            reply = control.decode_reply(history.answer(control.encode(request)))
            if isinstance(reply, control.Replay | control.SnapshotHead) and request == follower.pending:
                follower.answered = (reply.epoch, history.ring.next_event_id)
            follower.carry_out(follower.reader.on_reply(request, reply, self.now))

    @rule(rank=RANKS)
    def another_reader_takes_a_snapshot(self, rank: int) -> None:
        ledger = self.publishers[rank].ledger
        ledger.history.answer(control.encode(control.SnapshotRequest(ledger.epoch)))

    @rule(rank=RANKS, paths=st.lists(PATHS, min_size=2, max_size=4))
    def lose_the_last_events(self, rank: int, paths: list[tuple[int, ...]]) -> None:
        for path in paths:
            self.store("lost", rank, 0, path)
        follower = self.followers[rank]
        follower.carry_out(follower.reader.on_malformed(self.now))

    @rule(rank=RANKS)
    def lose_an_answer(self, rank: int) -> None:
        follower = self.followers[rank]
        if follower.asked:
            request = follower.asked.pop(0)
            reply = control.decode_reply(self.publishers[rank].ledger.history.answer(control.encode(request)))
            follower.late.append((request, reply))
            follower.carry_out(follower.reader.on_failure(request, "timed out", self.now))

    @rule(rank=RANKS)
    def a_late_answer_comes(self, rank: int) -> None:
        follower = self.followers[rank]
        if follower.late:
            follower.carry_out(follower.reader.on_reply(*follower.late.pop(0), self.now))

    @rule(rank=RANKS)
    def announce(self, rank: int) -> None:
        follower = self.followers[rank]
        follower.carry_out(follower.reader.on_announced(self.publishers[rank].ledger.epoch))

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for publisher, follower in zip(self.publishers, self.followers, strict=True):
            publisher.now = self.now
            follower.carry_out(follower.reader.on_tick(self.now))

    # -- what must hold ----------------------------------------------------------------------------

    @invariant()
    def a_view_is_what_the_publisher_held_at_that_event_id(self) -> None:
        for publisher, follower in self.pairs():
            reader = follower.reader
            if reader.epoch:
                assert publisher.held[reader.epoch, reader.next_event_id] == follower.naive.view
            else:
                assert {} == follower.naive.view

    @invariant()
    def at_most_one_request_is_out(self) -> None:
        for _, follower in self.pairs():
            assert follower.pending is None or follower.pending in follower.asked

    @invariant()
    def a_live_view_is_not_behind_the_last_answer(self) -> None:
        for _, follower in self.pairs():
            epoch, next_event_id = follower.answered
            if follower.live and epoch == follower.reader.epoch:
                assert follower.reader.next_event_id >= next_event_id

    def teardown(self) -> None:
        """The faults end: what is on its way arrives, and every request is answered."""
        for rank, (publisher, follower) in enumerate(self.pairs()):
            while self.network[rank]:
                self.deliver(rank)
            self.hand_over(rank, *publisher.heartbeat())
            for _ in range(100):
                if follower.asked:
                    self.answer(rank)
                elif follower.reader.stale:
                    self.time_passes(5.0)
            assert not follower.reader.stale
            assert follower.live
            assert publisher.truth.view == follower.naive.view
            resident = {group: set(blocks) for group, blocks in follower.naive.view.items()}
            assert publisher.ledger.residency.resident() == resident

    def pairs(self) -> list[tuple[Publishing, Following]]:
        if not hasattr(self, "publishers"):
            return []
        return list(zip(self.publishers, self.followers, strict=True))


StreamMachine.TestCase.settings = examples(300, stateful_step_count=40)
TestStream = StreamMachine.TestCase
