"""Invariants of manager V1's pools, tree and open sequences, each verified from scratch. Slow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from vswa_plugin.errors import InvariantError

from ..api import DEVICE
from .sequence import CacheSequenceV1
from .tree import Node, Page, Tree
from .window import Window


def check_manager(
    windows: Sequence[Window], tree: Tree, sequences: Collection[CacheSequenceV1], reserved: list[int]
) -> None:
    """Verify all invariants.

    :param reserved: pages that admission counts as taken, per window by its index.
    :raises InvariantError: names the first one that does not hold.
    """
    nodes = list(_all_nodes(tree))
    for node in nodes:
        _require(node.parent is None or any(node.pages) or bool(node.children), "an empty tail node is left")
    for window in windows:
        g = window.index
        admitted = sum(sequence.admission.held[g] for sequence in sequences)
        _require(reserved[g] == admitted, f"window {g}: {reserved[g]} pages reserved, not {admitted}")
        _require(reserved[g] <= window.spec.num_blocks, f"window {g}: more pages reserved than there are")
        _check_pool(window, sequences)
        _check_tree(window, nodes)
    for sequence in sequences:
        _check_sequence(windows, sequence)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise InvariantError(f"KV cache: {what}")


def _check_pool(window: Window, sequences: Collection[CacheSequenceV1]) -> None:
    g, pool = window.index, window.pool
    holders = Counter(page for s in sequences for page in s.pages[g] if page is not None)
    slots = Counter(page.slot for page in pool.pages)
    _require(set(slots.values()) == {1}, f"window {g}: two pages lie in one place")
    _require(
        len(slots) == window.spec.num_blocks + window.spec.host_blocks, f"window {g}: a place has no page"
    )
    for page in pool.pages:
        where = f"window {g}, page at {page.slot}"
        _require(page.holders == holders[page], f"{where}: holders miscounted")
        _require(not page.holders or page.slot.level == DEVICE, f"{where}: held on the host")
        for level, queue in enumerate(pool.queues):
            waits = not page.holders and page.slot.level == level
            _require((page in queue) == waits, f"{where}: waits iff no sequence holds it")
        # What hangs on a lost block of a contiguous window is lost too, whoever holds it.
        shared = page.node is not None or window.contiguous
        _require(shared or page.holders <= 1, f"{where}: a page being written has two owners")
    waiting = [sum(page.node is not None for page in queue) for queue in pool.queues]
    _require(waiting == [pool.droppable, pool.on_host], f"window {g}: reusable pages miscounted")


def _check_tree(window: Window, nodes: Collection[Node]) -> None:
    g = window.index
    present: dict[Page, Node] = {page: node for node in nodes if (page := node.pages[g]) is not None}
    reusable = {page: page.node for page in window.pool.pages if page.node is not None}
    _require(present == reusable, f"window {g}: pages and nodes disagree")
    _require(all(page.hash is not None for page in reusable), f"window {g}: a block without a name")
    _require(all(page.used for page in reusable), f"window {g}: a block on a page that was never used")
    for node in nodes:
        # Where windows have trees of their own, the order is of the children that this one has.
        children = {
            tokens
            for tokens, child in node.children.items()
            if not window.contiguous or child.pages[g] is not None
        }
        _require(set(node.order_of(g)) == children, f"window {g}: children and their order disagree")
    if not window.contiguous:
        return
    for page, node in present.items():
        above = node.parent
        whole = above is None or above.parent is None or above.pages[g] is not None
        _require(whole, f"window {g}: a block without the one before it")
        _require(page.hash == node.hash, f"window {g}: a name that is not of the whole prefix")


def _check_sequence(windows: Sequence[Window], sequence: CacheSequenceV1) -> None:
    for window in windows:
        g = window.index
        pages, table = sequence.pages[g], sequence.tables[g]
        where = f"window {g} of a sequence"
        _require(table == [-1 if p is None else p.slot.page for p in pages], f"{where}: table and pages")
        held = sum(page is not None for page in pages)
        _require(held <= sequence.admission.held[g], f"{where}: more pages than were reserved for it")
        seen = window.spec.stale_end(sequence.computed_tokens, sequence.block_size)
        _require(None not in pages[seen:], f"{where}: a hole in what its next token sees")


def _all_nodes(tree: Tree) -> Iterator[Node]:
    todo = list(tree.roots.values())
    while todo:
        node = todo.pop()
        yield node
        todo += node.children.values()
