"""What each rank holds in each pool of blocks, by last use: a sample of the blocks stands for all. Pure.

Blocks are sampled by their names, so that all ranks sample the same ones. With one in sixteen, it takes a few
steps to estimate what a hundred blocks are worth, and a block and rank take a 16th of an entry's memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from vswa_plugin.blocks import CacheGroup, CacheLayout, Memory
from vswa_plugin.wire import Cleared, Event, Layout, Rank, Removed, Stored

from .odds import ReuseOdds

#: One block in so many is followed.
SAMPLE = 16
#: Engines whose cache groups take their blocks from one pool, by their reuse rule.
ONE_POOL = frozenset({"vllm", "vllm_hybrid"})
#: How far a pool's size follows the number of blocks that are there when one is evicted.
_CAPACITY_STEP = 0.05
_MASK, _SALT = (1 << 64) - 1, 0x9E3779B97F4A7C15


def sampled(names: Iterable[int]) -> list[int]:
    """Those of ``names`` that are followed."""
    return [name for name in names if not name % SAMPLE]


class _Pool:
    """Blocks of one pool of a rank: key -> number of the request that used it last.

    :ivar ages: request -> blocks that it used last, own ones and those that others hold too; oldest first.
    :ivar capacity: its blocks, as the engine states it or as seen at evictions; None: not known yet.
    :ivar evicts: whether a block was evicted, so that each new one takes the place of another.
    """

    __slots__ = ("_stated", "ages", "capacity", "evicts", "used")

    def __init__(self, stated: int | None) -> None:
        self.used: dict[int, int] = {}
        self.ages: OrderedDict[int, list[int]] = OrderedDict()
        self._stated = stated
        self.empty()

    def empty(self) -> None:
        """Nothing is held any more, and all room is free."""
        self.capacity: float | None = self._stated or None
        self.evicts = False

    def evicted(self) -> None:
        """A block goes: so many as there are fit in."""
        self.evicts = True
        if self._stated is None:
            blocks = float(max(1, len(self.used)) * SAMPLE)
            self.capacity = blocks if self.capacity is None else self.capacity
            self.capacity += _CAPACITY_STEP * (blocks - self.capacity)

    def without_room(self, blocks: int) -> float:
        """Of so many new blocks, those that take the place of others."""
        if self.evicts:
            return blocks
        if self.capacity is None:
            return 0.0
        return min(float(blocks), max(0.0, len(self.used) * SAMPLE + blocks - self.capacity))

    def count(self, request: int, shared: bool, change: int) -> None:
        counts = self.ages.get(request)
        if counts is None:
            counts = self.ages[request] = [0, 0]
        counts[shared] += change
        if not (counts[0] or counts[1]):
            del self.ages[request]


class _Group:
    """One cache group of a rank's layout.

    :ivar last: blocks before a boundary that a prompt reads when it is resumed there; None: all.
    """

    __slots__ = ("last", "pool", "salt")

    def __init__(self, group: CacheGroup, index: int, pool: _Pool) -> None:
        self.pool = pool
        self.salt = index * _SALT & _MASK
        self.last = None
        if group.kind != "full":
            self.last = -(-(group.window_size or group.chunk_size or 1) // group.block_size)


class _Held:
    """One rank."""

    __slots__ = ("bit", "groups", "main", "pools", "sharing")

    def __init__(self, bit: int, layout: CacheLayout, memory: Memory | None) -> None:
        self.bit = bit
        stated = memory.pools if memory is not None else ()
        pools = {
            group_id: pool for each in stated for pool in [_Pool(each.blocks)] for group_id in each.group_ids
        }
        one = _Pool(None) if layout.rule in ONE_POOL else None
        self.groups: dict[int, _Group] = {}
        for index, group in enumerate(layout.groups):
            pool = pools.get(group.group_id) or one or _Pool(None)
            self.groups[group.group_id] = _Group(group, index, pool)
        self.pools = list(dict.fromkeys(group.pool for group in self.groups.values()))
        full = [each for each in self.groups.values() if each.last is None]
        #: The pool by whose room the requests under way are limited, and how many groups it serves.
        self.main = (full or list(self.groups.values()))[0].pool
        self.sharing = sum(each.pool is self.main for each in self.groups.values())


class Holdings:
    """All ranks of one model.

    :param odds: by which what is held is valued; its requests are the clock.
    :param copy_worth: of a block that another rank holds too, as a share of one that none holds.
    """

    def __init__(self, odds: ReuseOdds, copy_worth: float) -> None:
        self._odds = odds
        self._copy_worth = copy_worth
        self._ranks: dict[Rank, _Held] = {}
        #: Key -> ranks that hold the block, as bits.
        self._holders: dict[int, int] = {}
        self._by_bit: dict[int, _Held] = {}

    def ranks(self) -> list[Rank]:
        return list(self._ranks)

    def apply(self, rank: Rank, event: Event | None) -> None:
        """One change of a rank, in order; None: the rank has gone."""
        if event is None or isinstance(event, Layout):
            self._drop(rank)
            if event is not None:
                self._join(rank, event.cache_layout, event.memory)
            return
        held = self._ranks.get(rank)
        if held is None:
            return
        if isinstance(event, Stored):
            if (group := held.groups.get(event.group_id)) is not None:
                for name in sampled(event.sequence_hashes):
                    self._use(held, group.pool, name ^ group.salt)
        elif isinstance(event, Removed):
            if (group := held.groups.get(event.group_id)) is not None:
                self._removed(held, group, event.sequence_hashes)
        elif isinstance(event, Cleared):
            for group_id, group in held.groups.items():
                if event.group_id in (None, group_id):
                    self._clear(held, group)

    def used(self, rank: Rank, names: Sequence[int], cached_blocks: int) -> None:
        """A prompt has been given to a rank that reuses so many of its blocks: they are used now."""
        held = self._ranks.get(rank)
        if held is None:
            return
        for group in held.groups.values():
            first = 0 if group.last is None else max(0, cached_blocks - group.last)
            for name in sampled(names[first:cached_blocks]):
                key = name ^ group.salt
                if key in group.pool.used:
                    self._use(held, group.pool, key)

    def capacity(self, rank: Rank) -> float | None:
        """Blocks of a prompt that the rank has room for; None: that is not known yet."""
        held = self._ranks.get(rank)
        if held is None or held.main.capacity is None:
            return None
        return held.main.capacity / held.sharing

    def victims(self, rank: Rank, new_blocks: int) -> tuple[float, float]:
        """What goes where the rank stores so many new blocks: blocks, and how many are expected back.

        Both are averages over the pools, because a block that is computed again is computed for all of them.
        """
        held = self._ranks.get(rank)
        if held is None or new_blocks <= 0:
            return 0.0, 0.0
        gone = worth = 0.0
        for pool in held.pools:
            if (going := pool.without_room(new_blocks)) > 0:
                blocks, value = self._oldest(pool, going)
                gone += blocks
                worth += value
        return gone / len(held.pools), worth / len(held.pools)

    def _oldest(self, pool: _Pool, blocks: float) -> tuple[float, float]:
        left = blocks / SAMPLE
        worth, now, chance, of_copy = 0.0, self._odds.now, self._odds.chance, self._copy_worth
        for request, (own, shared) in pool.ages.items():
            count = own + shared
            share = 1.0 if count <= left else left / count
            worth += share * chance(now - request) * (own + of_copy * shared)
            left -= count
            if left <= 0:
                left = 0.0
                break
        return blocks - left * SAMPLE, worth * SAMPLE

    # -- changes -------------------------------------------------------------------------------------

    def _join(self, rank: Rank, layout: CacheLayout, memory: Memory | None) -> None:
        bit = next(bit for bit in range(len(self._by_bit) + 1) if bit not in self._by_bit)
        self._ranks[rank] = self._by_bit[bit] = _Held(bit, layout, memory)

    def _drop(self, rank: Rank) -> None:
        held = self._ranks.pop(rank, None)
        if held is not None:
            for pool in held.pools:
                for key in list(pool.used):
                    self._remove(held, pool, key)
            del self._by_bit[held.bit]

    def _clear(self, held: _Held, group: _Group) -> None:
        own = held.pools if len(held.pools) == 1 else [group.pool]
        for pool in own:
            for key in list(pool.used):
                self._remove(held, pool, key)
            pool.empty()

    def _removed(self, held: _Held, group: _Group, names: Sequence[int]) -> None:
        pool = group.pool
        pool.evicted()
        for name in sampled(names):
            self._remove(held, pool, name ^ group.salt)

    def _use(self, held: _Held, pool: _Pool, key: int) -> None:
        now, before = self._odds.now, pool.used.get(key)
        mask, own = self._holders.get(key, 0), 1 << held.bit
        if before is None:
            if mask and not mask & (mask - 1):
                self._recount(mask, key, shared=True)
            self._holders[key] = mask | own
            pool.count(now, bool(mask), 1)
        elif before != now:
            shared = mask != own
            pool.count(before, shared, -1)
            pool.count(now, shared, 1)
        pool.used[key] = now

    def _remove(self, held: _Held, pool: _Pool, key: int) -> None:
        request = pool.used.pop(key, None)
        if request is None:
            return
        rest = self._holders[key] & ~(1 << held.bit)
        pool.count(request, rest != 0, -1)
        if not rest:
            del self._holders[key]
            return
        self._holders[key] = rest
        if not rest & (rest - 1):
            self._recount(rest, key, shared=False)

    def _recount(self, mask: int, key: int, *, shared: bool) -> None:
        """The only other holder of a block now shares it, or holds it alone."""
        for pool in self._by_bit[mask.bit_length() - 1].pools:
            if (request := pool.used.get(key)) is not None:
                pool.count(request, shared, 1)  # first: without any block its place in the order is lost
                pool.count(request, not shared, -1)
