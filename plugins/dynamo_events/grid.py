"""Where the projection looks at a rank's prefixes, and what its groups must hold there. Pure.

Dynamo's tree has blocks of one size, that of the layout. The blocks of each group may be smaller, and a
boundary may need only the last of them. So the projection has a block for each position, within a block of
Dynamo's, at which a block ends that some boundary needs. The last of them is the *edge* of Dynamo's block,
and only edges are boundaries and are published. Positions are counted in hash units.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from vswa_plugin.blocks import FULL, HASH_SCHEME, CacheGroup, CacheLayout, ReuseRule, rule_named
from vswa_plugin.errors import ConfigError

from .tree import KNOWN

#: ``global``: what routers without windows do, the global group alone; ``boundary``: all groups.
MODES = ("global", "boundary")

#: Per bit of ``Block.held``: how many held blocks in a row end there, as far as it matters.
State: TypeAlias = tuple[int, ...]

#: Long enough for the needs of a prompt to be those of any longer one.
_LONG_PROMPT_BLOCKS = 1 << 20
#: Steps remembered; there are a few hundred with two groups.
_MAX_STEPS = 100_000


@dataclass(frozen=True, slots=True)
class GroupNeed:
    """What a boundary needs of one group.

    :param every: units of a block.
    :param trailing: blocks before the boundary; None: all from the root on.
    :param chunk: units, in place of ``trailing``: all blocks since the last multiple of it; 0: no chunks.
    """

    every: int
    trailing: int | None
    chunk: int = 0

    @property
    def longest(self) -> int | None:
        """How long a run of held blocks can matter; None: it is there or not."""
        return None if self.chunk else self.trailing


class _Act(Enum):
    """What the end of a block does to the run of one group."""

    KEEP = 0  #: no block of the group ends here
    ALL = 1  #: one that is missing ends the run for all that is below
    RUN = 2  #: one block more, or none
    CHUNK = 3  #: a chunk begins behind it, which needs nothing of what is before


class Grid:
    """Positions, and how the state of a block follows from that of the one before.

    :param unit: tokens.
    :param size: units of a block of Dynamo's.
    :param needs: by group id; empty: nothing is ever a boundary.
    :param plain: whether every announced block is one unit, and one of Dynamo's.
    """

    def __init__(self, unit: int, size: int, needs: Mapping[int, GroupNeed], *, plain: bool = False) -> None:
        self.unit = unit
        self.plain = plain
        self.bits = {group_id: KNOWN << 1 + n for n, group_id in enumerate(needs)}
        self.strides = {group_id: need.every for group_id, need in needs.items()}
        self.size = size
        self._groups = tuple(needs.values()) or (GroupNeed(size, None),)
        self._ends = _ends(self._groups, size)
        # The first number of a state says whether all tokens are known, from the root on.
        self._longest = (None, *(need.longest for need in self._groups))
        self._acts, self._kinds = self._acts_by_position()
        self._period = len(self._kinds)
        #: From each position within a block of Dynamo's to the next at which a block ends.
        self._to_child = [next(e for e in self._ends if e > within) - within for within in range(size)]
        self._steps: dict[tuple[State, int, int], State] = {}
        self.nothing: State = (0,) * len(self._longest)
        #: Also what a root block's parent would have: before the root, nothing is missing.
        self.all: State = tuple(1 if longest is None else longest for longest in self._longest)
        self._all_bits = (1 << len(self._longest)) - 1

    @property
    def shape(self) -> tuple[bool, int, int, tuple[int, ...]]:
        """Grids of one shape have the same positions."""
        return self.plain, self.unit, self.size, self._ends

    @property
    def steps(self) -> int:
        """Blocks of the projection in one of Dynamo's."""
        return len(self._ends)

    def above_first(self, position: int) -> State:
        """The state above a block that hangs below no other: there is none, or it is not known."""
        return self.all if position < self._ends[0] else self.nothing

    def has(self, position: int) -> bool:
        """Whether a block of the projection ends with the unit of that index."""
        return position % self.size + 1 in self._ends

    def is_edge(self, position: int) -> bool:
        """Whether a block of Dynamo's ends there."""
        return (position + 1) % self.size == 0

    def step(self, before: State, held: int, position: int) -> State:
        """State of a block that holds ``held`` below one of state ``before``."""
        key = (before, held, self._kinds[position % self._period])
        state = self._steps.get(key)
        return self._new_step(key) if state is None else state

    def _new_step(self, key: tuple[State, int, int]) -> State:
        if len(self._steps) >= _MAX_STEPS:
            self._steps.clear()
        before, held, kind = key
        acts = zip(self._acts[kind], before, self._longest, strict=True)
        state = self._steps[key] = tuple(
            _run(act, run, longest, bool(held >> bit & 1)) for bit, (act, run, longest) in enumerate(acts)
        )
        return state

    def matters_below(self, one: State, other: State, position: int) -> bool:
        """Whether the children of a block differ by which of two states it has.

        One that holds everything shows every difference: where it shows none, no child differs.
        """
        child = position + self._to_child[(position + 1) % self.size]
        return self.step(one, self._all_bits, child) != self.step(other, self._all_bits, child)

    def _acts_by_position(self) -> tuple[list[tuple[_Act, ...]], list[int]]:
        """What can happen, and which of it at each position, up to where all repeats."""
        period = math.lcm(self.size, *(need.chunk for need in self._groups if need.chunk))
        numbers: dict[tuple[_Act, ...], int] = {}
        kinds = []
        for end in range(1, period + 1):
            acts = (_Act.ALL, *(self._act(need, end) for need in self._groups))
            kinds.append(numbers.setdefault(acts, len(numbers)))
        return list(numbers), kinds

    def _act(self, need: GroupNeed, end: int) -> _Act:
        if end % need.every:
            return _Act.KEEP
        if need.chunk:
            return _Act.ALL if end % need.chunk else _Act.CHUNK
        # The run may have begun behind blocks that are not looked at: as many as a boundary needs are.
        return _Act.ALL if need.trailing is None else _Act.RUN


def _run(act: _Act, run: int, longest: int | None, held: bool) -> int:
    """The run of a group behind a block."""
    if act is _Act.KEEP:
        return run
    if act is _Act.CHUNK:
        return 1
    if not held:
        return 0
    if longest is None:
        return run
    return min(longest, run + 1)


def _ends(needs: Iterable[GroupNeed], size: int) -> tuple[int, ...]:
    """Positions within a block of Dynamo's at which blocks end that boundaries need, counted from 1."""
    ends = {size}
    for need in needs:
        blocks = size // need.every
        if need.longest is not None:
            blocks = min(blocks, need.longest)
        ends.update(range(size, size - blocks * need.every, -need.every))
    return tuple(sorted(ends))


#: Of a layout that is not understood yet.
NOTHING = Grid(1, 1, {}, plain=True)


def grid_of(mode: str, layout: CacheLayout, rules: Mapping[str, ReuseRule]) -> Grid:
    """The grid of a layout, whose groups count as far as the mode says.

    :raises ConfigError: the layout or its rule cannot be projected onto Dynamo's tree.
    """
    layout.check()
    unit, size = layout.hash_block_size, layout.block_size // layout.hash_block_size
    _check_names(layout)
    if mode == "global":
        needs = {
            group: GroupNeed(group.block_size // unit, None) for group in layout.groups if group.kind == FULL
        }
        if not needs:
            raise ConfigError("projection 'global': the layout has no global group; use 'boundary'")
    else:
        needs = _needs_by_rule(layout, rule_named(layout.rule, rules))
    of_groups = {group.group_id: need for group, need in needs.items()}
    return Grid(unit, size, of_groups, plain=layout.plain)


def _check_names(layout: CacheLayout) -> None:
    odd = [] if layout.naming.by_blocks or layout.hash_scheme == HASH_SCHEME else [layout.hash_scheme]
    if layout.lookahead:
        odd.append(f"names that cover {layout.lookahead} tokens more")
    if layout.resumption is not None and layout.resumption.partial:
        odd.append("prefixes that end inside blocks")
    if odd:
        raise ConfigError(
            f"expected prefixes that are named by their own tokens ({HASH_SCHEME}) and end where blocks do, "
            f"for a projection onto Dynamo's tree, got {', '.join(odd)}; use the exact router"
        )


def _needs_by_rule(layout: CacheLayout, rule: ReuseRule) -> dict[CacheGroup, GroupNeed]:
    unit = layout.hash_block_size
    needs = rule.needs(layout, _LONG_PROMPT_BLOCKS * layout.block_size)
    none: tuple[None, ...] = (None,) * len(layout.groups)
    if needs is not None and not any(needs.after):
        chunks = needs.chunks or none
        sure = [need != 0 for need, chunk in zip(needs.trailing, chunks, strict=True) if chunk is None]
        if any(sure):  # else nothing shows, at some boundaries, that the engine knows the prefix
            return {
                group: GroupNeed(
                    group.block_size // unit, need, 0 if chunk is None else chunk * group.block_size // unit
                )
                for group, need, chunk in zip(layout.groups, needs.trailing, chunks, strict=True)
            }
    raise ConfigError(
        f"reuse rule {layout.rule!r} cannot be projected onto Dynamo's tree: expected a fixed number of "
        "blocks before a boundary, got one that depends on it, or blocks behind it; use the exact router, or "
        "'global'"
    )
