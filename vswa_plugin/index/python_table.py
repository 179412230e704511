"""The table in pure Python: the reference for the compiled one, and what serves without a compiler.

A dict per group of sequence hash -> int whose bits are ranks. Scoring looks up the groups that need every
block first, and ends where no rank is left; what sliding groups need is looked up from the deepest boundary
backwards, and no further than until every rank has found its own.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, repeat
from operator import and_

from vswa_plugin.index.plans import ScorePlan
from vswa_plugin.index.tables import ALL_GROUPS, Hashes, ranks_of
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
        scores: dict[Rank, int] = {}
        for boundary, mask in self._settle(hashes[: plan.boundaries], plan, wanted):
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
            rank_set = self._rank_sets[mask] = tuple(ranks_of(mask, ranks))
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
        blocks = len(hashes)
        at_end = plan.at_end if blocks == plan.boundaries else None
        needs = [_need(need, blocks) for need in plan.trailing]
        last_needs = needs if at_end is None else [_need(need, blocks) for need in at_end]
        whole = [g for g, need in enumerate(needs) if need == blocks == last_needs[g]]
        sliding = [g for g, need in enumerate(needs) if need and g not in whole]
        running = self._running(whole, hashes, wanted)
        windows = [
            _Window(need, [self._groups[g] for g in sliding if needs[g] == need], hashes)
            for need in sorted({needs[g] for g in sliding})
        ]
        remaining = running[0] if running else 0
        boundary = len(running)
        if boundary == blocks and last_needs != needs and remaining:
            mask = running[-1] & self._last_held(last_needs, hashes)
            remaining ^= mask
            yield boundary, mask
            boundary -= 1
        step = windows[0].need if windows else boundary
        while remaining and boundary > 0:
            above = (boundary - 1) // step * step
            # Block `above` is in every window of every boundary up to here.
            candidates = remaining & running[above]
            for group in sliding:
                candidates &= self._groups[group].get(hashes[above], 0)
            if not candidates:
                boundary = above
                continue
            held: Iterable[int] = running[above:boundary]
            for window in windows:
                held = map(and_, held, window.held(above, boundary))
            for masks in reversed(list(held)):
                if masks & remaining:
                    yield boundary, masks & remaining
                    remaining &= ~masks
                boundary -= 1

    def _running(self, groups: Sequence[int], hashes: Hashes, wanted: int) -> list[int]:
        """After each block, the wanted ranks that hold all so far in all ``groups``; ends where none does."""
        if not groups:
            return [wanted] * len(hashes) if wanted else []
        running = [wanted]
        at, size = 0, _FIRST_CHUNK
        while at < len(hashes) and running[-1]:
            masks = list(_masks([self._groups[group] for group in groups], hashes[at : at + size]))
            # Mostly the same ranks hold all of a chunk, and masks are shared.
            if masks.count(masks[0]) == len(masks):
                running += [running[-1] & masks[0]] * len(masks)
            else:
                running += accumulate(masks, and_, initial=running.pop())
            at, size = at + size, min(4 * size, _LAST_CHUNK)
        if not running[-1]:
            del running[running.index(0) :]
        return running[1:]

    def _last_held(self, needs: Sequence[int], hashes: Hashes) -> int:
        """Ranks that hold in each group the last blocks that it needs."""
        held = -1
        for holders, need in zip(self._groups, needs, strict=True):
            for ranks in map(holders.get, hashes[len(hashes) - need :], repeat(0)):
                held &= ranks
        return held


def _of_rank(hashes: list[int], masks: list[int], bit: int, piece: int) -> Iterator[Hashes]:
    """Consumes its lists, so that giving their memory back takes no longer than a piece does."""
    while hashes:
        last = zip(hashes[-piece:], masks[-piece:], strict=True)
        yield [sequence_hash for sequence_hash, mask in last if mask >> bit & 1]
        del hashes[-piece:], masks[-piece:]


class _Window:
    """Ranks that hold the last ``need`` blocks before a boundary in all of some groups.

    Cut at multiples of ``need``, a window is a suffix of one piece and a prefix of the next, and so two
    ANDs whatever its length (van Herk).
    """

    def __init__(self, need: int, groups: list[_Ranks], hashes: Hashes) -> None:
        self.need = need
        self._groups = groups
        self._hashes = hashes
        self._piece = -1
        self._held: list[int] = []

    def held(self, above: int, boundary: int) -> list[int]:
        """For each boundary in (``above``, ``boundary``]; calls come from the deepest boundary backwards."""
        held: list[int] = []
        while boundary > above:
            piece = (boundary - 1) // self.need * self.need
            if piece != self._piece:
                self._piece, self._held = piece, self._of_piece(piece)
            start = max(above, piece)
            held = self._held[start - piece : boundary - piece] + held
            boundary = start
        return held

    def _of_piece(self, piece: int) -> list[int]:
        prefixes = accumulate(_masks(self._groups, self._hashes[piece : piece + self.need]), and_)
        if piece == 0:
            return list(prefixes)
        before = _masks(self._groups, self._hashes[piece - self.need : piece])
        suffixes = list(accumulate(reversed(list(before)), and_))
        suffixes.reverse()
        return list(map(and_, prefixes, [*suffixes[1:], -1]))


def _masks(groups: Sequence[_Ranks], hashes: Hashes) -> Iterable[int]:
    """For each hash the ranks that hold it in all ``groups``."""
    masks: Iterable[int] = map(groups[0].get, hashes, repeat(0))
    for holders in groups[1:]:
        masks = map(and_, masks, map(holders.get, hashes, repeat(0)))
    return masks


def _need(need: int | None, blocks: int) -> int:
    return blocks if need is None else min(need, blocks)


def _check(hashes: Hashes) -> None:
    """TypeError or OverflowError for what is no u64."""
    array("Q", hashes)
