"""Invariants of pools, tree and open sequences, each verified from scratch. Slow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from vswa_plugin.errors import InvariantError

from ..api import DEVICE, HOST
from .pool import PagePool
from .sequence import NO_PAGE, CacheSequence
from .store import BlockStore
from .tree import Node, Page, all_nodes


def check_store(store: BlockStore, sequences: Collection[CacheSequence], reserved: Sequence[int]) -> None:
    """Verify all invariants.

    :param reserved: pages that admission counts as taken, per pool.
    :raises InvariantError: names the first one that does not hold.
    """
    nodes = list(all_nodes(store.tree))
    held = [page for sequence in sequences for pages in sequence.pages for page in pages if page is not None]
    _check_reserved(store, sequences, reserved)
    _check_holders(held)
    used = {page for node in nodes for page in node.pages if page is not None}.union(held)
    for level, pools in ((DEVICE, store.device), (HOST, store.host)):
        for p, pool in enumerate(pools):
            mine = [page for page in used if (page.level, store.pool_of[page.group]) == (level, p)]
            _check_pool(f"pool {p}, level {level}", pool, mine)
    for root in store.tree.roots.values():
        _require(bool(root.children), "the root of a salt has no children")
    for node in nodes:
        _check_node(store, node)
    for sequence in sequences:
        _check_sequence(store, sequence)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise InvariantError(f"KV cache: {what}")


def _check_reserved(store: BlockStore, sequences: Collection[CacheSequence], reserved: Sequence[int]) -> None:
    for p, pool in enumerate(store.device):
        groups = [g for g, of in enumerate(store.pool_of) if of == p]
        expected = sum(sequence.admission.held[g] for sequence in sequences for g in groups)
        _require(reserved[p] == expected, f"pool {p}: {reserved[p]} pages reserved, sequences {expected}")
        _require(reserved[p] <= pool.num_pages, f"pool {p}: more pages reserved than the pool has")


def _check_holders(held: Sequence[Page]) -> None:
    holders = Counter(held)
    for page, count in holders.items():
        where = f"group {page.group}, page {page.number}"
        _require(page.holders == count, f"{where}: {page.holders} holders, sequences say {count}")
        _require(page.level == DEVICE, f"{where}: held, but not on the device")
        _require(not page.queued, f"{where}: held, and in line to be evicted")


def _check_pool(where: str, pool: PagePool, used: Sequence[Page]) -> None:
    # Pages in line whose block is gone: they moved to the host in the step in which it went.
    stray = [page for page in pool.queue if page.node is None]
    pages = [*used, *stray]
    numbers = sorted([page.number for page in pages] + pool.free)
    _require(numbers == list(range(pool.num_pages)), f"{where}: each page is free or used, once")
    droppable = {page for page in used if not page.holders}.union(stray)
    _require(set(pool.queue) == droppable, f"{where}: in line to be evicted iff no sequence holds it")
    _require(all(page.queued for page in pool.queue), f"{where}: a page in line does not know it")
    for g in range(len(pool.allocated)):
        allocated = sum(page.group == g for page in pages)
        in_line = sum(page.group == g for page in pool.queue)
        _require(pool.allocated[g] == allocated, f"{where}, group {g}: allocated pages miscounted")
        _require(pool.droppable[g] == in_line, f"{where}, group {g}: droppable pages miscounted")


def _check_node(store: BlockStore, node: Node) -> None:
    _require(node.attached, "a node in the tree counts as cut off")
    full = len(node.tokens) == store.block_size
    _require(full or not node.children, "a block that is not full has children")
    for g, page in enumerate(node.pages):
        sliding = store.groups[g].window_size is not None
        _require(sliding or page is not None, f"group {g}: a block without its global page")
        own = page is None or (page.node is node and page.group == g)
        _require(own, f"group {g}: a node has a page of another")
    _require(bool(node.children) or any(node.pages), "an empty tail node is left in the tree")
    short = [child.tokens for child in node.children.values() if len(child.tokens) < store.block_size]
    _require(node.short_children == len(short), "short children miscounted")
    for tokens in short:
        covered = sum(child[: len(tokens)] == tokens for child in node.children)
        _require(covered == 1, "a block that is not full has a sibling that begins with its tokens")


def _check_sequence(store: BlockStore, sequence: CacheSequence) -> None:
    bs = store.block_size
    path = _path(sequence.tail)
    tokens = [token for node in path for token in node.tokens]
    _require(tokens == list(sequence.prompt[: len(tokens)]), "a sequence's path has other tokens")
    _require(len(path) == sequence.committed_blocks, "a sequence's committed blocks are not its path")
    computed = len(sequence.prompt) if sequence.transferring else sequence.computed_tokens
    for g, group in enumerate(store.groups):
        pages, table = sequence.pages[g], sequence.tables[g]
        where = f"group {g} of a sequence"
        _require(table == [NO_PAGE if page is None else page.number for page in pages], f"{where}: its table")
        _require(len(table) == -(-sequence.reserved_tokens // bs), f"{where}: not as long as reserved")
        held = sum(page is not None for page in pages)
        _require(held <= sequence.admission.held[g], f"{where}: more held than was reserved")
        stale_end = group.stale_end(computed, bs)
        for block, page in enumerate(pages):
            _require((page is None) == (block < stale_end), f"{where}, block {block}: held iff it is seen")
            node = path[block] if block < len(path) and path[block].attached else None
            _require(page is None or page.node is node, f"{where}, block {block}: the page of another block")


def _path(node: Node | None) -> list[Node]:
    path = []
    while node is not None and node.parent is not None:
        path.append(node)
        node = node.parent
    return path[::-1]
