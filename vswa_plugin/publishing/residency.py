"""What one rank holds, per cache group: the engine's events in, the wire's net changes out. Pure.

Engines announce blocks twice, remove what they never announced, and name blocks by hashes of their own.
The wire has set semantics: a block is stored once and removed once per group, under its sequence hash.
"""

from __future__ import annotations

import logging

import msgspec

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.chains import check_chain
from vswa_plugin.engine.contract import (
    NO_SUCH_GROUP,
    BlocksMoved,
    BlocksRemoved,
    BlocksStored,
    EngineEvent,
    EngineHash,
    EventsLost,
    GroupCreated,
    Node,
)
from vswa_plugin.publishing.nodes import NodeTable
from vswa_plugin.wire.events import TIERS, Event, Moved, Removed, Stored

logger = logging.getLogger(__name__)


class Restart(Exception):
    """The view of this rank cannot be carried on: the publisher begins a new epoch with nothing resident."""


class Residency:
    """Blocks that one rank holds, by cache group.

    :attr:`layout` is what the engine declared, corrected by its ``created`` events.
    :attr:`unattributed` counts blocks that could not be named and were therefore not published.
    """

    def __init__(self, layout: CacheLayout, nodes: NodeTable | None = None) -> None:
        self.nodes = nodes if nodes is not None else NodeTable()
        self.unattributed = 0
        self._tiers: dict[int, dict[EngineHash, str]] = {}
        self._follow(layout)

    def _follow(self, layout: CacheLayout) -> None:
        """Nothing is resident, in the groups of ``layout``."""
        self.layout = layout
        self._tiers = {group.group_id: {} for group in layout.groups}
        #: Hash units of a block, by group.
        self._strides = {
            group.group_id: group.block_size // layout.hash_block_size for group in layout.groups
        }
        # In plain layouts every block is one unit, whatever its tokens: that is the engine's to state.
        self._unit = None if layout.plain else layout.hash_block_size
        self._lookahead = layout.lookahead

    def apply(self, event: EngineEvent) -> list[Event]:
        """The wire events that ``event`` amounts to; empty where nothing changes.

        :raises Restart: events were lost, or a group is not what the layout says.
        :raises VswaError: it does not fit the layout, or closes a ring; nothing of it was taken in.
        """
        match event:
            case BlocksStored():
                return self._stored(event)
            case BlocksRemoved():
                return self._removed(event)
            case BlocksMoved():
                return self._moved(event)
            case GroupCreated():
                self._created(event)
                return []
            case EventsLost():
                self.clear()
                raise Restart(_why_lost(event))

    def clear(self) -> None:
        """Nothing is resident any more. The node table stays: it depends on content only."""
        for tiers in self._tiers.values():
            tiers.clear()

    def readmit(self, group_id: int, engine_hash: EngineHash) -> Node | None:
        """Note a block as resident that was not announced again; its node, None if nothing changed."""
        tiers = self._group(group_id)
        node = self.nodes.get(engine_hash)
        if node is None or engine_hash in tiers:
            return None
        tiers[engine_hash] = TIERS[0]
        return node

    def resident(self) -> dict[int, set[int]]:
        """Sequence hashes held, by group id."""
        return {
            group_id: {node.sequence_hash for node in map(self.nodes.get, tiers) if node is not None}
            for group_id, tiers in self._tiers.items()
        }

    def frozen(self) -> dict[int, tuple[tuple[EngineHash, str], ...]]:
        """(engine hash, tier) of every block held, by group id, as of now. Cheap: nothing is translated."""
        return {group_id: tuple(tiers.items()) for group_id, tiers in self._tiers.items()}

    def counts(self) -> dict[int, int]:
        """How many blocks each group holds."""
        return {group_id: len(tiers) for group_id, tiers in self._tiers.items()}

    def _stored(self, event: BlocksStored) -> list[Event]:
        tiers = self._group(event.group_id)
        blocks = event.blocks
        if len(blocks) > 1 or (blocks and blocks[0].hash == event.parent_hash):  # one block is mostly all
            check_chain(event.parent_hash, [block.hash for block in blocks], "stored blocks")
        changes: list[Event] = []
        run: list[Node] = []
        stride = self._strides[event.group_id]
        parent = event.parent_hash
        for index, block in enumerate(event.blocks):
            node = self.nodes.add(
                parent, block, event.cache_salt, event.lora_name, self._unit, self._lookahead
            )
            if node is None:  # and so none of its descendants in this event can be named
                self.unattributed += len(event.blocks) - index
                break
            parent = block.hash
            if tiers.get(block.hash) == event.tier:
                self._end_run(event, run, changes)
            elif block.hash in tiers:
                self._end_run(event, run, changes)
                changes.append(Moved(event.group_id, (node.sequence_hash,), event.tier))
            else:
                if run and node.position != run[-1].position + stride:
                    self._end_run(event, run, changes)
                run.append(node)
            tiers[block.hash] = event.tier
        self._end_run(event, run, changes)
        self.nodes.trim(lambda engine_hash: any(engine_hash in held for held in self._tiers.values()))
        return changes

    def _end_run(self, event: BlocksStored, run: list[Node], changes: list[Event]) -> None:
        if run:
            hashes = tuple(node.sequence_hash for node in run)
            position = self.block_index(event.group_id, run[0])
            changes.append(Stored(event.group_id, position, run[0].parent_hash, hashes, event.tier))
            run.clear()

    def block_index(self, group_id: int, node: Node) -> int:
        """Index, among the blocks of that group, of the one in which the prefix ends."""
        return node.position // self._strides.get(group_id, 1)

    def _removed(self, event: BlocksRemoved) -> list[Event]:
        tiers = self._group(event.group_id)
        names = tuple(self._named(h) for h in event.hashes if tiers.pop(h, None) is not None)
        return [Removed(event.group_id, names)] if names else []

    def _moved(self, event: BlocksMoved) -> list[Event]:
        tiers = self._group(event.group_id)
        moved = [h for h in event.hashes if tiers.get(h, event.tier) != event.tier]
        for engine_hash in moved:
            tiers[engine_hash] = event.tier
        return [Moved(event.group_id, tuple(map(self._named, moved)), event.tier)] if moved else []

    def _named(self, engine_hash: EngineHash) -> int:
        node = self.nodes.get(engine_hash)
        assert node is not None, "a resident block is never trimmed from the node table"
        return node.sequence_hash

    def _group(self, group_id: int) -> dict[EngineHash, str]:
        tiers = self._tiers.get(group_id)
        if tiers is None:
            self.layout.group(group_id)  # raises, listing the declared groups
            raise AssertionError("unreachable: the layout and the residency have the same groups")
        return tiers

    def _created(self, event: GroupCreated) -> None:
        declared = {group.group_id: group for group in self.layout.groups}
        former = declared.pop(event.group_id, None)
        absent = event.window_size == NO_SUCH_GROUP
        if absent and former is None:
            return
        if not absent:
            declared[event.group_id] = _as_created(event, former, self.layout)
            if declared[event.group_id] == former:
                return
        groups = tuple(declared[group_id] for group_id in sorted(declared))
        layout = msgspec.structs.replace(self.layout, groups=groups)
        if layout.rule == "vllm" and not layout.plain:
            layout = msgspec.structs.replace(layout, rule="vllm_hybrid")
        self._follow(layout.check())
        expected = f"window {former.label}" if former else "no such group"
        created = "has not created it"
        if not absent:
            created = f"created it with window {declared[event.group_id].label}"
        raise Restart(
            f"cache group {event.group_id}: expected {expected}, the engine {created}; the layout "
            "now follows the engine"
        )


def _as_created(event: GroupCreated, former: CacheGroup | None, layout: CacheLayout) -> CacheGroup:
    """The group as the engine states it; what its event does not state is as it was declared."""
    if former is None:
        return CacheGroup(event.group_id, event.window_size, layout.block_size, event.kind)
    if (event.kind, event.window_size) in ((None, former.window_size), (former.kind, former.window_size)):
        return former
    chunk = former.chunk_size if event.kind == former.kind else None
    return msgspec.structs.replace(
        former, window_size=event.window_size, stated_kind=event.kind, chunk_size=chunk
    )


def _why_lost(event: EventsLost) -> str:
    came = f"expected engine event id {event.expected_id}, got {event.got_id}"
    if event.got_id < event.expected_id:
        return f"{came}: the engine started again, or sent an event twice; what it held is not known any more"
    return f"{came}: the engine's event buffer overflowed; raise kv_cache_config.event_buffer_max_size"
