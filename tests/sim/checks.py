"""What must hold at every moment, and in the end. Each check gives what it found wrong, as text."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tests.sim.engine import BLOCK, LAYOUT, SLIDING, a_prompt
from tests.sim.network import MAX_DELAY_S
from tests.sim.worker import HEARTBEAT_S, Life, Worker
from vswa_plugin.blocks.hashing import sequence_hashes_of_tokens
from vswa_plugin.blocks.reuse import resumable, rule_named
from vswa_plugin.following.fleet import Fleet
from vswa_plugin.following.view import View
from vswa_plugin.wire.events import Rank

if TYPE_CHECKING:
    from tests.sim.world import World

#: A live view knows all that was published before that: heartbeats that may be missing, a tick, and the delay
#: of a message from each side of the broker.
CURRENT_S = 2.5 * HEARTBEAT_S + 0.5 + 2 * MAX_DELAY_S
Held = dict[int, set[int]]


def at_any_moment(world: World) -> Iterator[str]:
    """Checks whose truth does not depend on whether faults are under way."""
    for life in (life for worker in world.workers for life in worker.running):
        yield from _claims_nothing_that_is_gone(life)
    for fleet in world.fleets:
        yield from _lists_registered_ranks_only(fleet)
        for view in fleet.subscriber.views():
            yield from _is_a_moment_of_the_publisher(world, fleet, view)
            if view.state == "live":
                yield from _is_current(world, view)
        yield from _scores_as_the_rule_says(fleet, world.rng)
    yield from world.network.failures


def in_the_end(world: World) -> Iterator[str]:
    """What is still to come, after the faults have ended."""
    for worker in world.workers:
        lives = worker.running
        if len(lives) > 1:
            yield f"{worker.machine}: {len(lives)} lives go on"
        for fleet in world.fleets:
            if not lives:
                if fleet.subscriber.view(worker.source.rank) is not None:
                    yield f"{worker.machine}: is dead, and still followed"
            else:
                yield from _is_whole(fleet, worker, lives[0])


def contents(fleet: Fleet, rank: Rank) -> Held:
    """Sequence hashes in the index, by group, without empty groups."""
    if rank not in fleet.index.ranks:
        return {}
    return {group: set(blocks) for group, blocks in fleet.index.contents(rank).items() if blocks}


def _claims_nothing_that_is_gone(life: Life) -> Iterator[str]:
    publisher = life.publisher
    if publisher is None or publisher._inbox or life.unnoticed:
        return
    truth = life.engine.resident()
    for group, claimed in life.residency.resident().items():
        if gone := claimed - truth[group]:
            yield f"{life.worker.machine}: claims {len(gone)} blocks of group {group} that its engine lacks"


def _lists_registered_ranks_only(fleet: Fleet) -> Iterator[str]:
    registered = {Rank(entry.worker_id, rank) for entry in fleet.entries.values() for rank in entry.epochs}
    if strangers := set(fleet.index.ranks) - registered:
        yield f"the index holds ranks that nobody registered: {sorted(strangers)}"


def _is_a_moment_of_the_publisher(world: World, fleet: Fleet, view: View) -> Iterator[str]:
    rank, reader = view.source.rank, view.reader
    if view.layout is None or view.broken is not None:
        return
    published = world.book.held.get((rank, reader.epoch))
    if published is None:
        yield f"{view.source}: epoch {reader.epoch} was begun by nobody"
        return
    expected = {group: set(held) for group, held in published.get(reader.next_event_id, {}).items() if held}
    if expected != (held := contents(fleet, rank)):
        yield (
            f"{view.source}: {view.state} at event {reader.next_event_id} of epoch {reader.epoch}: expected "
            f"{_counts(expected)}, got {_counts(held)}"
        )


def _is_current(world: World, view: View) -> Iterator[str]:
    worker = world.worker(view.source.rank)
    if worker is None or len(worker.running) > 1 or worker.shared_until > world.loop.active:
        return  # of two publishers, either may be followed until one of them has noticed
    if not worker.running:
        if world.loop.active - max(life.ended_at for life in worker.lives) > CURRENT_S:
            yield f"{view.source}: live, though its worker is dead"
        return
    end = world.book.end_before(worker.running[0], world.loop.active - CURRENT_S)
    if (view.reader.epoch, view.reader.next_event_id) < end:
        yield (
            f"{view.source}: live at {(view.reader.epoch, view.reader.next_event_id)}, though {end} was "
            f"published {CURRENT_S:g} s ago"
        )


def _scores_as_the_rule_says(fleet: Fleet, rng: random.Random) -> Iterator[str]:
    tokens = a_prompt(rng)
    names = sequence_hashes_of_tokens(tokens, BLOCK)
    expected = {}
    now = fleet.subscriber._now()
    for rank in fleet.index.ranks:
        view = fleet.subscriber.view(rank)
        held = contents(fleet, rank)
        has = {group: [name in held.get(group, ()) for name in names] for group in (SLIDING, 1)}
        score = resumable(rule_named(LAYOUT.rule), LAYOUT, has, len(tokens))
        if view is not None and view.scored(now) and score:
            expected[rank] = score
    got = {rank: score for rank, score in fleet.index.score(names, len(tokens)).items() if score}
    late = {rank for rank in got if rank not in expected and _may_be_settled_later(fleet, rank)}
    if expected != {rank: score for rank, score in got.items() if rank not in late}:
        yield f"expected scores {expected}, got {got}"


def _may_be_settled_later(fleet: Fleet, rank: Rank) -> bool:
    """Time alone has ended its score, which the next tick will see."""
    view = fleet.subscriber.view(rank)
    return (
        view is not None
        and not view.scored(fleet.subscriber._now())
        and view.scored(fleet.subscriber._now() - 0.5)
    )


def _is_whole(fleet: Fleet, worker: Worker, life: Life) -> Iterator[str]:
    rank, publisher = worker.source.rank, life.publisher
    view = fleet.subscriber.view(rank)
    if publisher is None or view is None:
        yield f"{worker.machine}: is not followed"
        return
    ledger, reader = publisher.ledger, view.reader
    known = fleet.entries.get(life.entry.key) if life.entry is not None else None
    if known is None or known.epochs != {rank.dp_rank: ledger.epoch}:
        yield f"{worker.machine}: is not registered with its epoch"
    if view.state != "live" or not view.scored(fleet.subscriber._now()):
        yield f"{worker.machine}: is {view.state}: {view.reason}"
    elif (reader.epoch, reader.next_event_id) != (ledger.epoch, ledger.next_event_id):
        yield f"{worker.machine}: is followed at another event than it published"
    else:
        held = contents(fleet, rank)
        published = {group: blocks for group, blocks in life.residency.resident().items() if blocks}
        truth = {group: blocks for group, blocks in life.engine.resident().items() if blocks}
        if held != published:
            yield f"{worker.machine}: expected {_counts(published)}, got {_counts(held)}"
        if not life.lost and held != truth:
            yield f"{worker.machine}: lost nothing, holds {_counts(truth)}, and is seen with {_counts(held)}"


def _counts(held: Held) -> dict[int, int]:
    return {group: len(blocks) for group, blocks in held.items()}
