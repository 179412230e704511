"""One rank's blocks of all windows, projected onto the one prefix-closed tree of Dynamo's router. Pure.

A block is published exactly if the engine could resume at it or somewhere below it. A prompt that runs
through the deepest such boundary before it leaves the tree is then scored exactly; one that leaves the path
above it is promised too much, as there is no more to be said in one tree.

Changes are gathered until :meth:`Projection.changes` is called, once per batch of events, and cost what
they change: a block's state follows from its parent's, so only paths whose state changes are walked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vswa_plugin.blocks import RULES, CacheLayout, ReuseRule
from vswa_plugin.engine import BlocksStored, Node
from vswa_plugin.errors import ConfigError, InvariantError, unknown_choice
from vswa_plugin.wire import Cleared, Event, Layout, Removed, Stored, Unknown

from .grid import MODES, NOTHING, grid_of
from .pieces import Pieces, UnitHasher, plain_hashes
from .tree import KNOWN, Block, Tree, packed, unpacked


@dataclass(slots=True)
class Run:
    """Consecutive blocks to be stored; the one before them is published, or there is none.

    :param blocks: the edges of Dynamo's blocks.
    :param steps: blocks of the projection in one of Dynamo's.
    """

    blocks: list[Block]
    steps: int = 1

    @property
    def parent(self) -> Block | None:
        return self.blocks[0].above(self.steps)

    def token_ids(self) -> list[int]:
        """Of all its blocks, which are known."""
        return unpacked(step for block in self.blocks for step in block.path(self.steps))


@dataclass(slots=True)
class Changes:
    """What Dynamo has to be told: removals first, children before parents; then runs, parents first."""

    removed: list[Block] = field(default_factory=list)
    stored: list[Run] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.removed or self.stored)


class Projection:
    """What of one rank is to be published, and what is.

    :param mode: one of :data:`MODES`.
    :param rules: reuse rules by name.
    :param spare: see :class:`Tree`.
    :param hasher: names blocks of several hash units.
    :raises ConfigError: the rule of ``layout`` cannot be projected.
    """

    def __init__(
        self,
        mode: str,
        layout: CacheLayout,
        rules: Mapping[str, ReuseRule] = RULES,
        spare: int = 1024,
        hasher: UnitHasher = plain_hashes,
    ) -> None:
        if mode not in MODES:
            raise ConfigError(unknown_choice("projection", mode, MODES))
        self.published = 0
        self._mode = mode
        self._rules = rules
        self._tree = Tree(spare)
        self._pieces = Pieces(max(0, spare), hasher)
        # As ordered sets: equal events give equal changes.
        self._changed: dict[Block, None] = {}
        self._unsettled: dict[Block, None] = {}
        self._grid = NOTHING
        self._begin(layout)

    @property
    def blocks(self) -> int:
        """How many blocks are remembered, resident or not."""
        return len(self._tree.blocks)

    def learn(self, stored: BlocksStored, nodes: Sequence[Node]) -> None:
        """Take the tokens of blocks that the engine has announced.

        :param nodes: names of the leading blocks of ``stored``.
        """
        tree, grid = self._tree, self._grid
        if not grid.plain:
            for block in self._pieces.cut(tree, grid, stored, nodes):
                self._known(block)
                if not block.resident:
                    tree.now_idle(block)
            return
        space = (stored.cache_salt, stored.lora_name)
        for node, announced in zip(nodes, stored.blocks, strict=False):
            former = tree.blocks.get(node.sequence_hash)
            if (former is None or former.tokens is None) and len(announced.token_ids) == grid.unit:
                above = tree.named(node.parent_hash, node.position - 1, grid.nothing)
                block = tree.add(node.sequence_hash, node.position, above, grid.nothing)
                block.tokens = packed(announced.token_ids)
                block.space = space if any(space) else None
                self._known(block)

    def apply(self, event: Event | Unknown) -> None:
        """Take one event of the rank's stream; a layout begins a new epoch.

        :raises ConfigError: the rule of a new layout cannot be projected; nothing is to be published then.
        """
        match event:
            case Stored():
                self._stored(event)
            case Removed(group_id=group_id):
                bit = self._grid.bits.get(group_id, 0)
                for sequence_hash in event.sequence_hashes:
                    block = self._tree.blocks.get(sequence_hash)
                    if block is not None and block.held & bit:
                        self._drop(block, bit)
            case Cleared(group_id=group_id):
                of_groups = self._grid.bits
                bits = sum(of_groups.values()) if group_id is None else of_groups.get(group_id, 0)
                for block in self._tree.blocks.values():
                    if block.held & bits:
                        self._drop(block, bits)
            case Layout():
                self._begin(event.cache_layout)

    def changes(self) -> Changes:
        """What differs from what is published. To be told in this order, then :meth:`commit`."""
        self._settle()
        removed: list[Block] = []
        stored: list[Block] = []
        for block in self._changed:
            if block.published != block.wanted:
                (removed if block.published else stored).append(block)
        removed.sort(key=_position, reverse=True)
        stored.sort(key=_position)
        self._tree.trim()
        self._pieces.trim(self._tree)
        return Changes(removed, _runs(stored, self._grid.steps))

    def commit(self, changes: Changes) -> None:
        """``changes`` have been told; may be a part of what :meth:`changes` said, in its order."""
        for block in changes.removed:
            block.published = False
            if not block.resident and block.sequence_hash in self._tree.blocks:
                self._tree.now_idle(block)
        for run in changes.stored:
            for block in run.blocks:
                block.published = True
        self.published += sum(len(run.blocks) for run in changes.stored) - len(changes.removed)
        self._changed = {block: None for block in self._changed if block.published != block.wanted}

    def refuse(self, run: Run) -> None:
        """Do not offer ``run``, or what hangs below it, until the engine announces its blocks again."""
        for block in run.blocks:
            block.tokens = None
            block.held &= ~KNOWN
            self._unsettled[block] = None

    def published_hashes(self) -> set[int]:
        """Sequence hashes of what is published. Walks all blocks: for tests."""
        return {block.sequence_hash for block in self._tree.blocks.values() if block.published}

    def _known(self, block: Block) -> None:
        block.held |= KNOWN
        self._unsettled[block] = None

    # -- one epoch ---------------------------------------------------------------------------------

    def _begin(self, layout: CacheLayout) -> None:
        """Nothing is resident, and this is the layout."""
        former, self._grid = self._grid, NOTHING  # what stays where it is refused
        self._tree.clear()
        self._changed.update((block, None) for block in self._tree.blocks.values() if block.published)
        try:
            self._grid = grid_of(self._mode, layout, self._rules)
        finally:
            for block in self._tree.blocks.values():
                block.held &= KNOWN
                block.state, block.boundary, block.below = self._grid.nothing, False, 0
            if self._grid.shape != former.shape:
                self._tree.forget_all()
                self._pieces.clear()
            self._unsettled = dict.fromkeys(self._tree.blocks.values())

    # -- residency ---------------------------------------------------------------------------------

    def _stored(self, event: Stored) -> None:
        tree, grid = self._tree, self._grid
        bit = grid.bits.get(event.group_id)
        if bit is None:
            self._passed_over(event)
            return
        blocks, parent, stride = tree.blocks, event.parent_hash, grid.strides[event.group_id]
        for index, sequence_hash in enumerate(event.sequence_hashes, event.position):
            block = blocks.get(sequence_hash)
            if block is None:
                position = (index + 1) * stride - 1
                if not grid.has(position):
                    continue
                # Between blocks of several units lie others, whose names are not given.
                above = tree.named(parent, position - 1, grid.nothing) if grid.plain else None
                block = tree.add(sequence_hash, position, above, grid.nothing)
            parent = sequence_hash
            if not block.resident:
                tree.now_resident(block)
            block.held |= bit
            self._unsettled[block] = None

    def _passed_over(self, event: Stored) -> None:
        """Blocks of a group that does not count: what was learnt of them may be of no use."""
        for sequence_hash in event.sequence_hashes:
            block = self._tree.blocks.get(sequence_hash)
            if block is not None and not block.resident:
                self._tree.now_idle(block)

    def _drop(self, block: Block, bits: int) -> None:
        block.held &= ~bits
        self._unsettled[block] = None
        if not block.resident:
            self._tree.resident -= 1
            self._tree.now_idle(block)

    # -- states ------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Bring states, boundaries and counts up to date with what is held, from the root downwards."""
        for block in sorted(self._unsettled, key=_position):
            self._settle_from(block)
        self._unsettled.clear()

    def _settle_from(self, top: Block) -> None:
        waiting, grid = [top], self._grid
        while waiting:
            block = waiting.pop()
            parent, before = block.parent, block.state
            above = grid.above_first(block.position) if parent is None else parent.state
            state = grid.step(above, block.held, block.position)
            if state == before:
                continue
            block.state = state
            if (state == grid.all and grid.is_edge(block.position)) != block.boundary:
                self._turn(block)
            if block.first_child and grid.matters_below(before, state, block.position):
                waiting.extend(block.children())

    def _turn(self, block: Block) -> None:
        """``block`` becomes a boundary or ceases to be one; tell those above as far as it matters to them."""
        block.boundary = not block.boundary
        step = 1 if block.boundary else -1
        above: Block | None = block
        if block.below:
            return
        size = self._grid.size
        while above is not None:
            if (above.position + 1) % size == 0:
                self._changed[above] = None
            above = above.parent
            if above is not None:
                was = above.wanted
                above.below += step
                if above.wanted == was:
                    return

    def check(self) -> None:
        """Recompute everything from what is held.

        :raises InvariantError: something differs; says which block.
        """
        self._settle()
        self._tree.check()
        below: dict[int, int] = {}
        for block in sorted(self._tree.blocks.values(), key=_position, reverse=True):
            first = self._grid.above_first(block.position)
            above_state = block.parent.state if block.parent else first
            state = self._grid.step(above_state, block.held, block.position)
            boundary = state == self._grid.all and self._grid.is_edge(block.position)
            wanted = boundary or below.get(block.sequence_hash, 0) > 0
            found = (block.state, block.boundary, block.below, block.wanted)
            due = (state, boundary, below.get(block.sequence_hash, 0), wanted)
            if found != due:
                raise InvariantError(f"projection, position {block.position}: expected {due}, got {found}")
            if wanted and block.parent is not None:
                above = block.parent.sequence_hash
                below[above] = below.get(above, 0) + 1


def _position(block: Block) -> int:
    return block.position


def _runs(blocks: list[Block], steps: int) -> list[Run]:
    """Chains of ``blocks``, given parents first; each begins below what is published or an earlier run."""
    runs: list[Run] = []
    ends: dict[Block, Run] = {}
    for block in blocks:
        above = block.above(steps)
        run = ends.pop(above, None) if above is not None else None
        if run is None:
            run = Run([], steps)
            runs.append(run)
        run.blocks.append(block)
        ends[block] = run
    return runs
