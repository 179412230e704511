"""Managers of kind V1, requests that run through them, and what can be learnt from their events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from vswa_plugins.gemma3_cpu.cache.hashing import block_key, salt_id
from vswa_plugins.gemma3_cpu.cache.spec import GroupSpec
from vswa_plugins.gemma3_cpu.cache.v1 import CacheManagerV1
from vswa_plugins.gemma3_cpu.cache.v1.sequence import CacheSequenceV1
from vswa_plugins.gemma3_cpu.cache.v1.tree import Node

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.blocks.reuse import resumable, rule_named
from vswa_plugin.testing import walks

SLIDING, GLOBAL = 0, 1


def two_windows(
    sliding: int = 50,
    global_: int = 50,
    *,
    window: int = 8,
    host: int = 0,
    contiguous: bool = False,
    **options: Any,
) -> CacheManagerV1:
    """Blocks of four tokens; chunks of at most 16."""
    groups = [
        GroupSpec(0, window, sliding, host_blocks=host),
        GroupSpec(1, None, global_, host_blocks=host),
    ]
    options.setdefault("max_chunk_tokens", 16)
    return CacheManagerV1(groups, 4, 8192, contiguous=contiguous, **options)


def tokens(n: int, first: int = 0) -> list[int]:
    return list(range(first, first + n))


def opened(
    manager: CacheManagerV1, prompt: Sequence[int], new: int = 1, salt: str | None = None
) -> CacheSequenceV1:
    sequence = manager.open(prompt, new, salt)
    assert sequence is not None
    return sequence


def compute(sequence: CacheSequenceV1, upto: int, chunk: int = 16) -> None:
    while sequence.computed_tokens < upto:
        step = min(chunk, upto - sequence.computed_tokens)
        sequence.reserve(sequence.computed_tokens + step)
        sequence.advance(step)


def run(
    manager: CacheManagerV1, prompt: Sequence[int], output: Sequence[int] = (9000,), salt: str | None = None
) -> int:
    """One request from start to end; how many tokens it reused."""
    sequence = opened(manager, prompt, len(output), salt)
    compute(sequence, len(prompt))
    compute(sequence, len(prompt) + len(output) - 1, 1)
    sequence.close(output)
    manager.check()
    return sequence.cached_tokens


def names(prompt: Sequence[int], bs: int = 4, salt: str | None = None) -> list[int]:
    """Hashes of the full blocks of ``prompt``."""
    chain: list[int] = []
    number = salt_id(salt) if salt is not None else None
    for i in range(0, len(prompt) - bs + 1, bs):
        chain.append(block_key(prompt[i : i + bs], chain[-1] if chain else None, number))
    return chain


def nodes_of(manager: CacheManagerV1, salt: str | None, keys: Sequence[tuple[int, ...]]) -> list[Node]:
    """Nodes of the longest prefix of ``keys`` that the tree knows; their pages are not looked at."""
    path: list[Node] = []
    node = manager._tree.roots.get(salt)
    for key in keys:
        node = node.children.get(key) if node is not None else None
        if node is None:
            break
        path.append(node)
    return path


def lose(manager: CacheManagerV1, group: int, prompt: Sequence[int], blocks: Sequence[int]) -> None:
    """Evict given blocks of ``prompt`` from one group, as pressure from other requests would."""
    window = next(w for w in manager.windows if w.index == group)
    keys = [tuple(prompt[i : i + 4]) for i in range(0, len(prompt), 4)]
    for block in blocks:
        window._lose(nodes_of(manager, None, keys)[block].page_of(group))
    manager.check()


def short(event: dict[str, Any]) -> tuple[Any, ...]:
    """An event without its constant parts: kind, window, and what it names."""
    data = event["data"]
    blocks = [block["block_hash"] for block in data.get("blocks", [])]
    return data["type"], event["window_size"], blocks or data.get("block_hashes") or data.get("block_hash")


class Mirror:
    """What V1 events add up to, by group id: at least what the manager holds, whose losses are partly silent.

    :param subtrees: take what hangs on a removed block as gone with it, as the contiguous kind demands.
    """

    def __init__(self, groups: Sequence[GroupSpec], max_seq_len: int, subtrees: bool) -> None:
        self.held: dict[int, dict[int, int]] = {group.group_id: {} for group in groups}
        self._by_window = {group.window_size or max_seq_len: group.group_id for group in groups}
        self._subtrees = subtrees
        self._below: dict[int, set[int]] = {}
        self._next_id = 0
        self._ever_twice: set[int | None] = set()

    def read(self, event: dict[str, Any]) -> None:
        assert self._next_id == event["event_id"]
        self._next_id += 1
        group_id, data = self._by_window[event["window_size"]], event["data"]
        held = self.held[group_id]
        match data["type"]:
            case "stored":
                parent = data["parent_hash"]
                for block in data["blocks"]:
                    if block["block_hash"] in held:
                        self._ever_twice.add(block["block_hash"])
                    held[block["block_hash"]] = block["cache_level"]
                    if parent is not None:
                        self._below.setdefault(parent, set()).add(block["block_hash"])
                    parent = block["block_hash"]
            case "removed":
                for name in data["block_hashes"]:
                    held.pop(name, None)
                    if self._subtrees:
                        self._drop_below(held, name)
            case "updated":
                if data["block_hash"] in held:
                    held[data["block_hash"]] = data["cache_level"]["new_value"]

    def covers(self, manager: CacheManagerV1) -> bool:
        """Whether all that a manager holds was announced, and nothing of it was taken back."""
        for window in manager.windows:
            names = Counter(page.hash for page in window.pool.pages if page.hash is not None)
            # Two blocks behind holes may have one name, which goes with the first of them.
            unique = {name for name, count in names.items() if count == 1} - self._ever_twice
            self._ever_twice |= names.keys() - unique
            if not unique <= self.held[window.spec.group_id].keys():
                return False
        return True

    def _drop_below(self, held: dict[int, int], name: int) -> None:
        for child in self._below.get(name, ()):
            if held.pop(child, None) is not None:
                self._drop_below(held, child)


def layout_of(manager: CacheManagerV1) -> CacheLayout:
    rule = "trtllm_v1_contiguous" if manager.windows[0].contiguous else "trtllm_v1"
    groups = tuple(CacheGroup(g.group_id, g.window_size, manager._block_size) for g in manager._groups)
    return CacheLayout(groups, rule, "m")


def walked(manager: CacheManagerV1, prompt: Sequence[int], salt: str | None, partial: bool) -> int:
    """Cached tokens by another walk, over a copy of the manager's tree."""
    layout = layout_of(manager)
    tree = walks.BlockTree(layout.block_size)
    root = manager._tree.roots.get(salt)
    if root is not None:
        tree.root = _copied(manager, root)
    return walks.WALKS[layout.rule](layout, tree, tuple(prompt), partial).tokens


def _copied(manager: CacheManagerV1, node: Node) -> walks.TreeBlock:
    copy = walks.TreeBlock(node.tokens)
    copy.pages = {w.spec.group_id for w in manager.windows if node.pages[w.index] is not None}
    copy.children = [_copied(manager, child) for child in node.children.values()]
    return copy


def predicted(manager: CacheManagerV1, prompt: Sequence[int], salt: str | None) -> int:
    """Cached tokens by the reuse rule, from the names that are resident."""
    layout = layout_of(manager)
    resident = manager.resident()
    chain = names(prompt, layout.block_size, salt)
    held = {group_id: [name in blocks for name in chain] for group_id, blocks in resident.items()}
    return resumable(rule_named(layout.rule), layout, held, len(prompt))


def misnamed(manager: CacheManagerV1, prompt: Sequence[int], salt: str | None) -> bool:
    """Whether a block of the prompt is held under another name, or its name given to another block."""
    bs = manager._block_size
    keys = [tuple(prompt[i : i + bs]) for i in range(0, len(prompt) - bs + 1, bs)]
    path = nodes_of(manager, salt, keys)
    resident = manager.resident()
    for window in manager.windows:
        for block, name in enumerate(names(prompt, bs, salt)):
            held = block < len(path) and path[block].pages[window.index] is not None
            if held != (name in resident[window.spec.group_id]):
                return True
    return False
