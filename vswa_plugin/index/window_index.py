"""Which blocks every rank holds in each cache group, and how much of a prompt each could reuse."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import msgspec

from vswa_plugin.blocks.hashing import block_hashes, sequence_hashes, with_lookahead
from vswa_plugin.blocks.kernel import load_kernel, require_kernel
from vswa_plugin.blocks.layout import HASH_SCHEME, CacheLayout
from vswa_plugin.blocks.reuse import RULES, ReuseRule, check_applicable, need_of, rule_named
from vswa_plugin.errors import ConfigError, StreamError, VswaError
from vswa_plugin.index.boundaries import boundaries_for
from vswa_plugin.index.dump import DUMP_VERSION, GroupDump, IndexDump, RankDump
from vswa_plugin.index.explain import Explanation, explain_part
from vswa_plugin.index.part import DEVICE, Part, check_tier
from vswa_plugin.index.tables import UNLIMITED, Hashes
from vswa_plugin.wire.events import TIERS, Cleared, Event, Layout, Moved, Rank, Removed, Stored, id_text


class IndexStats(msgspec.Struct, frozen=True):
    """How much one index holds.

    :param blocks: per window label ("512", "global"): distinct blocks, counted once for all ranks.
    :param nbytes: memory of the tables, estimated without the kernel.
    :param kernel: whether the compiled kernel is in use.
    :param left_out: stored blocks that were left out for lack of room, since the start.
    """

    ranks: int
    scored: int
    blocks: dict[str, int]
    nbytes: int
    kernel: bool
    left_out: int


class WindowIndex:
    """The blocks of all ranks. Not thread safe: one thread, or the event loop, owns it.

    Ranks of one model, hash scheme, layout and rule are scored together, others apart. Sets on the wire,
    sets here: storing twice is storing once, removing what is not held does nothing.

    :param max_blocks: distinct blocks of all groups that are kept; what does not fit is left out and counted,
        so that ranks score less than they could, never more. None: no limit.
    :param kernel: True: the compiled kernel or ConfigError; False: pure Python; None: what there is.
    :param rules: reuse rules by name; one of its own is asked for tokens, the built-in ones need not be. One
        that raises a VswaError costs its own ranks their score of that prompt, and no other rank anything.
    """

    def __init__(
        self,
        *,
        max_blocks: int | None = None,
        kernel: bool | None = None,
        rules: Mapping[str, ReuseRule] = RULES,
    ) -> None:
        if max_blocks is not None and max_blocks < 1:
            raise ConfigError(f"expected room for at least one block in the index, got {max_blocks}")
        self._kernel: ModuleType | None = None
        if kernel is not False:
            self._kernel = require_kernel() if kernel else load_kernel()
        self._max_blocks = max_blocks
        self._rules = rules
        self._parts: dict[CacheLayout, Part] = {}
        self._of_model: dict[str, list[Part]] = {}
        self._of_rank: dict[Rank, Part] = {}
        self._left_out = 0

    @property
    def uses_kernel(self) -> bool:
        return self._kernel is not None

    @property
    def ranks(self) -> Iterable[Rank]:
        return self._of_rank.keys()

    def parts(self, model: str | None = None) -> Sequence[Part]:
        """Ranks that are scored together, each set with its layout and tables: to look at, not to change.

        :param model: only of this model; None: all.
        """
        return list(self._parts.values()) if model is None else self._of_model.get(model, ())

    def join(self, rank: Rank, layout: CacheLayout) -> None:
        """A rank that holds nothing yet. Under the layout that it has already: nothing changes.

        :raises ConfigError: an unknown rule, or a layout that the rule cannot be applied to.
        :raises PluginFailed: the rule of a plugin failed when it was called; nothing has changed.
        """
        before = self._of_rank.get(rank)
        if before is not None and before.layout == layout:
            return
        part = self._part(layout)
        scored = before is None or before.members[rank].scored
        if before is not None:
            self.drop(rank)
        self._keep(part)
        part.join(rank, scored)
        self._of_rank[rank] = part

    def apply(self, rank: Rank, event: Event) -> None:
        """Apply one event. A Layout begins from empty, whatever was there, and may be a rank's first.

        :raises StreamError: an unknown rank, cache group, tier or hash; nothing has changed.
        :raises ConfigError: a layout that cannot be used; nothing has changed.
        """
        if isinstance(event, Layout):
            self.join(rank, event.cache_layout)
            self.clear(rank)
            return
        part = self._part_of(rank)
        if isinstance(event, Cleared) and event.group_id is None:
            part.clear(rank)
        else:
            group = part.group_index.get(event.group_id)
            if group is None:
                raise self._unknown_group(part, rank, event.group_id)
            try:
                self._apply_blocks(part, rank, group, event)
            except (TypeError, OverflowError) as error:
                raise StreamError(f"rank {rank}, group {event.group_id}: a sequence hash: {error}") from error
        if part.has_dead:
            part.sweep_a_little()

    def clear(self, rank: Rank) -> None:
        """The rank holds nothing any more."""
        self._part_of(rank).clear(rank)

    def drop(self, rank: Rank) -> None:
        """Forget the rank; one that is not there is forgotten already."""
        part = self._of_rank.pop(rank, None)
        if part is None:
            return
        part.leave(rank)
        if not part.members:
            self._discard(part)

    def set_scored(self, rank: Rank, scored: bool) -> None:
        """A rank that is not scored scores 0 and keeps its blocks."""
        self._part_of(rank).set_scored(rank, scored)

    def sweep(self, budget: int) -> bool:
        """Free the blocks of ranks that are gone, looking at about ``budget`` blocks; True: none is left."""
        unfinished = [part for part in self._parts.values() if not part.sweep(budget)]
        return not unfinished

    def score(self, sequence_hashes: Hashes, prompt_len: int, model: str | None = None) -> dict[Rank, int]:
        """Cached tokens of every rank that would reuse any. Ranks whose reuse rule fails are left out.

        :param sequence_hashes: names of the prompt's prefixes in the hash blocks of the model's layout, see
            :func:`~vswa_plugin.blocks.hashing.prefix_names`; fewer are scored as far as they go.
        :param prompt_len: tokens of the prompt.
        :param model: only ranks that serve it; None: all.
        """
        parts = self.parts(model)
        if len(parts) == 1:
            return parts[0].score(sequence_hashes, prompt_len)
        scores: dict[Rank, int] = {}
        for part in parts:
            scores.update(part.score(sequence_hashes, prompt_len))
        return scores

    def score_tokens(self, token_ids: Sequence[int], model: str | None = None) -> dict[Rank, int]:
        """As :meth:`score`, from the tokens of a plain prompt; only ranks whose hash scheme is ours."""
        scores: dict[Rank, int] = {}
        hashes: dict[tuple[int, int], Hashes] = {}
        for part in self.parts(model):
            if part.layout.hash_scheme != HASH_SCHEME:
                continue
            key = part.hash_block_size, part.layout.lookahead
            if key not in hashes:
                hashes[key] = self._hashed(token_ids, *key)
            scores.update(part.score(hashes[key], len(token_ids)))
        return scores

    def tiers(self, rank: Rank, sequence_hashes: Sequence[int], cached_tokens: int) -> dict[str, int]:
        """Whole reused blocks by tier: each in the slowest of what must be loaded at its position.

        Empty where the reuse rule fails: which blocks would be loaded is then unknown.

        :param cached_tokens: as scored.
        """
        part = self._part_of(rank)
        member = part.members[rank]
        if not any(member.slow):  # a router asks for every rank and request
            return {DEVICE: cached_tokens // part.block_size}
        unit = part.hash_block_size
        boundary, prompt_len = _resumed(part.block_size, len(sequence_hashes) * unit, cached_tokens)
        try:
            needed = [
                need_of(part.rule, part.layout, group, boundary, prompt_len).all_of
                for group in part.layout.groups
            ]
        except VswaError:
            return {}
        slowest: dict[int, str] = {}
        for positions, slow in zip(needed, member.slow, strict=True):
            names = _names_at(sequence_hashes, positions, unit)
            if slow.keys().isdisjoint(names):  # at the speed of C: a router asks for long prompts too
                continue
            for position, tier in zip(positions, map(slow.get, names), strict=False):
                if tier is not None:
                    block = (position - 1) // part.block_size
                    former = slowest.setdefault(block, tier)
                    if former != tier:
                        slowest[block] = max(former, tier, key=TIERS.index)
        whole = cached_tokens // part.block_size
        counts = Counter(tier for block, tier in slowest.items() if block < whole)
        counts[DEVICE] = whole - counts.total()
        return {tier: count for tier, count in counts.items() if count}

    def explain(
        self, sequence_hashes: Sequence[int], prompt_len: int, model: str | None = None
    ) -> list[Explanation]:
        """Why each rank scores what it scores; where its reuse rule fails, its message."""
        return [
            explanation
            for part in self.parts(model)
            for explanation in explain_part(part, sequence_hashes, prompt_len)
        ]

    def blocks(self, rank: Rank) -> dict[int, dict[str, int]]:
        """Group id -> tier -> blocks that the rank holds."""
        part = self._part_of(rank)
        member = part.members[rank]
        counts = {}
        for index, group in enumerate(part.layout.groups):
            slow = Counter(member.slow[index].values())
            counts[group.group_id] = {DEVICE: member.counts[index] - slow.total(), **slow}
        return counts

    def contents(self, rank: Rank) -> dict[int, dict[int, str]]:
        """Group id -> sequence hash -> tier: all that the rank holds."""
        part = self._part_of(rank)
        return {part.layout.groups[index].group_id: held for index, held in part.contents(rank)}

    def layout(self, rank: Rank) -> CacheLayout:
        return self._part_of(rank).layout

    def check(self) -> None:
        """Look at everything; InvariantError says what must not be. For tests and ``vswa index --check``."""
        for part in self._parts.values():
            part.check()

    def dump(self) -> Any:
        """All that is held, as built-in types; :meth:`load` takes it."""
        return msgspec.to_builtins(
            IndexDump(DUMP_VERSION, tuple(self._dump_rank(rank) for rank in sorted(self._of_rank)))
        )

    @classmethod
    def load(cls, dumped: Any, **settings: Any) -> WindowIndex:
        """An index that holds what was dumped. ``settings`` as for a new one.

        :raises ConfigError: this is no dump of this version.
        """
        try:
            dump = msgspec.convert(dumped, IndexDump)
        except msgspec.ValidationError as error:
            raise ConfigError(f"expected a dump of a window index: {error}") from error
        if dump.version != DUMP_VERSION:
            raise ConfigError(f"expected a dump of version {DUMP_VERSION}, got {dump.version}")
        index = cls(**settings)
        for ranked in dump.ranks:
            rank = Rank(int(ranked.worker_id), ranked.dp_rank)
            index.join(rank, ranked.layout)
            index.set_scored(rank, ranked.scored)
            for group in ranked.groups:
                for tier, hashes in group.blocks.items():
                    index.apply(rank, Stored(group.group_id, 0, None, hashes, tier))
        return index

    def stats(self) -> IndexStats:
        blocks: Counter[str] = Counter()
        for part in self._parts.values():
            for group, count in zip(part.layout.groups, part.table.resident(), strict=True):
                blocks[group.label] += count
        members = [member for part in self._parts.values() for member in part.members.values()]
        return IndexStats(
            ranks=len(members),
            scored=sum(member.scored for member in members),
            blocks=dict(blocks),
            nbytes=sum(part.nbytes() for part in self._parts.values()),
            kernel=self.uses_kernel,
            left_out=self._left_out,
        )

    def _apply_blocks(
        self, part: Part, rank: Rank, group: int, event: Stored | Removed | Moved | Cleared
    ) -> None:
        if isinstance(event, Stored):
            room = UNLIMITED if self._max_blocks is None else self._room(self._max_blocks)
            check_tier(event.tier)
            self._left_out += part.store(rank, group, event.sequence_hashes, event.tier, room)
        elif isinstance(event, Removed):
            part.remove(rank, group, event.sequence_hashes)
        elif isinstance(event, Moved):
            check_tier(event.tier)
            part.move(rank, group, event.sequence_hashes, event.tier)
        else:
            part.clear_group(rank, group)

    def _room(self, max_blocks: int) -> int:
        return max(0, max_blocks - sum(sum(part.table.resident()) for part in self._parts.values()))

    def _hashed(self, token_ids: Sequence[int], unit: int, lookahead: int) -> Hashes:
        if self._kernel is None:
            hashes: Hashes = sequence_hashes(block_hashes(token_ids, unit))
        else:
            hashes = array("Q", self._kernel.sequence_hashes(token_ids, unit))
        return with_lookahead(hashes, token_ids, unit, lookahead)

    def _part(self, layout: CacheLayout) -> Part:
        part = self._parts.get(layout)
        if part is None:
            rule = rule_named(layout.rule, self._rules)
            # Refuses a layout that it cannot be applied to, before the first prompt comes.
            check_applicable(rule, layout)
            rule.needs(layout, layout.block_size)
            trial = boundaries_for(rule, layout, layout.block_size + 1, layout.block_size)
            for group in layout.groups:
                trial.need(group, trial.count)
            part = Part(layout, rule, self._kernel)
        return part

    def _keep(self, part: Part) -> None:
        if part.layout not in self._parts:
            self._parts[part.layout] = part
            self._of_model.setdefault(part.layout.model, []).append(part)

    def _discard(self, part: Part) -> None:
        del self._parts[part.layout]
        of_model = self._of_model[part.layout.model]
        of_model.remove(part)
        if not of_model:
            del self._of_model[part.layout.model]

    def _part_of(self, rank: Rank) -> Part:
        part = self._of_rank.get(rank)
        if part is None:
            raise StreamError(f"rank {rank} is not in the index; its layout must come first")
        return part

    @staticmethod
    def _unknown_group(part: Part, rank: Rank, group_id: int | None) -> StreamError:
        declared = ", ".join(f"{g.group_id} (window {g.label})" for g in part.layout.groups)
        return StreamError(f"unknown cache group {group_id} of rank {rank}; its layout declared {declared}")

    def _dump_rank(self, rank: Rank) -> RankDump:
        part = self._of_rank[rank]
        groups = []
        for index, held in part.contents(rank):
            tiers: dict[str, list[int]] = {}
            for sequence_hash, tier in sorted(held.items()):
                tiers.setdefault(tier, []).append(sequence_hash)
            blocks = {tier: tuple(hashes) for tier, hashes in tiers.items()}
            groups.append(GroupDump(part.layout.groups[index].group_id, blocks))
        return RankDump(
            id_text(rank.worker_id),
            rank.dp_rank,
            part.members[rank].scored,
            part.layout,
            tuple(groups),
        )


def _names_at(names: Sequence[int], positions: range, unit: int) -> Sequence[int]:
    """The names of the prefixes that end at ``positions``, as far as there are any."""
    if not positions:
        return ()
    return names[positions[0] // unit - 1 : positions[-1] // unit : max(1, positions.step // unit)]


def _resumed(block_size: int, length: int, cached_tokens: int) -> tuple[int, int]:
    """The boundary and a prompt length that give so many cached tokens.

    One token short of an edge is the end of a prompt that is a whole number of blocks.
    """
    if block_size > 1 and cached_tokens % block_size == block_size - 1:
        return min(length // block_size, cached_tokens // block_size + 1), cached_tokens + 1
    boundary = min(length // block_size, cached_tokens // block_size)
    return boundary, max(cached_tokens, length) + 1
