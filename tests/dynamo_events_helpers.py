"""What the tests of the projection share: scripts of events, the definition by brute force, Dynamo's tree."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import accumulate, count
from typing import Any

from dynamo.llm import RadixTree
from vswa_plugins.dynamo_events.projection import Changes, Projection, Run

from vswa_plugin.blocks.hashing import block_hash, block_hashes, chain
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.blocks.reuse import rule_named
from vswa_plugin.engine.contract import BlocksStored, EngineBlock, Node
from vswa_plugin.wire.events import Removed, Stored, layout_event

SIZE = 4
#: Names of blocks, root first: one letter a block.
Path = str


def layout_of(*windows: int | None, rule: str = "trtllm_v2") -> CacheLayout:
    """Windows in blocks of :data:`SIZE` tokens."""
    groups = tuple(CacheGroup(n, None if w is None else w * SIZE, SIZE) for n, w in enumerate(windows))
    return CacheLayout(groups, rule, "m")


def tokens_of(path: Path) -> list[int]:
    return [ord(letter) * SIZE + n for letter in path for n in range(SIZE)]


def nodes_of(path: Path) -> list[Node]:
    """One a block of ``path``."""
    blocks = [block_hash(tokens_of(letter)) for letter in path]
    hashes = list(accumulate(blocks[1:], chain, initial=blocks[0])) if blocks else []
    return [Node(h, n, hashes[n - 1] if n else None) for n, h in enumerate(hashes)]


def name(path: Path) -> int:
    return nodes_of(path)[-1].sequence_hash


def announced(path: Path, first: int = 0) -> tuple[BlocksStored, list[Node]]:
    """What the publisher shows of the engine's event for ``path[first:]``."""
    blocks = tuple(EngineBlock(n, tuple(tokens_of(letter))) for n, letter in enumerate(path[first:]))
    return BlocksStored(0, None, blocks), nodes_of(path)[first:]


class Held:
    """What each group of a rank holds, and which blocks it should publish by the definition."""

    def __init__(self, layout: CacheLayout, mode: str = "boundary") -> None:
        self.layout, self.mode = layout, mode
        self.held: dict[int, set[Path]] = {group.group_id: set() for group in layout.groups}
        self.known: set[Path] = set()

    def begin(self) -> list[Any]:
        for held in self.held.values():
            held.clear()
        return [layout_event(self.layout)]

    def store(self, group_id: int, path: Path, first: int = 0) -> list[Any]:
        """The blocks of ``path`` from ``first`` on; as net changes: what is held is not stored again."""
        nodes, events = nodes_of(path), []
        for at in range(first, len(path)):
            block = path[: at + 1]
            self.known.add(block)
            if block not in self.held[group_id]:
                self.held[group_id].add(block)
                node = nodes[at]
                events.append(Stored(group_id, at, node.parent_hash, (node.sequence_hash,)))
        return [announced(path, first), *events]

    def remove(self, group_id: int, *paths: Path) -> list[Any]:
        gone = [path for path in paths if path in self.held[group_id]]
        self.held[group_id].difference_update(gone)
        return [Removed(group_id, tuple(map(name, gone)))] if gone else []

    def boundary(self, path: Path) -> bool:
        """Whether a prompt that goes on behind ``path`` could be resumed there."""
        if not all(path[: n + 1] in self.known for n in range(len(path))):
            return False
        rule, depth = rule_named(self.layout.rule), len(path)
        for group in self.layout.groups:
            first = rule.first_needed(group, depth, depth * SIZE + 1)
            if self.mode == "global":
                if group.window_size is not None:
                    continue
                first = 0
            if not all(path[: n + 1] in self.held[group.group_id] for n in range(first, depth)):
                return False
        return True

    def published(self) -> set[Path]:
        """The definition: every block with a boundary at it or below it."""
        anywhere = {path for held in self.held.values() for path in held}
        return {path[: n + 1] for path in anywhere if self.boundary(path) for n in range(len(path))}

    def match(self, path: Path) -> int:
        """Blocks of ``path`` that a router should see."""
        published = self.published()
        return next((n for n in range(len(path), 0, -1) if path[:n] in published), 0)


def parent_hash(run: Run) -> int | None:
    return None if run.parent is None else run.parent.sequence_hash


class DynamoTree:
    """Dynamo's own tree with one worker. It raises for an unknown parent and for what it does not hold."""

    def __init__(self, block_size: int = SIZE) -> None:
        self._tree = RadixTree()
        self._ids = count(1)
        self._block_size = block_size

    def take(self, changes: Changes) -> None:
        if changes.removed:
            self._apply({"removed": {"block_hashes": [block.sequence_hash for block in changes.removed]}})
        for run in changes.stored:
            local = block_hashes(run.token_ids(), self._block_size)
            blocks = [
                {"block_hash": block.sequence_hash, "tokens_hash": tokens_hash}
                for block, tokens_hash in zip(run.blocks, local, strict=True)
            ]
            self._apply({"stored": {"parent_hash": parent_hash(run), "blocks": blocks}})

    def match(self, token_ids: Sequence[int]) -> int:
        """Blocks of the prompt that the tree finds."""
        scores = self._tree.find_matches(block_hashes(token_ids, self._block_size)).scores
        return int(scores.get((1, 0), 0))

    def _apply(self, data: dict[str, Any]) -> None:
        event = {"event_id": next(self._ids), "dp_rank": 0, "data": data}
        self._tree.apply_event(1, json.dumps(event).encode())


def feed(projection: Projection, events: Iterable[Any]) -> None:
    """Events of the stream, and pairs as :func:`announced` makes them."""
    for event in events:
        if isinstance(event, tuple):
            projection.learn(*event)
        else:
            projection.apply(event)


def told(projection: Projection) -> Changes:
    """The changes, committed."""
    changes = projection.changes()
    projection.commit(changes)
    return changes


def spelt(changes: Changes, paths: Sequence[Path]) -> list[str]:
    """``-path`` for each block removed, ``parent+letters`` for each run stored, in order."""
    names: dict[int | None, Path] = {name(path): path for path in paths} | {None: ""}
    removed = [f"-{names[block.sequence_hash]}" for block in changes.removed]
    stored = [
        f"{names[parent_hash(run)]}+{''.join(names[block.sequence_hash][-1] for block in run.blocks)}"
        for run in changes.stored
    ]
    return removed + stored
