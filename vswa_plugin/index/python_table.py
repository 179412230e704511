"""The table in pure Python: the reference for the compiled one, and what serves without a compiler.

A dict per group of sequence hash -> int whose bits are ranks. Scoring first finds the ranks that hold every
block in the groups that need all, and ends where no rank is left. The other groups are then looked at from
the deepest boundary backwards, block by block, and no further than until every rank has found its own.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate, repeat
from operator import and_

from vswa_plugin.index.plans import ScorePlan, check_plan
from vswa_plugin.index.tables import ALL_GROUPS, Hashes, bits_of
from vswa_plugin.wire.events import Rank

_FIRST_CHUNK, _LAST_CHUNK = 16, 256
#: Masks are shared between blocks; no more than so many are remembered for that.
_SHARED = 1 << 16
_INT_BYTES = 48  # an int object of 64 bits as the allocator rounds it

_Ranks = dict[int, int]


class PythonTable:
    """See :class:`vswa_plugin.index.tables.Table`."""

    def __init__(self, groups: int) -> None:
        self._groups: list[_Ranks] = [{} for _ in range(groups)]
        self._shared: dict[int, int] = {}
        self._ranks: list[Rank | None] = []
        self._rank_sets: dict[int, Iterable[Rank]] = {}
        self._to_sweep: list[tuple[_Ranks, list[int]]] | None = None
        self._checked: ScorePlan | None = None

    def add(self, group: int, bit: int, hashes: Hashes, room: int) -> tuple[int, int]:
        _check(hashes)
        holders, one = self._groups[group], 1 << bit
        limit = sys.maxsize if room < 0 else len(holders) + room
        fresh = dict.fromkeys(hashes, one)
        if len(holders) + len(fresh) <= limit and holders.keys().isdisjoint(fresh):
            holders.update(fresh)
            return len(fresh), 0
        added = left_out = 0
        for sequence_hash in hashes:
            ranks = holders.get(sequence_hash)
            if ranks is None:
                if len(holders) >= limit:
                    left_out += 1
                    continue
                holders[sequence_hash] = one
            elif ranks & one:
                continue
            else:
                holders[sequence_hash] = self._share(ranks | one)
            added += 1
        return added, left_out

    def discard(self, group: int, bit: int, hashes: Hashes) -> int:
        _check(hashes)
        holders, one = self._groups[group], 1 << bit
        removed = 0
        for sequence_hash in hashes:
            ranks = holders.get(sequence_hash, 0)
            if ranks & one:
                removed += 1
                self._leave(holders, sequence_hash, ranks ^ one)
        return removed

    def masks(self, group: int, hashes: Hashes) -> list[int]:
        return list(map(self._groups[group].get, hashes, repeat(0)))

    def items(self, group: int) -> Iterable[tuple[int, int]]:
        return self._groups[group].items()

    def held(self, group: int, bit: int, piece: int) -> Iterator[Hashes]:
        holders = self._groups[group]
        return _of_rank(list(holders), list(holders.values()), bit, piece)

    def score(
        self, hashes: Hashes, plan: ScorePlan, wanted: int, ranks: list[Rank | None]
    ) -> dict[Rank, int]:
        if plan is not self._checked:  # one that is kept is used for many prompts
            check_plan(plan, len(self._groups))
            self._checked = plan
        scores: dict[Rank, int] = {}
        for boundary, mask in self._settle(hashes, plan, wanted):
            tokens = min(boundary * plan.unit, plan.limit)
            if tokens > 0:
                scores.update(dict.fromkeys(self._ranks_of(mask, ranks), tokens))
        return scores

    def sweep(self, dead: int, budget: int, group: int = ALL_GROUPS) -> bool:
        groups = self._groups if group < 0 else [self._groups[group]]
        if self._to_sweep is None:
            self._to_sweep = [(holders, list(holders)) for holders in groups]
        while budget > 0 and self._to_sweep:
            holders, hashes = self._to_sweep[-1]
            for sequence_hash in hashes[-budget:]:
                ranks = holders.get(sequence_hash, 0)
                if ranks & dead:
                    self._leave(holders, sequence_hash, ranks & ~dead)
            count = min(budget, len(hashes))
            budget -= max(1, count)
            del hashes[len(hashes) - count :]
            if not hashes:
                self._to_sweep.pop()
        if self._to_sweep:
            return False
        self._to_sweep = None
        self._give_back()
        return True

    def rewind(self) -> None:
        self._to_sweep = None

    def resident(self) -> Sequence[int]:
        return [len(holders) for holders in self._groups]

    def rows(self) -> int:
        return sum(self.resident()) + len(self._groups)

    def nbytes(self) -> int:
        masks = len(self._shared) * _INT_BYTES
        return masks + sum(sys.getsizeof(holders) + len(holders) * _INT_BYTES for holders in self._groups)

    def check(self) -> str | None:
        empty = sum(not ranks for holders in self._groups for ranks in holders.values())
        return f"{empty} hashes are held by no rank" if empty else None

    def _ranks_of(self, mask: int, ranks: list[Rank | None]) -> Iterable[Rank]:
        """The ranks of ``mask``, cached while ``ranks`` is the same list: a change comes as a new list."""
        if ranks is not self._ranks or len(self._rank_sets) >= _SHARED:
            self._ranks = ranks
            self._rank_sets.clear()
        rank_set = self._rank_sets.get(mask)
        if rank_set is None:
            listed = (ranks[bit] for bit in bits_of(mask))
            rank_set = self._rank_sets[mask] = tuple(rank for rank in listed if rank is not None)
        return rank_set

    def _share(self, ranks: int) -> int:
        if len(self._shared) >= _SHARED:
            self._shared.clear()
        return self._shared.setdefault(ranks, ranks)

    def _leave(self, holders: _Ranks, sequence_hash: int, ranks: int) -> None:
        if ranks:
            holders[sequence_hash] = self._share(ranks)
        else:
            del holders[sequence_hash]

    def _give_back(self) -> None:
        """A dict keeps the size it once had until it is copied."""
        for holders in self._groups:
            if sys.getsizeof(holders) > 10_000 + 400 * len(holders):
                items = list(holders.items())
                holders.clear()
                holders.update(items)

    def _settle(self, hashes: Hashes, plan: ScorePlan, wanted: int) -> Iterator[tuple[int, int]]:
        """Boundaries from the deepest on, each with the ranks of which it is the deepest."""
        needs = [_Need.of(plan, group, hashes) for group in range(len(self._groups))]
        reached = min(plan.boundaries, (len(hashes) - max(n.after * n.stride for n in needs)) // plan.step)
        at_end = plan.at_end if reached == plan.boundaries else None
        whole = [g for g, n in enumerate(needs) if n.is_whole and (at_end is None or at_end[g] is None)]
        sliding = {g: need for g, need in enumerate(needs) if g not in whole}
        running = self._running({g: needs[g] for g in whole}, reached, wanted)
        remaining = running[0] if running else 0
        if at_end is not None and len(running) == reached > 0:
            last = {g: replace(need, trailing=at_end[g]) for g, need in sliding.items()}
            held = self._held_at(reached, last, running.pop())
            if held and (whole or any(need.blocks(reached) for need in last.values())):
                yield reached, held
                remaining &= ~held
        first_needed = {g: n for g, n in sliding.items() if not n.chunk and (n.trailing or 0) >= n.per_step}
        jump = min((n.trailing // n.per_step for n in first_needed.values() if n.trailing), default=1)
        boundary = len(running)
        while boundary and remaining:
            # The block behind boundary `above` is needed at every boundary from the next one up to this one.
            above = max(0, boundary - jump)
            held = remaining & running[above]
            for group, need in first_needed.items():
                held &= self._groups[group].get(need.names[above * need.per_step], 0)
            for deeper in range(boundary, above, -1) if held else ():
                found = self._held_at(deeper, sliding, running[deeper - 1] & remaining)
                if found and (whole or any(need.blocks(deeper) for need in sliding.values())):
                    yield deeper, found
                    remaining ^= found
            boundary = above

    def _running(self, needs: dict[int, _Need], reached: int, wanted: int) -> list[int]:
        """For each boundary the wanted ranks that hold all blocks in these groups; ends where none does."""
        running = None if needs else [wanted] * reached
        for group, need in needs.items():
            boundaries = reached if running is None else len(running)
            names = need.names[: boundaries * need.per_step + need.after]
            held = self._prefixes(group, names, wanted)[need.per_step + need.after :: need.per_step]
            running = held if running is None else list(map(and_, running, held))
        if running and not running[-1]:
            del running[running.index(0) :]
        return running or []

    def _prefixes(self, group: int, names: Hashes, wanted: int) -> list[int]:
        """For each number of blocks, from 0 on, the wanted ranks that hold so many; ends where none does."""
        held = [wanted]
        at, size = 0, _FIRST_CHUNK
        while at < len(names) and held[-1]:
            masks = list(map(self._groups[group].get, names[at : at + size], repeat(0)))
            # Mostly the same ranks hold all of a chunk, and masks are shared.
            if masks.count(masks[0]) == len(masks):
                held += [held[-1] & masks[0]] * len(masks)
            else:
                held += accumulate(masks, and_, initial=held.pop())
            at, size = at + size, min(4 * size, _LAST_CHUNK)
        return held

    def _held_at(self, boundary: int, needs: dict[int, _Need], held: int) -> int:
        """Of the ranks ``held``, those that hold what these groups need at the boundary."""
        for group, need in needs.items():
            if held:
                held = reduce(and_, map(self._groups[group].get, need.blocks(boundary), repeat(0)), held)
        return held


@dataclass(frozen=True, slots=True)
class _Need:
    """What one group needs: a row of a plan. ``names`` are those of its blocks, in order."""

    names: Hashes
    stride: int
    per_step: int
    trailing: int | None
    chunk: int | None
    after: int

    @classmethod
    def of(cls, plan: ScorePlan, group: int, hashes: Hashes) -> _Need:
        stride = plan.strides[group] if plan.strides else 1
        return cls(
            hashes[stride - 1 :: stride] if stride > 1 else hashes,
            stride,
            plan.step // stride,
            plan.trailing[group],
            plan.chunks[group] if plan.chunks else None,
            plan.after[group] if plan.after else 0,
        )

    @property
    def is_whole(self) -> bool:
        return self.trailing is None and not self.chunk

    def blocks(self, boundary: int) -> Hashes:
        """Those that must be held at the boundary, by name."""
        end = boundary * self.per_step
        if self.chunk:
            first = end // self.chunk * self.chunk
        else:
            first = 0 if self.trailing is None else max(0, end - self.trailing)
        return self.names[first : end + self.after]


def _of_rank(hashes: list[int], masks: list[int], bit: int, piece: int) -> Iterator[Hashes]:
    """Consumes its lists, so that giving their memory back takes no longer than a piece does."""
    while hashes:
        last = zip(hashes[-piece:], masks[-piece:], strict=True)
        yield [sequence_hash for sequence_hash, mask in last if mask >> bit & 1]
        del hashes[-piece:], masks[-piece:]


def _check(hashes: Hashes) -> None:
    """TypeError or OverflowError for what is no u64."""
    array("Q", hashes)
