"""What vLLM finds, keeps and lets go in a cache group, by the kind of its layers. Reads the pool, no I/O.

Groups that are alike in everything are looked up together: a *family*. Blocks are counted within the group,
prefixes in tokens. In the table of a sequence None stands for a block that is not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vswa_plugin.blocks import CHUNKED, FULL, RECURRENT, SLIDING, CacheGroup
from vswa_plugin.errors import ConfigError

from .pool import Block, Pool


class Hit(NamedTuple):
    """What a family has of a prompt.

    :ivar length: tokens of the prefix.
    :ivar tables: per group of the family: its blocks from the start of the prompt on.
    """

    length: int
    tables: list[list[Block | None]]


class Keeping(NamedTuple):
    """Which blocks of a sequence may be entered for lookups.

    :ivar retention: None: those before every multiple of the alignment; 0: only those before ``edges``; N:
        besides those before every multiple of N tokens.
    :ivar edges: prefixes at which a later prompt is likely to be resumed.
    """

    retention: int | None
    edges: tuple[int, ...]


class Family:
    """Groups of one kind, window and block size; here: layers that read and keep everything.

    :param unit: tokens between two names.
    :param alignment: every hit is a multiple of it.
    """

    def __init__(self, groups: Sequence[CacheGroup], unit: int, alignment: int) -> None:
        self.group_ids = [group.group_id for group in groups]
        self.size = groups[0].block_size
        self.unit = unit
        self.alignment = alignment
        #: A lookup gives its last block up, which must be found nevertheless.
        self.drops = any(group.drops_last for group in groups)

    def name(self, names: Sequence[int], block: int) -> int:
        """The name of a whole block."""
        return names[(block + 1) * self.size // self.unit - 1]

    def find(self, pool: Pool, names: Sequence[int], limit: int, drop: bool) -> Hit:
        """The longest prefix of at most ``limit`` tokens that a prompt with these ``names`` can use."""
        tables: list[list[Block | None]] = [[] for _ in self.group_ids]
        length = 0
        for block in range(limit // self.size):
            if not self._extend(tables, pool, self.name(names, block)):
                break
            length += self.size
        if drop and length:
            length -= self.size
        length -= length % self.alignment
        for table in tables:
            del table[length // self.size :]
        return Hit(length, tables)

    def _extend(self, tables: list[list[Block | None]], pool: Pool, name: int) -> bool:
        blocks = pool.find(self.group_ids, name)
        for table, block in zip(tables, blocks or (), strict=False):
            table.append(block)
        return blocks is not None

    def keeps(self, block: int, keeping: Keeping) -> bool:
        """Whether a computed block is entered for lookups."""
        return True

    def stale(self, computed: int) -> int:
        """Leading tokens that no token after the first ``computed`` ones can see."""
        return 0

    def most(self, tokens: int, step: int, drafts: int) -> int:
        """Blocks that a sequence of ``tokens`` never exceeds, where a step computes at most ``step``."""
        return -(-(tokens + 2 * drafts) // self.size)


class Sliding(Family):
    """Layers that see the last tokens of a window."""

    def __init__(self, groups: Sequence[CacheGroup], unit: int, alignment: int) -> None:
        super().__init__(groups, unit, alignment)
        assert groups[0].window_size is not None
        self._window = groups[0].window_size

    def _needed(self, drop: bool) -> int:
        """Consecutive blocks that a hit ends with."""
        return max(1, -(-(self._window - 1) // self.size) + drop)

    def find(self, pool: Pool, names: Sequence[int], limit: int, drop: bool) -> Hit:
        end = limit // self.size
        while end > 0:
            if (end - drop) * self.size % self.alignment:
                end -= 1
                continue
            run = self._run(pool, names, end, self._needed(drop))
            if len(run) == self._needed(drop):
                return self._hit(run, end, end - drop)
            if len(run) == end:  # all from the start of the prompt
                return self._hit(run, end, self._short(end, drop))
            end -= len(run) + 1
        return self._hit([], 0, 0)

    def _run(self, pool: Pool, names: Sequence[int], end: int, most: int) -> list[tuple[Block, ...]]:
        """Blocks that are found before ``end`` without a hole, the last one first."""
        run: list[tuple[Block, ...]] = []
        for block in range(end - 1, max(0, end - most) - 1, -1):
            blocks = pool.find(self.group_ids, self.name(names, block))
            if blocks is None:
                break
            run.append(blocks)
        return run

    def _short(self, end: int, drop: bool) -> int:
        """Blocks that are used of a prefix shorter than the window."""
        end = self._aligned(end)
        return self._aligned(end - 1) if drop and end else end

    def _aligned(self, blocks: int) -> int:
        while blocks * self.size % self.alignment:
            blocks -= 1
        return blocks

    def _hit(self, run: list[tuple[Block, ...]], end: int, used: int) -> Hit:
        """:param end: of the run; :param used: blocks of the prompt that are used."""
        missing: list[Block | None] = [None] * (end - len(run))
        tables = [
            [*missing, *(blocks[i] for blocks in reversed(run))][:used] for i in range(len(self.group_ids))
        ]
        return Hit(used * self.size, tables)

    def keeps(self, block: int, keeping: Keeping) -> bool:
        needed, shift = -(-(self._window - 1) // self.size) + self.drops, int(self.drops)
        if keeping.retention != 0:
            segment = (keeping.retention or self.alignment) // self.size
            following = max(1, -(-(block + 1 - shift) // segment)) * segment + shift
            if needed >= segment or block >= following - needed:
                return True
        if keeping.retention is None:
            return False
        ends = (edge // self.alignment * self.alignment // self.size + shift for edge in keeping.edges)
        return any(end - needed <= block < end for end in ends)

    def stale(self, computed: int) -> int:
        return computed - self._window + 1

    def most(self, tokens: int, step: int, drafts: int) -> int:
        seen = self._window - 1 + step + 2 * drafts
        return min(super().most(tokens, step, drafts), -(-seen // self.size) + 1)


class Chunked(Family):
    """Layers that see nothing before the start of their chunk."""

    def __init__(self, groups: Sequence[CacheGroup], unit: int, alignment: int) -> None:
        super().__init__(groups, unit, alignment)
        assert groups[0].chunk_size is not None
        self._chunk = groups[0].chunk_size
        if self.drops or alignment != self.size:
            raise ConfigError(
                f"chunked attention: expected blocks of {alignment} tokens, the alignment, and no group that "
                f"drops its last block, got blocks of {self.size}, drops_last {self.drops}"
            )

    def find(self, pool: Pool, names: Sequence[int], limit: int, drop: bool) -> Hit:
        start = limit // self._chunk * self._chunk // self.size
        tables: list[list[Block | None]] = [[None] * start for _ in self.group_ids]
        for block in range(start, limit // self.size):
            if not self._extend(tables, pool, self.name(names, block)):
                break
        return Hit(len(tables[0]) * self.size, tables)

    def stale(self, computed: int) -> int:
        return computed // self._chunk * self._chunk

    def most(self, tokens: int, step: int, drafts: int) -> int:
        seen = self._chunk + step + 2 * drafts
        return min(super().most(tokens, step, drafts), -(-seen // self.size) + 1)


class Recurrent(Family):
    """Layers that carry a state along; a block holds the state at its end."""

    def find(self, pool: Pool, names: Sequence[int], limit: int, drop: bool) -> Hit:
        for end in range(limit // self.alignment * self.alignment, 0, -self.alignment):
            blocks = pool.find(self.group_ids, names[end // self.unit - 1])
            if blocks is not None:
                before: list[Block | None] = [None] * (end // self.size - 1)
                return Hit(end, [[*before, block] for block in blocks])
        return Hit(0, [[] for _ in self.group_ids])

    def keeps(self, block: int, keeping: Keeping) -> bool:
        if keeping.retention is None or 0 < keeping.retention <= self.size:
            return True
        end = (block + 1) * self.size
        if keeping.retention and end % keeping.retention == 0:
            return True
        return any(
            edge // self.alignment * self.alignment // self.size == block + 1 for edge in keeping.edges
        )

    def stale(self, computed: int) -> int:
        return computed - 1

    def most(self, tokens: int, step: int, drafts: int) -> int:
        return 2 + drafts  # the state before a step and the one after it


_FAMILIES = {FULL: Family, SLIDING: Sliding, CHUNKED: Chunked, RECURRENT: Recurrent}


def families_of(groups: Sequence[CacheGroup], unit: int, alignment: int) -> list[Family]:
    """The families of a layout in the order in which they are looked up, those that read everything first.

    :raises ConfigError: a group of a kind that this version does not know.
    """
    alike: dict[tuple[object, ...], list[CacheGroup]] = {}
    for group in groups:
        if group.kind not in _FAMILIES:
            known = ", ".join(_FAMILIES)
            raise ConfigError(f"cache group {group.group_id}: expected a kind of {known}, got {group.kind!r}")
        key = (group.kind, group.block_size, group.window_size, group.chunk_size)
        alike.setdefault(key, []).append(group)
    families = [_FAMILIES[each[0].kind](each, unit, alignment) for each in alike.values()]
    return sorted(families, key=lambda family: type(family) is not Family)
