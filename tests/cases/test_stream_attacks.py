"""What others on the broker can do to a router's view of a rank, and must not be able to."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.cases.follower_helpers import (
    LAYOUT,
    HandedIn,
    Told,
    batch,
    entry_of,
    run_in_jumps,
    source_of_worker,
)
from vswa_plugin.errors import ConfigError, ConnectError
from vswa_plugin.following.fleet import Fleet
from vswa_plugin.following.reader import Apply, Ask, Effect, Reader, Reset
from vswa_plugin.publishing.history import History, HistoryOptions
from vswa_plugin.publishing.residency import Residency
from vswa_plugin.registry import Connected, Joined, Left
from vswa_plugin.wire import control
from vswa_plugin.wire.events import Batch, Event, Rank, Removed, Source, Stored, encode, layout_event
from vswa_plugin.wire.subjects import source_of, subject

HONEST = source_of_worker(1)
ENTRY = entry_of(1)
RANK = HONEST.rank
EPOCH = 5
HASHES = (1, 2, 3)
#: A prompt that goes on behind the three blocks: all of them can be reused.
PROMPT_LEN = 3 * 32 + 1
ALL_REUSED = {RANK: 96}
REQUEST_TIMEOUT_S = 2.0
#: How long a stale view is scored as last seen.
GRACE_S = 10.0


class Broker(HandedIn):
    """Requests go to ``served``; others are never answered."""

    def __init__(self) -> None:
        super().__init__()
        self.served: dict[str, Callable[[bytes], bytes]] = {}

    async def request(self, to_subject: str, payload: bytes, timeout: float) -> bytes:
        if to_subject in self.served:
            return self.served[to_subject](payload)
        await asyncio.sleep(timeout)
        raise ConnectError("nobody answers")

    async def says(
        self, of: Source | str, first: int, *events: Event, epoch: int = EPOCH, payload: bytes = b""
    ) -> None:
        event_subject = of if isinstance(of, str) else subject(of, "events")
        await self.deliver(event_subject, payload or batch(first, *events, epoch=epoch))


class Followed:
    """A fleet that follows worker 1, which is registered and holds three blocks."""

    def __init__(self) -> None:
        self.broker = Broker()
        self.registry = Told(Joined(ENTRY), Connected())
        self.fleet = Fleet(self.broker, self.registry)  # type: ignore[arg-type]
        self.history = History(Residency(LAYOUT), HistoryOptions(), lambda: 0.0)
        self.history.begin_epoch(EPOCH)
        self.broker.served[subject(HONEST, "control")] = self.history.answer

    def score(self) -> dict[Rank, int]:
        return self.fleet.index.score(HASHES, PROMPT_LEN)

    async def publishes(self, first: int, *events: Event, lost: bool = False) -> None:
        """What worker 1 says, and keeps for replay."""
        batch = Batch(1, EPOCH, first, 1, events)
        self.history.ring.add(batch, encode(batch))
        if not lost:
            await self.broker.says(HONEST, first, *events)

    async def leaves(self) -> None:
        await self.registry.tell(Left(ENTRY))

    async def __aenter__(self) -> Followed:
        await self.fleet.start()
        await self.publishes(0, layout_event(LAYOUT), Stored(0, 0, None, HASHES))
        await asyncio.sleep(REQUEST_TIMEOUT_S)
        assert ALL_REUSED == self.score()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.fleet.stop()
        if self.broker.raised:
            raise RuntimeError(self.broker.raised)


def following(body: Callable[[Followed], Awaitable[Any]]) -> Any:
    """What ``body`` returns, given a fleet that follows worker 1."""

    async def whole() -> Any:
        async with Followed() as followed:
            return await body(followed)

    return run_in_jumps(whole())


# -- ranks that nobody registered ----------------------------------------------------------------------


def test_a_rank_that_the_registry_does_not_list_is_not_scored() -> None:
    async def body(followed: Followed) -> dict[Rank, int]:
        await followed.broker.says(source_of_worker(7), 0, layout_event(LAYOUT), Stored(0, 0, None, HASHES))
        return followed.score()

    assert ALL_REUSED == following(body)


def test_made_up_ranks_take_no_memory_of_the_index() -> None:
    async def body(followed: Followed) -> tuple[set[Rank], int]:
        before = followed.fleet.index.stats().nbytes
        for number in range(500):
            made_up = source_of_worker(1000 + number)
            await followed.broker.says(made_up, 0, layout_event(LAYOUT), Stored(0, 0, None, (number,)))
        return set(followed.fleet.index.ranks), followed.fleet.index.stats().nbytes - before

    assert ({RANK}, 0) == following(body)


# -- what is no sign of life -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "noise",
    [
        pytest.param({"epoch": EPOCH - 1}, id="heartbeats of a lower epoch"),
        pytest.param({"payload": b"\xc1"}, id="bytes that are no batch"),
    ],
)
def test_a_rank_of_which_nothing_valid_is_heard_scores_nothing_after_three_heartbeats(
    noise: dict[str, Any],
) -> None:
    async def body(followed: Followed) -> dict[Rank, int]:
        followed.broker.served.clear()  # the worker is dead: it answers no request either
        for _ in range(10):
            await followed.broker.says(HONEST, 2, **noise)
            await asyncio.sleep(0.5)
        return followed.score()

    assert 0 == following(body).get(RANK, 0)


def test_a_rank_of_which_nothing_at_all_is_heard_scores_nothing_after_three_heartbeats() -> None:
    async def body(followed: Followed) -> dict[Rank, int]:
        await asyncio.sleep(5)
        return followed.score()

    assert 0 == following(body).get(RANK, 0)


def test_heartbeats_of_the_current_epoch_keep_a_rank_scored() -> None:
    async def body(followed: Followed) -> dict[Rank, int]:
        for _ in range(60):
            await followed.broker.says(HONEST, 2)
            await asyncio.sleep(1)
        return followed.score()

    assert ALL_REUSED == following(body)


# -- one spelling a rank ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "alias",
    ["n.c.0001.0", "n.c.0x1.0", "n.c.+1.0", "n.c.0_1.0", "n.c.1.00", "n.c.1.+0", "n.c.-1.0", "n.c.1.-0"],
)
def test_only_one_spelling_of_a_rank_is_a_subject_of_ours(alias: str) -> None:
    try:
        source = source_of(f"vswa.v1.{alias}.events")
    except ConfigError as error:
        assert alias in str(error)
    else:
        raise AssertionError(f"expected a refusal of {alias}, got {source}")


@pytest.mark.parametrize("alias", ["ns.other.1.0", "other.backend.1.0", "ns.backend.0001.0"])
def test_a_subject_that_is_not_the_ranks_own_changes_nothing_of_it(alias: str) -> None:
    async def body(followed: Followed) -> dict[Rank, int]:
        await followed.broker.says(f"vswa.v1.{alias}.events", 2, Removed(0, HASHES))
        return followed.score()

    assert ALL_REUSED == following(body)


def test_a_rank_that_has_left_is_not_revived_on_a_subject_that_is_not_its_own() -> None:
    async def body(followed: Followed) -> set[Rank]:
        alias = "vswa.v1.ns.other.1.0.events"
        await followed.broker.says(alias, 2)
        await followed.leaves()
        await followed.broker.says(alias, 2)
        await followed.broker.says(
            alias, 0, layout_event(LAYOUT), Stored(0, 0, None, HASHES), epoch=EPOCH + 1
        )
        return set(followed.fleet.index.ranks)

    assert set() == following(body)


def test_made_up_components_take_no_memory() -> None:
    async def body(followed: Followed) -> int:
        await followed.broker.says("vswa.v1.ns.x.1.0.events", 2)
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            for number in range(10_000):
                await followed.broker.says(f"vswa.v1.ns.x{number}.1.0.events", 2)
            return tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()

    assert 256 << 10 > following(body)


# -- repairs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("silent", "registered"),
    [
        pytest.param(0, 0, id="alone"),
        pytest.param(500, 0, id="made-up ranks"),
        pytest.param(0, 200, id="frozen workers"),
    ],
)
def test_a_gap_is_repaired_within_the_grace_though_others_never_answer(silent: int, registered: int) -> None:
    """So that the rank never loses its score."""

    async def body(followed: Followed) -> list[int]:
        for number in range(silent):
            await followed.broker.says(source_of_worker(1000 + number), 7)
        await followed.registry.tell(*(Joined(entry_of(100 + number)) for number in range(registered)))
        await followed.publishes(2, Stored(0, 3, None, (4,)), lost=True)
        scored = []
        for _ in range(int(GRACE_S) + 2):
            await followed.broker.says(HONEST, 3)
            await asyncio.sleep(1)
            scored.append(followed.score().get(RANK, 0))
        return scored

    assert [96] * (int(GRACE_S) + 2) == following(body)


def test_a_replay_that_was_cut_is_not_the_end_of_the_repair() -> None:
    """Nobody has told the reader of a higher id: no heartbeat came since what it missed."""
    history = History(Residency(LAYOUT), HistoryOptions(message_bytes=200), lambda: 0.0)
    history.begin_epoch(EPOCH)
    reader, held = Reader(), set[int]()

    def published(*events: Event) -> Batch:
        batch = Batch(1, EPOCH, history.ring.next_event_id, 1, events)
        history.ring.add(batch, encode(batch))
        return batch

    def carry_out(effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Reset():
                    held.clear()
                case Apply():
                    for event in effect.events:
                        if isinstance(event, Stored):
                            held.update(event.sequence_hashes)
                        elif isinstance(event, Removed):
                            held.difference_update(event.sequence_hashes)
                case Ask():
                    answer = control.decode_reply(history.answer(control.encode(effect.request)))
                    carry_out(reader.on_reply(effect.request, answer, 1.0))

    carry_out(reader.on_batch(published(layout_event(LAYOUT), Stored(0, 0, None, HASHES)), 0.0))
    for number in range(20):
        published(Stored(0, 3, None, (2**60 + number,)))
    published(Removed(0, HASHES))
    carry_out(reader.on_malformed(1.0))

    assert reader.stale or history.ring.next_event_id == reader.next_event_id
    assert reader.stale or not held.intersection(HASHES)
