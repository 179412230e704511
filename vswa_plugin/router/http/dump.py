"""All that the index holds, per window, as one JSON object that is sent piece by piece."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from vswa_plugin.blocks.layout import CacheGroup
from vswa_plugin.following.fleet import Fleet
from vswa_plugin.index import WindowIndex
from vswa_plugin.index.dump import DUMP_VERSION
from vswa_plugin.router.http.answers import TooLarge
from vswa_plugin.router.http.messages import DumpLayout, GroupDump, RankDump
from vswa_plugin.wire.events import TIERS, Rank

#: Taking one rank looks at all blocks of its groups, whoever holds them; so many take most of a second.
MAX_VISITS = 4_000_000
#: Hashes in one piece of the answer.
PIECE = 8_192

#: Tier -> hashes, in no order.
_Held = Mapping[str, Sequence[int]]


class Asked(NamedTuple):
    """What is to be dumped; None: all.

    :param group_id: cache group; ranks without it are shown with none.
    """

    model: str | None = None
    worker_id: int | None = None
    dp_rank: int | None = None
    group_id: int | None = None

    def ranks(self, index: WindowIndex) -> list[Rank]:
        """Those that fit, sorted.

        :raises TooLarge: together they would hold up the requests that are being routed.
        """
        found, visits = [], 0
        for part in index.parts(self.model):
            fits = [rank for rank in part.members if self._fits(rank)]
            found += fits
            resident = zip(part.layout.groups, part.table.resident(), strict=True)
            visits += len(fits) * sum(blocks for group, blocks in resident if self.shows(group))
        if visits > MAX_VISITS:
            raise TooLarge(
                f"expected ranks times blocks of at most {MAX_VISITS}, got {len(found)} ranks and {visits}; "
                "ask for one worker with ?worker_id=, one rank with &dp_rank=, one window with &group_id="
            )
        return sorted(found)

    def shows(self, group: CacheGroup) -> bool:
        return self.group_id in (None, group.group_id)

    def _fits(self, rank: Rank) -> bool:
        return self.worker_id in (None, rank.worker_id) and self.dp_rank in (None, rank.dp_rank)


async def dump(fleet: Fleet, asked: Asked) -> AsyncIterator[bytes]:
    """JSON of a :class:`DumpAnswer`. A rank that leaves meanwhile is left out.

    Each rank is taken in at once, at 8 bytes a block, and encoded piece by piece as they are asked for.

    :raises TooLarge: before the first piece.
    """
    ranks = asked.ranks(fleet.index)
    yield b'{"version":%d,"ranks":[' % DUMP_VERSION
    between = b""
    for rank in ranks:
        if rank not in fleet.index.ranks:
            continue
        for piece in _rank(fleet, rank, asked, between):
            if piece:
                yield piece
            await asyncio.sleep(0)  # those that are being routed first
        between = b","
    yield b"]}"


def _rank(fleet: Fleet, rank: Rank, asked: Asked, before: bytes) -> Iterator[bytes]:
    """One rank as it is now. Empty pieces are pauses."""
    layout = fleet.index.layout(rank)
    held = _taken(fleet.index, rank, asked)
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
    yield before + msgspec.json.encode(head).removesuffix(b"]}")
    between = b""
    for group_id, tiers in held.items():
        empty = msgspec.json.encode(GroupDump(group_id, layout.group(group_id).label, {}))
        yield between + empty.removesuffix(b"}}")
        yield from _tiers(tiers)
        yield b"}}"
        between = b","
    yield b"]}"


def _taken(index: WindowIndex, rank: Rank, asked: Asked) -> dict[int, _Held]:
    """Group id -> what the rank holds there, all of one instant."""
    (part,) = (part for part in index.parts() if rank in part.members)
    member = part.members[rank]
    found: dict[int, _Held] = {}
    for number, group in enumerate(part.layout.groups):
        if not asked.shows(group):
            continue
        held = array("Q", [name for name, mask in part.table.items(number) if mask >> member.bit & 1])
        slow = member.slow[number]
        tiers = {TIERS[0]: array("Q", [name for name in held if name not in slow]) if slow else held}
        for tier in TIERS[1:] if slow else ():
            tiers[tier] = array("Q", [name for name, where in slow.items() if where == tier])
        found[group.group_id] = tiers
    return found


def _tiers(held: _Held) -> Iterator[bytes]:
    between = b""
    for tier, hashes in held.items():
        if not hashes:
            continue
        yield between + msgspec.json.encode(tier) + b":["
        inner = b""
        for run in _ascending(hashes):
            yield inner + msgspec.json.encode(run)[1:-1] if run else b""
            inner = b"," if run else inner
        yield b"]"
        between = b","


def _ascending(hashes: Sequence[int]) -> Iterator[list[int]]:
    """All of them in runs of some :data:`PIECE`, at a moment's work each; empty where it pauses.

    Hashes are spread evenly, so that their first bits part them into runs: sorting all at once would take
    half a second a million.
    """
    bits = (len(hashes) // PIECE).bit_length()
    runs = [array("Q") for _ in range(1 << bits)]
    for at in range(0, len(hashes), PIECE):
        for name in hashes[at : at + PIECE]:
            runs[name >> 64 - bits].append(name)
        yield []
    for run in runs:
        yield sorted(run)
