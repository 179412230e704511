"""Ranks with one model, hash scheme, layout and rule, and what each of them holds."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.blocks.reuse import ReuseRule
from vswa_plugin.errors import InvariantError, StreamError, VswaError
from vswa_plugin.index.boundaries import boundaries_for
from vswa_plugin.index.plans import ScorePlan, plan_for
from vswa_plugin.index.python_table import PythonTable
from vswa_plugin.index.tables import Hashes, KernelTable, Table, bits_of
from vswa_plugin.wire.events import TIERS, Rank

DEVICE = TIERS[0]
#: Bits of cleared ranks that wait for their sweep; more are swept at once, so that masks stay short.
MAX_DEAD = 64
#: A pass of the background sweep ends within so many events, and looks at no fewer hashes at a time.
SWEEP_EVENTS, SWEEP_LEAST = 4096, 256
_PLANS = 16_384


class Member:
    """One rank in a part: its bit, and what the table does not say."""

    __slots__ = ("bit", "counts", "scored", "slow")

    def __init__(self, bit: int, groups: int, scored: bool) -> None:
        self.bit = bit
        self.scored = scored
        self.counts = [0] * groups
        #: Per group: tier of the blocks that are not on the device.
        self.slow: list[dict[int, str]] = [{} for _ in range(groups)]


class Part:
    """Scores its ranks together. Groups are named by their index in the layout."""

    def __init__(self, layout: CacheLayout, rule: ReuseRule, kernel: ModuleType | None) -> None:
        groups = len(layout.groups)
        self.layout = layout
        self.block_size = layout.block_size
        self.hash_block_size = layout.hash_block_size
        self.rule = rule
        self.group_index: dict[int | None, int] = {
            group.group_id: index for index, group in enumerate(layout.groups)
        }
        self.members: dict[Rank, Member] = {}
        self.table: Table = PythonTable(groups) if kernel is None else KernelTable(kernel, groups)
        self._ranks: list[Rank | None] = []
        self._free: list[int] = []
        self._waiting = self._sweeping = 0
        self._wanted = 0
        self._plans: dict[int, ScorePlan | None] = {}

    def join(self, rank: Rank, scored: bool) -> None:
        bit = self._free.pop() if self._free else len(self._ranks)
        self._place(bit, rank)
        self.members[rank] = Member(bit, len(self.layout.groups), scored)
        self._wanted |= scored << bit

    def leave(self, rank: Rank) -> None:
        """Take the rank out: it is not scored from now on, and its blocks are swept later."""
        member = self.members.pop(rank)
        self._place(member.bit, None)
        self._wanted &= ~(1 << member.bit)
        if any(member.counts):
            self._waiting |= 1 << member.bit
        else:
            self._free.append(member.bit)
        if (self._waiting | self._sweeping).bit_count() > MAX_DEAD:
            while not self.sweep(self.table.rows() + 1):
                pass

    def clear(self, rank: Rank) -> None:
        """The rank starts again under a fresh bit."""
        member = self.members[rank]
        if any(member.counts):
            self.leave(rank)
            self.join(rank, member.scored)

    def clear_group(self, rank: Rank, group: int) -> None:
        """The rank holds nothing in that group: a whole pass, as this is too rare for a bit per group."""
        member = self.members[rank]
        if not member.counts[group]:
            return
        self.table.rewind()
        while not self.table.sweep(1 << member.bit, self.table.rows() + 1, group):
            pass
        # A pass that was under way starts over.
        self._waiting, self._sweeping = self._waiting | self._sweeping, 0
        member.counts[group] = 0
        member.slow[group].clear()

    def set_scored(self, rank: Rank, scored: bool) -> None:
        """Whether the rank is scored. Cheap: an idle fleet sets it at every heartbeat, mostly as it was."""
        member = self.members[rank]
        if member.scored != scored:
            member.scored = scored
            self._wanted ^= 1 << member.bit

    def store(self, rank: Rank, group: int, hashes: Hashes, tier: str, room: int) -> int:
        """The rank holds these blocks too; returns how many were left out for lack of room."""
        member = self.members[rank]
        added, left_out = self.table.add(group, member.bit, hashes, room)
        member.counts[group] += added
        if tier != DEVICE or member.slow[group]:
            self._set_tier(member, group, hashes, tier)
        return left_out

    def remove(self, rank: Rank, group: int, hashes: Hashes) -> None:
        member = self.members[rank]
        member.counts[group] -= self.table.discard(group, member.bit, hashes)
        slow = member.slow[group]
        if slow:
            for sequence_hash in hashes:
                slow.pop(sequence_hash, None)

    def move(self, rank: Rank, group: int, hashes: Hashes, tier: str) -> None:
        self._set_tier(self.members[rank], group, hashes, tier)

    def sweep(self, budget: int) -> bool:
        """Look at ``budget`` hashes for ranks that are gone; True when there is nothing left to sweep."""
        if not self._sweeping:
            if not self._waiting:
                return True
            self._sweeping, self._waiting = self._waiting, 0
            self.table.rewind()
        if self.table.sweep(self._sweeping, budget):
            self._free += bits_of(self._sweeping)
            self._sweeping = 0
        return not (self._sweeping or self._waiting)

    @property
    def has_dead(self) -> bool:
        """Whether anything waits for the sweep."""
        return bool(self._sweeping or self._waiting)

    def sweep_a_little(self) -> None:
        self.sweep(max(SWEEP_LEAST, self.table.rows() // SWEEP_EVENTS))

    def score(self, hashes: Hashes, prompt_len: int) -> dict[Rank, int]:
        """Cached tokens by rank; empty where the rule fails, which the host counts and names."""
        try:
            try:
                plan = self._plans[prompt_len]
            except KeyError:
                plan = self._plan(prompt_len)
            if plan is None:
                return self._score_each(hashes, prompt_len)
            scores = self.table.score(hashes, plan, self._wanted, self._ranks)
            return self._tokens(scores, prompt_len) if plan.asks_tokens else scores
        except VswaError:
            return {}

    def masks(self, hashes: Hashes) -> list[list[int]]:
        """Per group and name the ranks that hold it, as bits."""
        return [self.table.masks(group, hashes) for group in range(len(self.layout.groups))]

    def contents(self, rank: Rank) -> Iterator[tuple[int, dict[int, str]]]:
        """Per group: all that the rank holds there, hash -> tier."""
        member = self.members[rank]
        for group in range(len(self.layout.groups)):
            slow = member.slow[group]
            pieces = self.table.held(group, member.bit, SWEEP_EVENTS)
            yield group, {name: slow.get(name, DEVICE) for piece in pieces for name in piece}

    def nbytes(self) -> int:
        """Estimate; 150 bytes for a block that is not on the device."""
        slow = sum(len(tiers) for member in self.members.values() for tiers in member.slow)
        return self.table.nbytes() + 150 * slow

    def check(self) -> None:
        """Raise InvariantError for what must never be."""
        wrong = self.table.check()
        if wrong:
            raise InvariantError(f"window index, model {self.layout.model!r}: {wrong}")
        bits = [member.bit for member in self.members.values()]
        dead = [*bits_of(self._waiting), *bits_of(self._sweeping)]
        if sorted([*bits, *dead, *self._free]) != list(range(len(self._ranks))):
            raise InvariantError(f"window index: bits in use {bits}, dead {dead}, free {self._free}")
        if any(self._ranks[member.bit] != rank for rank, member in self.members.items()):
            raise InvariantError("window index: a rank is not where its bit says")
        scored = sum(1 << member.bit for member in self.members.values() if member.scored)
        if self._wanted != scored:
            raise InvariantError(
                f"window index: bits {bits_of(self._wanted)} are scored, the ranks say {bits_of(scored)}"
            )
        for group in range(len(self.layout.groups)):
            self._check_group(group, sum(1 << bit for bit in (*bits, *dead)))

    def _check_group(self, group: int, known: int) -> None:
        items = list(self.table.items(group))
        if len(items) != self.table.resident()[group]:
            raise InvariantError(
                f"window index: {self.table.resident()[group]} hashes counted, {len(items)} held"
            )
        if any(mask & ~known for _, mask in items):
            raise InvariantError("window index: a block is held by a rank that never was, or was swept")
        for rank, member in self.members.items():
            held = {sequence_hash for sequence_hash, mask in items if mask >> member.bit & 1}
            if len(held) != member.counts[group]:
                raise InvariantError(
                    f"window index: rank {rank} counts {member.counts[group]}, holds {len(held)}"
                )
            if not member.slow[group].keys() <= held or DEVICE in member.slow[group].values():
                raise InvariantError(f"window index: rank {rank} has a tier for blocks that it does not hold")

    def _place(self, bit: int, rank: Rank | None) -> None:
        """Assign the bit to ``rank``, in a new list: Table.score may keep the one that it was given.

        The copy takes some microseconds at 3,000 ranks, a fraction of what the rank's first message takes.
        """
        ranks = self._ranks.copy()
        ranks[bit : bit + 1] = [rank]
        self._ranks = ranks

    def _plan(self, prompt_len: int) -> ScorePlan | None:
        if len(self._plans) >= _PLANS:
            self._plans.clear()
        plan = self._plans[prompt_len] = plan_for(self.rule, self.layout, prompt_len)
        return plan

    def _tokens(self, boundaries: dict[Rank, int], prompt_len: int) -> dict[Rank, int]:
        tokens = {b: self.rule.tokens(self.layout, b, prompt_len) for b in set(boundaries.values())}
        return {rank: tokens[boundary] for rank, boundary in boundaries.items() if tokens[boundary] > 0}

    def _score_each(self, hashes: Hashes, prompt_len: int) -> dict[Rank, int]:
        """Call the rule at every boundary: for rules whose needs are no plain numbers."""
        boundaries = boundaries_for(self.rule, self.layout, prompt_len, len(hashes))
        deepest = boundaries.deepest(self.masks(hashes), self._wanted)
        by_rank = {self._ranks[bit]: boundary for bit, boundary in deepest.items()}
        return self._tokens({rank: at for rank, at in by_rank.items() if rank is not None}, prompt_len)

    def _set_tier(self, member: Member, group: int, hashes: Hashes, tier: str) -> None:
        slow = member.slow[group]
        if tier == DEVICE:
            for sequence_hash in hashes:
                slow.pop(sequence_hash, None)
            return
        for sequence_hash, mask in zip(hashes, self.table.masks(group, hashes), strict=True):
            if mask >> member.bit & 1:
                slow[sequence_hash] = tier


def check_tier(tier: str) -> None:
    if tier not in TIERS:
        raise StreamError(f"expected a tier of {', '.join(TIERS)}, got {tier!r}; update the older side")
