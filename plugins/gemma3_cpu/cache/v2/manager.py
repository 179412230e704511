"""The cache manager: admits sequences, matches their prompts, keeps what they computed for reuse.

The rules are those of TensorRT-LLM's KV cache manager V2. What a prompt can reuse is found by walking the
pages of the manager's own token tree, so that a router's prediction from events can be compared with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..admission import Admission, RequestSize, check_settings
from ..api import PageMover, no_pages
from ..buffer import EventBuffer
from ..spec import GroupSpec
from .check import check_store
from .events import EventLog
from .sequence import CacheSequence, Request
from .store import BlockStore
from .tree import all_nodes


class CacheManager:
    """Blocks of all cache groups of one engine rank. Used from the engine's thread, except :meth:`stats`.

    :param groups: windows and pool sizes; block tables come in this order. Groups with pages of one size
        share one pool, of all their blocks together.
    :param block_size: tokens per block, in all groups.
    :param max_seq_len: longest sequence in tokens; events give it as the window of a global group.
    :param event_buffer_max_size: events kept between two flushes; 0 turns events off.
    :param enable_block_reuse: False: every block is gone when its sequence closes.
    :param enable_partial_reuse: whether a prompt may go on inside a block of another.
    :param max_chunk_tokens: most tokens of one sequence that are computed in one step.
    :param dp_rank: of an engine with several ranks, as events give it.
    :param mover: copies a page's keys and values.
    :raises ConfigError: sizes that cannot work.
    """

    def __init__(
        self,
        groups: Sequence[GroupSpec],
        block_size: int,
        max_seq_len: int,
        *,
        event_buffer_max_size: int = 100_000,
        enable_block_reuse: bool = True,
        enable_partial_reuse: bool = True,
        max_chunk_tokens: int = 512,
        dp_rank: int | None = None,
        mover: PageMover = no_pages,
    ) -> None:
        check_settings(groups, block_size, max_seq_len, max_chunk_tokens)
        self._block_size = block_size
        self._max_seq_len = max_seq_len
        self._max_chunk_tokens = max_chunk_tokens
        self._partial = enable_partial_reuse
        windows = {group.group_id: group.window_size or max_seq_len for group in groups}
        buffer = EventBuffer(windows, event_buffer_max_size, dp_rank=dp_rank)
        self._log = EventLog(buffer, [group.group_id for group in groups], _blocks_per_level(groups))
        self._store = BlockStore(groups, block_size, self._log, enable_block_reuse, mover)
        self._open: set[CacheSequence] = set()
        self._reserved = [0] * len(self._store.device)

    def check_fits(self, prompt_len: int, max_new_tokens: int) -> None:
        """Return if a request of that many tokens could run, were it alone.

        :raises InvalidRequest: it never can; the message names the limit and the numbers.
        """
        size = RequestSize(prompt_len, max_new_tokens)
        size.check(self._max_seq_len)
        needed = self._by_pool(self._most_held(size.total))
        for p, (count, pool) in enumerate(zip(needed, self._store.device, strict=True)):
            size.check_pool(count, pool.num_pages, self._block_size, self._pool_name(p))

    def open(
        self, prompt: Sequence[int], max_new_tokens: int, cache_salt: str | None = None
    ) -> CacheSequence | None:
        """Admit a sequence and hold the blocks that it reuses; None while there is no room for it.

        Room is counted for the most pages that each open sequence can ever hold, reused ones included, so
        that one which runs never has to wait or stop for lack of pages.

        :raises InvalidRequest: as :meth:`check_fits`.
        """
        self.check_fits(len(prompt), max_new_tokens)
        total = len(prompt) + max_new_tokens
        held = self._most_held(total)
        if not self._has_room(held):
            return None
        request, held = self._match(tuple(prompt), cache_salt, held)
        if not self._has_room(held):
            return None
        for p, needed in enumerate(self._by_pool(held)):
            self._reserved[p] += needed
        admission = Admission(total, self._max_chunk_tokens, tuple(held))
        sequence = CacheSequence(self._store, request, admission, self._closed)
        self._open.add(sequence)
        return sequence

    def would_reuse(self, prompt: Sequence[int], cache_salt: str | None = None) -> int:
        """Tokens of ``prompt`` that :meth:`open` would reuse now; nothing changes."""
        if not self._store.reuse:
            return 0
        return self._store.match(tuple(prompt), cache_salt, self._partial)[1]

    def flush_events(self) -> list[dict[str, Any]]:
        """TensorRT-LLM event dicts since the last call, in order; call it once per engine step."""
        return self._log.flush()

    def resident(self) -> dict[int, dict[int, int]]:
        """By group id: hash of each block held for reuse, partial ones included -> its level."""
        resident: dict[int, dict[int, int]] = {group.group_id: {} for group in self._store.groups}
        for node in all_nodes(self._store.tree):
            for group, page in zip(self._store.groups, node.pages, strict=True):
                if page is not None and node.hash is not None:
                    resident[group.group_id][node.hash] = page.level
        return resident

    def stats(self) -> dict[str, float]:
        """Gauges ``blocks_used_<window>``, ``blocks_free_...`` and ``blocks_droppable_...``; any thread.

        The window is in tokens, or ``global``; with a host tier ``blocks_host_...`` too. Groups that share
        a pool share its free pages. ``kv_events_dropped`` counts events lost to a full buffer.
        """
        store = self._store
        gauges: dict[str, float] = {"kv_events_dropped": float(self._log.buffer.dropped)}
        for g, group in enumerate(store.groups):
            pool, host = store.device[store.pool_of[g]], store.host[store.pool_of[g]]
            counts = {
                "used": pool.allocated[g] - pool.droppable[g],
                "free": len(pool.free),
                "droppable": pool.droppable[g],
            }
            if store.has_host:
                counts["host"] = host.allocated[g]
            for state, count in counts.items():
                name = f"blocks_{state}_{group.label}"
                gauges[name] = gauges.get(name, 0.0) + count
        return gauges

    def check(self) -> None:
        """Verify every invariant; slow, for tests and bug reports.

        :raises InvariantError: names the first one that does not hold.
        """
        check_store(self._store, self._open, self._reserved)

    def _match(
        self, prompt: tuple[int, ...], cache_salt: str | None, held: list[int]
    ) -> tuple[Request, list[int]]:
        """What the prompt can reuse, and the most pages per group that are held then.

        To go on inside a block takes a page for the copy beside the block's own, for a moment. A request
        that would fill a pool with all its other pages goes on from the block's start instead.
        """
        if not self._store.reuse:
            return Request(prompt, cache_salt, [], 0), held
        path, matched = self._store.match(prompt, cache_salt, self._partial)
        inside = matched % self._block_size
        if inside:
            copying = [
                max(most, len(path) - group.stale_end(matched, self._block_size) + 1)
                for most, group in zip(held, self._store.groups, strict=True)
            ]
            if self._fits(copying):
                return Request(prompt, cache_salt, path, matched), copying
            path, matched = self._store.settle(path[:-1], matched - inside)
        return Request(prompt, cache_salt, path, matched), held

    def _most_held(self, total_tokens: int) -> list[int]:
        return [
            group.most_held(total_tokens, self._block_size, self._max_chunk_tokens)
            for group in self._store.groups
        ]

    def _by_pool(self, held: Sequence[int]) -> list[int]:
        needed = [0] * len(self._store.device)
        for g, count in enumerate(held):
            needed[self._store.pool_of[g]] += count
        return needed

    def _fits(self, held: Sequence[int]) -> bool:
        pools = self._store.device
        return all(n <= pool.num_pages for n, pool in zip(self._by_pool(held), pools, strict=True))

    def _has_room(self, held: Sequence[int]) -> bool:
        needed = zip(self._by_pool(held), self._reserved, self._store.device, strict=True)
        return all(more + have <= pool.num_pages for more, have, pool in needed)

    def _pool_name(self, p: int) -> str:
        labels = [g.label for g, of in zip(self._store.groups, self._store.pool_of, strict=True) if of == p]
        return ("windows " if len(labels) > 1 else "window ") + " and ".join(labels)

    def _closed(self, sequence: CacheSequence) -> None:
        self._open.discard(sequence)
        for p, needed in enumerate(self._by_pool(sequence.admission.held)):
            self._reserved[p] -= needed


def _blocks_per_level(groups: Sequence[GroupSpec]) -> list[int]:
    """As ``created`` counts them: what a level has room for, over what a block takes in all groups."""
    layers = sum(group.layers for group in groups)
    levels = [sum(group.num_blocks * group.layers for group in groups) // layers]
    if any(group.host_blocks for group in groups):
        levels.append(sum(group.host_blocks * group.layers for group in groups) // layers)
    return levels
