"""Cache managers that follow TensorRT-LLM's manager V2, requests that run through them, and oracles."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from vswa_plugins.gemma3_cpu.cache.api import DEVICE, Slot
from vswa_plugins.gemma3_cpu.cache.hashing import block_key, salt_id
from vswa_plugins.gemma3_cpu.cache.spec import GroupSpec
from vswa_plugins.gemma3_cpu.cache.v2 import CacheManager, CacheSequence
from vswa_plugins.gemma3_cpu.cache.v2.tree import MAX_SEARCHED_CHILDREN, Node, all_nodes

DATA = Path(__file__).parent / "data"
SLIDING, GLOBAL = 0, 1
BS = 4

Tokens = Sequence[int]


def two_windows(
    sliding: int = 50, global_: int = 50, *, window: int = 8, host: tuple[int, int] = (0, 0), **options: Any
) -> CacheManager:
    """Blocks of 4 tokens; pages of two sizes unless told otherwise."""
    layers = options.pop("layers", (5, 1))
    groups = [
        GroupSpec(SLIDING, window, sliding, layers[0], host[0]),
        GroupSpec(GLOBAL, None, global_, layers[1], host[1]),
    ]
    options.setdefault("max_chunk_tokens", 16)
    return CacheManager(groups, BS, 8192, **options)


def tokens(count: int, first: int = 0) -> list[int]:
    return list(range(first, first + count))


def opened(manager: CacheManager, prompt: Tokens, new: int = 1, salt: str | None = None) -> CacheSequence:
    sequence = manager.open(prompt, new, salt)
    assert sequence is not None, "there is room"
    return sequence


def compute(
    sequence: CacheSequence, upto: int, chunk: int = 16, each_step: Callable[[], None] = lambda: None
) -> None:
    while sequence.computed_tokens < upto:
        step = min(chunk, upto - sequence.computed_tokens)
        sequence.reserve(sequence.computed_tokens + step)
        sequence.advance(step)
        each_step()


def run(manager: CacheManager, prompt: Tokens, new: int = 1, salt: str | None = None) -> int:
    """One request from start to end; how many tokens it reused."""
    sequence = opened(manager, prompt, new, salt)
    compute(sequence, len(prompt))
    compute(sequence, len(prompt) + new - 1)
    sequence.close()
    manager.check()
    return sequence.cached_tokens


def hashes(prompt: Tokens, bs: int = BS, salt: str | None = None) -> list[int]:
    """Of all blocks, the last one shorter where the prompt ends inside it."""
    chain: list[int] = []
    number = salt_id(salt) if salt is not None else None
    for i in range(0, len(prompt), bs):
        chain.append(block_key(prompt[i : i + bs], chain[-1] if chain else None, None if chain else number))
    return chain


def short(event: dict[str, Any]) -> tuple[Any, ...]:
    """An event without its constant parts: kind, group, and what it names."""
    data = event["data"]
    if data["type"] == "updated":
        diff = data["cache_level"]
        return "updated", event["layer_group_id"], data["block_hash"], diff["old_value"], diff["new_value"]
    blocks = [block["block_hash"] for block in data.get("blocks", [])]
    return data["type"], event["layer_group_id"], blocks or data.get("block_hashes")


class Announced:
    """What events add up to: per group id, hash -> level."""

    def __init__(self) -> None:
        self.held: dict[int, dict[int, int]] = {}
        self.next_id = 0

    def apply(self, events: Iterable[dict[str, Any]]) -> None:
        for event in events:
            assert self.next_id == event["event_id"]
            self.next_id += 1
            self._apply(event["data"], event["layer_group_id"])

    def _apply(self, data: dict[str, Any], group_id: int) -> None:
        if data["type"] == "created":
            self.held[group_id] = {}
            return
        held = self.held[group_id]
        match data["type"]:
            case "stored":
                for block in data["blocks"]:
                    assert block["block_hash"] not in held, "stored twice"
                    held[block["block_hash"]] = block["cache_level"]
            case "removed":
                for block_hash in data["block_hashes"]:
                    del held[block_hash]
            case "updated":
                diff = data["cache_level"]
                assert held[data["block_hash"]] == diff["old_value"]
                held[data["block_hash"]] = diff["new_value"]


class Memory:
    """What pages hold: for each of their positions, the prompt up to there. A mover for a manager."""

    def __init__(self, groups: Sequence[GroupSpec], bs: int) -> None:
        self.groups, self.bs = groups, bs
        self.cells: dict[tuple[int, Slot], dict[int, int]] = {}
        self.moves: list[tuple[int, Slot, Slot]] = []

    def move(self, group: int, source: Slot, target: Slot, /) -> None:
        self.moves.append((group, source, target))
        self.cells[self._key(group, target)] = dict(self.cells[self._key(group, source)])

    def write(
        self, sequence: CacheSequence, tokens: Tokens, positions: range, salt: str | None = None
    ) -> None:
        """As a model does that computes ``positions`` in all groups."""
        for g in range(len(self.groups)):
            self.write_group(g, sequence, tokens, positions, salt)

    def write_group(
        self, g: int, sequence: CacheSequence, tokens: Tokens, positions: range, salt: str | None = None
    ) -> None:
        for position in positions:
            page = sequence.tables[g][position // self.bs]
            assert page >= 0, "computed where no page is held"
            cell = self.cells.setdefault(self._key(g, Slot(DEVICE, page)), {})
            cell[position % self.bs] = _prefix(tokens[: position + 1], salt)

    def check_sequence(self, sequence: CacheSequence, tokens: Tokens, salt: str | None = None) -> None:
        """All that the next token sees is what this sequence computed, or would have."""
        for g, group in enumerate(self.groups):
            seen = 0 if group.window_size is None else sequence.computed_tokens - group.window_size + 1
            for position in range(max(0, seen), sequence.computed_tokens):
                page = sequence.tables[g][position // self.bs]
                assert page >= 0, "a page that the next token sees is not held"
                found = self.cells[self._key(g, Slot(DEVICE, page))][position % self.bs]
                assert _prefix(tokens[: position + 1], salt) == found, "another prompt's keys and values"

    def check_tree(self, manager: CacheManager) -> None:
        for node in all_nodes(manager._store.tree):
            prefix = prefix_of(node)
            for page in node.pages:
                if page is None:
                    continue
                cell = self.cells[self._key(page.group, page.slot)]
                for position in range(len(prefix) - len(node.tokens), len(prefix)):
                    assert _prefix(prefix[: position + 1], node.cache_salt) == cell[position % self.bs]

    def _key(self, group: int, slot: Slot) -> tuple[int, Slot]:
        return self.groups[group].layers, slot


def prefix_of(node: Node) -> list[int]:
    prefix: list[int] = []
    at: Node | None = node
    while at is not None:
        prefix[:0] = at.tokens
        at = at.parent
    return prefix


def reusable(manager: CacheManager, prompt: Tokens, salt: str | None = None, inside: bool = True) -> int:
    """Largest n of {end of the known path} and the block boundaries at which no group lacks a block.

    :param inside: whether n may lie inside a block.
    """
    store, bs = manager._store, manager._block_size
    known = {tuple(prefix_of(node)): node for node in all_nodes(store.tree) if node.cache_salt == salt}
    lookup = tuple(prompt[:-1])
    whole = 0
    while whole + bs <= len(lookup) and lookup[: whole + bs] in known:
        whole += bs
    path = [known[lookup[:end]] for end in range(bs, whole + 1, bs)]
    parent = path[-1] if path else store.tree.roots.get(salt)
    last, shared = _continued(parent, lookup, whole, manager._partial)
    ends = list(range(0, whole + 1, bs)) + [whole + shared] * (last is not None and inside)
    return max(n for n in ends if _complete(manager, [*path, *([last] if last else [])], n))


def _continued(
    parent: Node | None, lookup: tuple[int, ...], at: int, partial: bool
) -> tuple[Node | None, int]:
    rest = lookup[at:]
    children = list(parent.children.values()) if parent is not None else []
    exact = [child for child in children if child.tokens == rest]
    if exact or not partial or len(children) >= MAX_SEARCHED_CHILDREN:
        return (exact[0], len(rest)) if exact else (None, 0)
    lengths = [
        max(n for n in range(len(rest) + 1) if child.tokens[:n] == rest[:n]) for child in children
    ] or [0]
    longest = max(lengths)
    return (children[lengths.index(longest)], longest) if longest else (None, 0)


def _complete(manager: CacheManager, path: Sequence[Node], n: int) -> bool:
    bs = manager._block_size
    return all(
        path[block].pages[g] is not None
        for g, group in enumerate(manager._store.groups)
        for block in range(group.stale_end(n, bs), -(-n // bs))
    )


def _prefix(tokens: Tokens, salt: str | None) -> int:
    return hash((salt, tuple(tokens)))


def read_trace(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and records of a recorded engine."""
    with gzip.open(DATA / f"trtllm-v2-{name}.jsonl.gz", "rt") as lines:
        header, *records = map(msgspec.json.decode, lines)
    return header, records


def recorded_manager(header: dict[str, Any]) -> CacheManager:
    """A manager as the header says, with the same layers, blocks and chunks."""
    host = header["host_blocks"] or {"swa": 0, "global": 0}
    groups = [
        GroupSpec(i, window, header["gpu_blocks"][kind], header["layers"].count(kind), host[kind])
        for i, (kind, window) in enumerate([("swa", header["max_attention_window"]), ("global", None)])
    ]
    return CacheManager(groups, header["tokens_per_block"], 8192, max_chunk_tokens=header["chunk_size"])
