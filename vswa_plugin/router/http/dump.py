"""All that the index holds, per window, as one JSON object that is sent piece by piece."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import NamedTuple

import msgspec

from vswa_plugin.blocks.layout import CacheGroup
from vswa_plugin.following.fleet import Fleet
from vswa_plugin.index import WindowIndex
from vswa_plugin.index.dump import DUMP_VERSION
from vswa_plugin.index.tables import Hashes
from vswa_plugin.router.http.answers import TooLarge
from vswa_plugin.router.http.messages import DumpLayout, GroupDump, RankDump
from vswa_plugin.wire.events import TIERS, Rank, id_text

#: Taking one rank in looks at all blocks of its groups, of all ranks, in one turn of the event loop.
#: So many took 5 to 18 ms among 64 ranks and 43 ms among 1,024, where masks are longer; in pure Python 41 ms,
#: and as long again where the garbage collector looks at the copies.
MAX_VISITS = 4_000_000
#: Hashes in one piece of the answer.
PIECE = 8_192


class _Taken(NamedTuple):
    """What a rank holds in one group at one instant, in no order.

    :param blocks: how many hashes there are.
    :param hashes: all of them, in pieces.
    :param slow: those that are not on the device; used up, so that no moment gives back all of their memory.
    :param tiers: of ``slow``, one for each.
    """

    blocks: int
    hashes: Iterator[Hashes]
    slow: list[int]
    tiers: list[str]


class DumpQuery(NamedTuple):
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
        fitting, visits = [], 0
        for part in index.parts(self.model):
            fits = [rank for rank in part.members if self._fits(rank)]
            fitting += fits
            resident = zip(part.layout.groups, part.table.resident(), strict=True)
            visits += len(fits) * sum(blocks for group, blocks in resident if self.shows(group))
        if visits > MAX_VISITS:
            raise TooLarge(
                f"expected ranks times blocks of at most {MAX_VISITS}, got {len(fitting)} ranks and {visits};"
                " ask for one worker with ?worker_id=, one rank with &dp_rank=, one window with &group_id="
            )
        return sorted(fitting)

    def shows(self, group: CacheGroup) -> bool:
        return self.group_id in (None, group.group_id)

    def _fits(self, rank: Rank) -> bool:
        return self.worker_id in (None, rank.worker_id) and self.dp_rank in (None, rank.dp_rank)


async def dump(fleet: Fleet, query: DumpQuery) -> AsyncIterator[bytes]:
    """JSON of a :class:`DumpAnswer`. A rank that leaves meanwhile is left out.

    Each rank is taken in at once, at 8 bytes a block with the kernel, and encoded piece by piece as they are
    asked for.

    :raises TooLarge: before the first piece.
    """
    ranks = query.ranks(fleet.index)
    yield b'{"version":%d,"ranks":[' % DUMP_VERSION
    between = b""
    for rank in ranks:
        if rank not in fleet.index.ranks:
            continue
        for piece in _rank(fleet, rank, query, between):
            if piece:
                yield piece
            await asyncio.sleep(0)  # those that are being routed first
        between = b","
    yield b"]}"


def _rank(fleet: Fleet, rank: Rank, query: DumpQuery, before: bytes) -> Iterator[bytes]:
    """One rank as it is now. Empty pieces are pauses."""
    layout = fleet.index.layout(rank)
    taken = _taken(fleet.index, rank, query)
    view = fleet.subscriber.view(rank)
    now = asyncio.get_running_loop().time()
    head = RankDump(
        worker_id=id_text(rank.worker_id),
        dp_rank=rank.dp_rank,
        scored=view is not None and view.scored(now),
        epoch=0 if view is None else view.reader.epoch,
        next_event_id=0 if view is None else view.reader.next_event_id,
        layout=DumpLayout(layout.groups, layout.rule, layout.model, layout.hash_scheme, layout.resumption),
        groups=[],
    )
    yield before + msgspec.json.encode(head).removesuffix(b"]}")
    between = b""
    for group_id, in_group in taken.items():
        empty = msgspec.json.encode(GroupDump(group_id, layout.group(group_id).label, {}))
        yield between + empty.removesuffix(b"}}")
        yield from _tiers(in_group)
        yield b"}}"
        between = b","
    yield b"]}"


def _taken(index: WindowIndex, rank: Rank, query: DumpQuery) -> dict[int, _Taken]:
    """Group id -> what the rank holds there, all of one instant."""
    (part,) = (part for part in index.parts() if rank in part.members)
    member = part.members[rank]
    taken: dict[int, _Taken] = {}
    for number, group in enumerate(part.layout.groups):
        if query.shows(group):
            pieces = part.table.held(number, member.bit, PIECE)
            slow = member.slow[number]
            taken[group.group_id] = _Taken(member.counts[number], pieces, list(slow), list(slow.values()))
    return taken


def _tiers(taken: _Taken) -> Iterator[bytes]:
    """Tier -> hashes, ascending; members of a JSON object, at a moment's work each. Empty where it pauses."""
    bits = (taken.blocks // PIECE).bit_length()
    runs = {tier: [array("Q") for _ in range(1 << bits)] for tier in TIERS}
    yield from _part(taken, runs, 64 - bits)
    between = b""
    for tier, of_tier in runs.items():
        begin, end = between + msgspec.json.encode(tier) + b":[", b""
        for number, run in enumerate(of_tier):
            names: Iterable[int] = run
            if tier == TIERS[0]:
                names = set(run).difference(*(runs[slower][number] for slower in TIERS[1:]))
            piece = msgspec.json.encode(sorted(names))[1:-1]
            yield begin + piece if piece else b""
            if piece:
                begin, end, between = b",", b"]", b","
        yield end


def _part(taken: _Taken, runs: dict[str, list[array[int]]], shift: int) -> Iterator[bytes]:
    """Part the hashes into runs, each below the next; those of the device hold all. A pause after each piece.

    Hashes are spread evenly, so that their first bits part them into runs of some :data:`PIECE`: sorting all
    at once would take half a second a million.
    """
    for hashes in taken.hashes:
        for name in hashes:
            runs[TIERS[0]][name >> shift].append(name)
        yield b""
    while taken.slow:
        for name, tier in zip(taken.slow[-PIECE:], taken.tiers[-PIECE:], strict=True):
            runs[tier][name >> shift].append(name)
        del taken.slow[-PIECE:], taken.tiers[-PIECE:]
        yield b""
