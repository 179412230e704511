"""Invariants of pools, tree and open sequences, each verified from scratch. Slow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

from vswa_plugin.errors import InvariantError

from .pool import BlockPool
from .sequence import CacheSequence
from .store import BlockStore
from .tree import NO_PAGE, Node, subtree


def check_store(store: BlockStore, sequences: Collection[CacheSequence], reserved: list[int]) -> None:
    """Verify all invariants.

    :param reserved: pages that admission counts as taken, per group.
    :raises InvariantError: names the first one that does not hold.
    """
    for g, (group, pool) in enumerate(zip(store.groups, store.pools, strict=True)):
        expected = sum(sequence.admission.held[g] for sequence in sequences)
        _require(
            reserved[g] == expected, f"group {g}: {reserved[g]} pages reserved, open sequences {expected}"
        )
        _require(reserved[g] <= group.num_blocks, f"group {g}: more pages reserved than the pool has")
        _check_pool(g, pool, sequences)
    _check_tree(store, sequences)
    for sequence in sequences:
        _check_sequence(store, sequence)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise InvariantError(f"KV cache: {what}")


def _check_pool(g: int, pool: BlockPool, sequences: Collection[CacheSequence]) -> None:
    holders = Counter(page for s in sequences for page in s.tables[g] if page != NO_PAGE)
    free, droppable = list(pool.free), list(pool.droppable)
    _require(len(set(free)) == len(free), f"group {g}: a page is free twice")
    for page in range(pool.num_blocks):
        where = f"group {g}, page {page}"
        _require(pool.holders[page] == holders[page], f"{where}: holders miscounted")
        node = pool.nodes[page]
        _require(node is None or node.pages[g] == page, f"{where}: its node has another page")
        _require((page in free) == (node is None and not holders[page]), f"{where}: free xor used")
        _require(
            (page in droppable) == (node is not None and not holders[page]), f"{where}: droppable iff unheld"
        )
        _require(node is not None or holders[page] <= 1, f"{where}: a page being written has two owners")


def _check_tree(store: BlockStore, sequences: Collection[CacheSequence]) -> None:
    pins = Counter(id(sequence.tail) for sequence in sequences)
    committed = [sum(node is not None for node in pool.nodes) for pool in store.pools]
    global_groups = [g for g, group in enumerate(store.groups) if group.window_size is None]
    for node in _all_nodes(store):
        _require(node.pins == pins[id(node)], "a node's pins are miscounted")
        _require(not node.is_empty_tail, "an empty tail node is left in the tree")
        for g, page in enumerate(node.pages):
            if page != NO_PAGE:
                committed[g] -= 1
                _require(
                    store.pools[g].nodes[page] is node, f"group {g}, page {page}: belongs to another node"
                )
        for g in global_groups:
            _require(
                node.parent is None or node.pages[g] != NO_PAGE, f"group {g}: a block without its global page"
            )
            _check_descendants(store, node, g)
    _require(not any(committed), "a committed page belongs to a node that left the tree")


def _check_descendants(store: BlockStore, node: Node, g: int) -> None:
    if node.pages[g] == NO_PAGE or store.pools[g].holders[node.pages[g]]:
        return
    for below in subtree(node):
        held = any(
            page != NO_PAGE and pool.holders[page]
            for page, pool in zip(below.pages, store.pools, strict=True)
        )
        _require(not held, f"group {g}: a droppable global page has a held descendant")


def _check_sequence(store: BlockStore, sequence: CacheSequence) -> None:
    bs = store.block_size
    path = _path(sequence.tail)
    _require(
        [node.tokens for node in path] == sequence.blocks[: sequence.committed_blocks],
        "the committed blocks of a sequence are not its path in the tree",
    )
    for g, (group, pool) in enumerate(zip(store.groups, store.pools, strict=True)):
        table = sequence.tables[g]
        held = sum(page != NO_PAGE for page in table)
        _require(
            held <= sequence.admission.held[g], f"group {g}: a sequence holds more than was reserved for it"
        )
        _require(
            len(table) == -(-sequence.reserved_tokens // bs), f"group {g}: a table is not as long as reserved"
        )
        stale_end = group.stale_end(sequence.computed_tokens, bs)
        for block, page in enumerate(table):
            where = f"group {g}, block {block} of a sequence"
            _require((page == NO_PAGE) == (block < stale_end), f"{where}: held iff the window can see it")
            if page == NO_PAGE:
                continue
            owner = path[block] if block < len(path) else None
            _require(pool.nodes[page] is owner, f"{where}: committed blocks are the tree's, others private")


def _path(node: Node) -> list[Node]:
    path = []
    while node.parent is not None:
        path.append(node)
        node = node.parent
    return path[::-1]


def _all_nodes(store: BlockStore) -> Iterator[Node]:
    for root in store.tree.roots.values():
        yield from subtree(root)
