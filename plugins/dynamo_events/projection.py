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
from typing import TypeAlias

from vswa_plugin.blocks import FULL, RULES, CacheLayout, ReuseRule, rule_named
from vswa_plugin.engine import BlocksStored, Node
from vswa_plugin.errors import ConfigError, InvariantError, unknown_choice
from vswa_plugin.wire import Cleared, Event, Layout, Removed, Stored, Unknown

from .tree import KNOWN, Block, Tree, packed

#: ``global``: what routers without windows do, the global group alone; ``boundary``: all groups.
MODES = ("global", "boundary")

#: Per bit of ``Block.held``: blocks needed before a boundary; None: all from the root on.
_Needs: TypeAlias = tuple[int | None, ...]
_State: TypeAlias = tuple[int, ...]

#: Long enough for the needs of a prompt to be those of any longer one.
_LONG_PROMPT_BLOCKS = 1 << 20
#: Steps remembered; there are a few hundred with two groups.
_MAX_STEPS = 100_000


@dataclass(slots=True)
class Run:
    """Consecutive blocks to be stored; the one before them is published, or there is none."""

    blocks: list[Block]

    @property
    def parent(self) -> Block | None:
        return self.blocks[0].parent


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
    :raises ConfigError: the rule of ``layout`` cannot be projected.
    """

    def __init__(
        self,
        mode: str,
        layout: CacheLayout,
        rules: Mapping[str, ReuseRule] = RULES,
        spare: int = 1024,
    ) -> None:
        if mode not in MODES:
            raise ConfigError(unknown_choice("projection", mode, MODES))
        self.published = 0
        self._mode = mode
        self._rules = rules
        self._tree = Tree(spare)
        # As ordered sets: equal events give equal changes.
        self._changed: dict[Block, None] = {}
        self._unsettled: dict[Block, None] = {}
        self._steps: dict[tuple[_State, int], _State] = {}
        self._begin(layout)

    @property
    def blocks(self) -> int:
        """How many blocks are remembered, resident or not."""
        return len(self._tree.blocks)

    def learn(self, stored: BlocksStored, nodes: Sequence[Node]) -> None:
        """Take the tokens of blocks that the engine has announced.

        :param nodes: names of the leading blocks of ``stored``.
        """
        blocks = self._tree.blocks
        space = (stored.cache_salt, stored.lora_name)
        for node, announced in zip(nodes, stored.blocks, strict=False):
            block = blocks.get(node.sequence_hash)
            if block is not None and block.tokens is not None:
                continue
            if len(announced.token_ids) == self._block_size:
                block = self._tree.add(node.sequence_hash, node.position, node.parent_hash, self._nothing)
                block.tokens = packed(announced.token_ids)
                block.space = space if any(space) else None
                block.held |= KNOWN
                self._unsettled[block] = None

    def apply(self, event: Event | Unknown) -> None:
        """Take one event of the rank's stream; a layout begins a new epoch.

        :raises ConfigError: the rule of a new layout cannot be projected; nothing is to be published then.
        """
        match event:
            case Stored():
                self._stored(event)
            case Removed(group_id=group_id):
                bit = self._bits.get(group_id, 0)
                for sequence_hash in event.sequence_hashes:
                    block = self._tree.blocks.get(sequence_hash)
                    if block is not None and block.held & bit:
                        self._drop(block, bit)
            case Cleared(group_id=group_id):
                bits = sum(self._bits.values()) if group_id is None else self._bits.get(group_id, 0)
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
        return Changes(removed, _runs(stored))

    def commit(self, changes: Changes) -> None:
        """``changes`` have been told; may be a part of what :meth:`changes` said, in its order."""
        for block in changes.removed:
            block.published = False
            if not block.resident:
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

    # -- one epoch ---------------------------------------------------------------------------------

    def _begin(self, layout: CacheLayout) -> None:
        """Nothing is resident, and this is the layout."""
        self._bits: dict[int, int] = {}
        self._use((None, None))  # until the layout is understood: a group that holds nothing
        self._tree.clear()
        for block in self._tree.blocks.values():
            block.held &= KNOWN
            block.state, block.boundary, block.below = self._nothing, False, 0
        self._changed.update((block, None) for block in self._tree.blocks.values() if block.published)
        group_needs = self._needs(layout)
        self._block_size = layout.block_size
        self._bits = {group_id: KNOWN << 1 + n for n, group_id in enumerate(group_needs)}
        self._use((None, *group_needs.values()))
        for block in self._tree.blocks.values():
            block.state = self._nothing
        self._unsettled = dict.fromkeys(self._tree.blocks.values())

    def _use(self, needs: _Needs) -> None:
        self._group_needs = needs
        self._nothing = (0,) * len(needs)
        #: Also what a root block's parent would have: before the root, nothing is missing.
        self._all = tuple(1 if need is None else need for need in needs)
        self._all_bits = (1 << len(needs)) - 1
        self._steps.clear()

    def _needs(self, layout: CacheLayout) -> dict[int, int | None]:
        """By group id, how many blocks before a boundary it must hold; the groups that count."""
        layout.check()
        if not layout.naming.by_blocks or len({group.block_size for group in layout.groups}) > 1:
            raise ConfigError(
                "expected cache groups of one block size, in which prefixes are named, for a projection onto "
                f"Dynamo's tree, got blocks of {', '.join(str(g.block_size) for g in layout.groups)} tokens; "
                "use the exact router"
            )
        if self._mode == "global":
            chosen = {group.group_id: None for group in layout.groups if group.kind == FULL}
            if not chosen:
                raise ConfigError("projection 'global': the layout has no global group; use 'boundary'")
            return dict(chosen)
        needs = rule_named(layout.rule, self._rules).needs(layout, _LONG_PROMPT_BLOCKS * layout.block_size)
        fixed = needs is not None and not any(needs.after) and set(needs.chunks) <= {None}
        if needs is None or not fixed or not any(need != 0 for need in needs.trailing):
            raise ConfigError(
                f"reuse rule {layout.rule!r} cannot be projected onto Dynamo's tree: expected a fixed number "
                f"of blocks before a boundary, got one that depends on it; use the exact router, or 'global'"
            )
        return {group.group_id: need for group, need in zip(layout.groups, needs.trailing, strict=True)}

    # -- residency ---------------------------------------------------------------------------------

    def _stored(self, event: Stored) -> None:
        bit = self._bits.get(event.group_id)
        if bit is None:
            self._passed_over(event)
            return
        tree, blocks, parent = self._tree, self._tree.blocks, event.parent_hash
        for position, sequence_hash in enumerate(event.sequence_hashes, event.position):
            block = blocks.get(sequence_hash)
            if block is None:
                block = tree.add(sequence_hash, position, parent, self._nothing)
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
        waiting = [top]
        while waiting:
            block = waiting.pop()
            parent, before = block.parent, block.state
            if parent is not None:
                state = self._step(parent.state, block.held)
            else:
                state = self._step(self._nothing if block.position else self._all, block.held)
            if state == before:
                continue
            block.state = state
            if (state == self._all) != block.boundary:
                self._turn(block)
            # What holds everything shows every difference: where it shows none, no child differs.
            everything = self._all_bits
            if block.first_child and self._step(before, everything) != self._step(state, everything):
                waiting.extend(block.children())

    def _step(self, before: _State, held: int) -> _State:
        """State of a block that holds ``held`` below one of state ``before``."""
        key = (before, held)
        state = self._steps.get(key)
        if state is None:
            if len(self._steps) >= _MAX_STEPS:
                self._steps.clear()
            state = self._steps[key] = tuple(
                0 if not held >> bit & 1 else run if need is None else min(need, run + 1)
                for bit, (run, need) in enumerate(zip(before, self._group_needs, strict=True))
            )
        return state

    def _turn(self, block: Block) -> None:
        """``block`` becomes a boundary or ceases to be one; tell those above as far as it matters to them."""
        block.boundary = not block.boundary
        step = 1 if block.boundary else -1
        above: Block | None = block
        if block.below:
            return
        while above is not None:
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
            before = block.parent.state if block.parent else self._nothing if block.position else self._all
            state = self._step(before, block.held)
            wanted = state == self._all or below.get(block.sequence_hash, 0) > 0
            found = (block.state, block.boundary, block.below, block.wanted)
            due = (state, state == self._all, below.get(block.sequence_hash, 0), wanted)
            if found != due:
                raise InvariantError(f"projection, position {block.position}: expected {due}, got {found}")
            if wanted and block.parent is not None:
                above = block.parent.sequence_hash
                below[above] = below.get(above, 0) + 1


def _position(block: Block) -> int:
    return block.position


def _runs(blocks: list[Block]) -> list[Run]:
    """Chains of ``blocks``, given parents first; each begins below what is published or an earlier run."""
    runs: list[Run] = []
    ends: dict[Block, Run] = {}
    for block in blocks:
        run = ends.pop(block.parent, None) if block.parent is not None else None
        if run is None:
            run = Run([])
            runs.append(run)
        run.blocks.append(block)
        ends[block] = run
    return runs
