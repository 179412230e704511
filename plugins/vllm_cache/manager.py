"""vLLM's KV cache manager for hybrid models, without a model: what a rank reuses, stores and evicts. Pure.

Sequences are computed step by step as vLLM's scheduler does it for one request at a time: a prompt in chunks,
which end where states must be kept, then a token a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from vswa_plugin.blocks import CHUNKED, FULL, RECURRENT, SLIDING, CacheGroup, CacheLayout
from vswa_plugin.errors import ConfigError, InvariantError

from .families import Family, Keeping, Recurrent, families_of
from .names import Names, names_of
from .pool import Block, Event, Pool
from .tables import StateTable, Table, Written, last_state

#: What ``kv_cache_spec_kind`` of an event says.
_SPEC_KINDS = {
    FULL: "full_attention",
    SLIDING: "sliding_window",
    CHUNKED: "chunked_local_attention",
    RECURRENT: "mamba",
}


class Options(msgspec.Struct, frozen=True):
    """What an engine is started with.

    :param chunk_tokens: prompt tokens that one step computes.
    :param drafts: tokens that are drafted in each step (EAGLE, MTP). Here all of them are wrong.
    :param retention: blocks of sliding and recurrent groups that are kept: None: those before every multiple
        of the alignment; 0: those at the end of the prompt and where prompts were seen to part; N: besides
        those before every multiple of N tokens. vLLM's ``prefix_cache_retention_interval``.
    :param spec_kinds: group id -> what events call its kind, where that is not the usual word.
    :param events: False: no events are kept.
    """

    chunk_tokens: int = 8192
    drafts: int = 0
    retention: int | None = 0
    spec_kinds: dict[int, str] = {}
    events: bool = True


class Match(NamedTuple):
    """What a prompt finds.

    :ivar length: tokens that are reused.
    :ivar junction: where other prompts part from this one, of which some group holds no state yet; 0: none.
    :ivar tables: group id -> blocks from the start of the prompt on.
    """

    length: int
    junction: int
    tables: dict[int, list[Block | None]]


class CacheManager:
    """Blocks of all cache groups of one rank.

    :param blocks: of the one pool that all groups take from.
    :raises ConfigError: vLLM has no such layout.
    """

    def __init__(self, layout: CacheLayout, blocks: int, options: Options | None = None) -> None:
        self.layout = layout.check()
        self.options = options or Options()
        if blocks < 1:
            raise ConfigError(f"expected a pool of at least one block, got {blocks}")
        if layout.resumption is not None and layout.resumption.partial:
            raise ConfigError(
                "the vLLM cache is not simulated where prefixes end inside blocks: expected a layout without "
                "`partial`, which vLLM has unless --prefix-match-unit is given"
            )
        self._unit = layout.hash_block_size
        self._alignment = layout.block_size
        self._families = families_of(layout.groups, self._unit, self._alignment)
        self._family_of = {gid: family for family in self._families for gid in family.group_ids}
        self._drops = any(family.drops for family in self._families)
        described = {group.group_id: self._description(group) for group in layout.groups}
        self.pool = Pool(blocks, described, self.options.events)
        self._reserved = 0

    def _description(self, group: CacheGroup) -> Event:
        kind = self.options.spec_kinds.get(group.group_id, _SPEC_KINDS[group.kind])
        described: Event = {"kv_cache_spec_kind": kind}
        if group.kind == SLIDING:
            described["kv_cache_spec_sliding_window"] = group.window_size
        return described

    def most(self, tokens: int) -> int:
        """Blocks that a sequence of so many tokens never exceeds."""
        step = self.options.chunk_tokens
        families = [self._family_of[group.group_id] for group in self.layout.groups]
        return sum(family.most(tokens, step, self.options.drafts) for family in families)

    def match(self, prompt: Sequence[int]) -> Match:
        """What a prompt would reuse now; changes nothing."""
        names = self.names_of(prompt).published
        limit = min(len(prompt) - 1, len(names) * self._unit)
        tables: dict[int, list[Block | None]] = {}
        if len(self.layout.groups) == 1:
            (family,) = self._families
            hit = family.find(self.pool, names, limit, family.drops)
            return Match(hit.length, 0, dict(zip(family.group_ids, hit.tables, strict=True)))
        length, longest = self._agree(names, limit, tables)
        for family in self._families:
            if type(family) is Family:
                for gid in family.group_ids:
                    tables[gid] = tables[gid][: length // family.size]
        where = self.layout.resumption
        if where is not None and length <= where.least_tokens:
            length, tables = 0, {gid: [] for gid in tables}
        return Match(length, longest if longest > length else 0, tables)

    def _agree(
        self, names: Sequence[int], limit: int, tables: dict[int, list[Block | None]]
    ) -> tuple[int, int]:
        """The prefix that all families can use, and the longest one that a single one offered.

        Each family shortens what the one before it left, until none does.
        """
        length, longest = limit, 0
        pair = len(self._families) == 2 and type(self._families[0]) is Family
        whole: dict[int, int] = {}  # what families that read everything have: looked up once
        dropped: set[int] = set()  # families whose last block was given up at this length
        while True:
            before = length
            for number, family in enumerate(self._families):
                if number in whole:
                    length = min(length, whole[number])
                    continue
                drop = family.drops and number not in dropped
                reach = length
                if drop and not isinstance(family, Recurrent):
                    reach = min(length + family.size, len(names) * self._unit)
                hit = family.find(self.pool, names, reach, drop)
                if drop:
                    dropped.add(number)
                elif hit.length < length:
                    dropped.clear()
                length, longest = hit.length, max(longest, hit.length)
                tables.update(zip(family.group_ids, hit.tables, strict=True))
                if type(family) is Family:
                    whole[number] = length
            if length >= before or pair:
                return length, longest

    def open(self, prompt: Sequence[int], output_len: int) -> CacheSequence | None:
        """Match a prompt and hold what it reuses; None while others hold the room that it needs.

        vLLM admits by the prompt, and preempts a request that finds no room later. Here a request waits until
        all that it can need is there.
        """
        needed = self.most(len(prompt) + output_len)
        if self._reserved + needed > self.pool.blocks:
            return None
        self._reserved += needed
        return CacheSequence(self, prompt, self.match(prompt), needed)

    def give_back(self, reserved: int) -> None:
        """A request has ended for which so many blocks were reserved."""
        self._reserved -= reserved

    # -- how its sequences are computed ------------------------------------------------------------------

    def names_of(self, prompt: Sequence[int]) -> Names:
        """Names of a prompt's prefixes; whoever extends them takes a copy."""
        return names_of(tuple(prompt), self._unit, self.layout.lookahead)

    def family(self, group: CacheGroup) -> Family:
        """The family of a group."""
        return self._family_of[group.group_id]

    def new_table(self, group: CacheGroup, match: Match) -> Table:
        """The blocks of a new sequence in one group; it holds what was matched."""
        family = self.family(group)
        if isinstance(family, Recurrent):
            table: Table = StateTable(family, group.group_id, self.pool, self.options.drafts)
        else:
            table = Table(family, group.group_id, self.pool)
        table.adopt(match.tables[group.group_id], match.length)
        return table

    def replayed_at(self, prompt_len: int) -> tuple[int, ...]:
        """Where prompts that begin with this one can be resumed, rounded down or not."""
        if not self._drops:
            return (prompt_len - 1,)
        size = math.lcm(*(group.block_size for group in self.layout.groups))
        ends = {(prompt_len - 1) // size * size, prompt_len // size * size}
        return tuple(sorted({max(0, end - size) for end in ends}))

    def enterable(self, computed: int, group: CacheGroup) -> int:
        """Of so many computed tokens, those whose blocks a lookup could ever use."""
        if len(self.layout.groups) == 1:
            return computed
        aligned = computed - computed % self._alignment
        family = self.family(group)
        if family.drops and aligned:
            return min(computed, aligned + family.size)
        return aligned

    def chunk_end(self, start: int, end: int, prompt_len: int, junction: int) -> int:
        """Where a chunk of a prompt ends that may go on to ``end``: where a state must be kept, if any."""
        size = max((f.size for f in self._families if isinstance(f, Recurrent)), default=None)
        if size is None:
            return end
        if end < prompt_len and end // size * size > start:
            end = end // size * size
        last = last_state(prompt_len, size, self._drops, self.layout.lookahead)
        stops = [last, start + (junction - start) // size * size if start < junction < end else 0]
        if start % size:
            stops.append((start // size + 1) * size)
        return min((stop for stop in stops if start < stop < end), default=end)


class CacheSequence:
    """One request that was admitted. The contract is ``vswa_plugin.engine.RankSequence``.

    :param reserved: blocks that no other request may need.
    """

    def __init__(self, manager: CacheManager, prompt: Sequence[int], match: Match, reserved: int) -> None:
        self.cached_tokens = match.length
        self._manager = manager
        self._reserved = reserved
        self._junction = match.junction
        self._computed = match.length
        self._names = manager.names_of(prompt).copy()
        self._written = Written(list(prompt), len(prompt), self._names.published, manager.layout.lookahead)
        self._tables = [manager.new_table(group, match) for group in manager.layout.groups]
        self._keeping = [self._keeping_of(group) for group in manager.layout.groups]

    def compute_prompt(self) -> None:
        prompt_len = self._written.prompt_len
        while self._computed < prompt_len:
            end = min(prompt_len, self._computed + self._manager.options.chunk_tokens)
            end = self._manager.chunk_end(self._computed, end, prompt_len, self._junction)
            self._step(end, self._manager.options.drafts)

    def finish(self, output: Sequence[int]) -> None:
        if self._computed < self._written.prompt_len:
            raise InvariantError("a request ended whose prompt was not computed")
        for position, token in enumerate(output):
            if position:
                # What was drafted is computed, and what will be drafted has its place.
                self._step(self._computed + 1, 2 * self._manager.options.drafts)
            self._written.tokens.append(token)
            self._names.extend(self._written.tokens)
            if self._manager.options.drafts:  # it is known only now which of them were right
                self._enter(self._computed)
        for table in self._tables:
            table.end()
        self._manager.give_back(self._reserved)

    def _step(self, upto: int, spare: int) -> None:
        """Compute up to there. Lookups find blocks from the moment at which their step is planned.

        :param spare: tokens behind those that have their places in blocks too.
        """
        for table in self._tables:
            table.let_go(self._computed)
        for table in self._tables:
            table.grow(upto, spare)
        self._enter(upto)
        self._computed = upto

    def _enter(self, upto: int) -> None:
        for table, group, keeping in zip(
            self._tables, self._manager.layout.groups, self._keeping, strict=True
        ):
            table.enter(self._written, self._manager.enterable(upto, group), keeping)

    def _keeping_of(self, group: CacheGroup) -> Keeping:
        edges = self._manager.replayed_at(self._written.prompt_len)
        if self._junction:
            edges += (self._junction,)
            if self._manager.family(group).drops:
                edges += (self._junction - group.block_size,)
        return Keeping(self._manager.options.retention, edges)
