"""All that the index holds, per window, as one JSON object that is sent piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping

import msgspec

from vswa_plugin.events import TIERS, Rank
from vswa_plugin.fleet import Fleet
from vswa_plugin.index.dump import DUMP_VERSION
from vswa_plugin.router.http.answers import TooLarge
from vswa_plugin.router.http.messages import DumpLayout, GroupDump, RankDump

#: Looking through the index for one rank visits all its blocks; so many visits take about a second.
MAX_VISITS = 4_000_000
#: Hashes in one piece of the answer.
PIECE = 8_192


def dumped_ranks(fleet: Fleet, model: str | None, worker_id: int | None, dp_rank: int | None) -> list[Rank]:
    """Ranks in the index that fit, sorted.

    :raises TooLarge: they hold more than may be looked through at once.
    """
    ranks = [
        rank
        for rank in sorted(fleet.index.ranks)
        if model in (None, fleet.index.layout(rank).model)
        and worker_id in (None, rank.worker_id)
        and dp_rank in (None, rank.dp_rank)
    ]
    blocks = sum(fleet.index.stats().blocks.values())
    if len(ranks) > 1 and blocks * len(ranks) > MAX_VISITS:
        raise TooLarge(
            f"expected ranks times blocks of at most {MAX_VISITS}, got {len(ranks)} ranks and {blocks} "
            "blocks; ask for one worker with ?worker_id="
        )
    return ranks


async def dump(fleet: Fleet, ranks: list[Rank]) -> AsyncIterator[bytes]:
    """JSON of a :class:`DumpAnswer`. A rank that leaves meanwhile is left out."""
    yield b'{"version":%d,"ranks":[' % DUMP_VERSION
    first = True
    for rank in ranks:
        if rank not in fleet.index.ranks:
            continue
        for piece in _rank(fleet, rank):
            yield piece if first else b"," + piece
            first = True
        first = False
        await asyncio.sleep(0)  # those that are being routed first
    yield b"]}"


def _rank(fleet: Fleet, rank: Rank) -> Iterator[bytes]:
    """One rank as it is now: taken in at once, encoded piece by piece."""
    layout = fleet.index.layout(rank)
    contents = fleet.index.contents(rank)
    view = fleet.subscriber.view(rank)
    now = asyncio.get_running_loop().time()
    head = RankDump(
        worker_id=rank.worker_id,
        dp_rank=rank.dp_rank,
        scored=view is not None and view.scored(now),
        epoch=0 if view is None else view.reader.epoch,
        next_event_id=0 if view is None else view.reader.next_event_id,
        layout=DumpLayout(layout.groups, layout.rule, layout.model, layout.hash_scheme),
        groups=[],
    )
    opened = msgspec.json.encode(head).removesuffix(b"]}")
    for number, (group_id, held) in enumerate(contents.items()):
        empty = msgspec.json.encode(GroupDump(group_id, layout.group(group_id).label, {}))
        yield opened + (b"," if number else b"") + empty.removesuffix(b"}}")
        opened = b""
        yield from _tiers(held)
        yield b"}}"
    yield opened + b"]}"


def _tiers(held: Mapping[int, str]) -> Iterator[bytes]:
    began = False
    for tier in TIERS:
        hashes = sorted(name for name, where in held.items() if where == tier)
        if not hashes:
            continue
        yield (b"," if began else b"") + msgspec.json.encode(tier) + b":["
        began = True
        for at in range(0, len(hashes), PIECE):
            piece = msgspec.json.encode(hashes[at : at + PIECE])[1:-1]
            yield (b"," if at else b"") + piece
        yield b"]"
