"""One running sequence: its block tables, what it reused, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from vswa_plugin.errors import InvariantError

from .store import BlockStore
from .tree import NO_PAGE, Node


class Admission(msgspec.Struct, frozen=True):
    """What a sequence was admitted for.

    :param total_tokens: prompt and longest output.
    :param max_chunk_tokens: most tokens computed in one step.
    :param held: most pages it may hold at a time, per group.
    """

    total_tokens: int
    max_chunk_tokens: int
    held: tuple[int, ...]


class CacheSequence:
    """Made by :meth:`CacheManager.open`; used from the engine's thread.

    :ivar cached_tokens: tokens that were reused, whole blocks.
    :ivar computed_tokens: tokens whose keys and values are in the pages; starts at ``cached_tokens``.
    :ivar tables: per group, by its index: block index -> page, or -1 where none is held. The lists stay
        the same objects; ``reserve`` appends to them, ``advance`` may change any entry.
    """

    def __init__(
        self,
        store: BlockStore,
        prompt: tuple[int, ...],
        cache_salt: str | None,
        admission: Admission,
        on_close: Callable[[CacheSequence], None],
    ) -> None:
        self.admission = admission
        self._store = store
        self._on_close = on_close
        bs = store.block_size
        #: Full blocks of the prompt; those in the tree are the first ``committed_blocks``.
        self.blocks = [prompt[i : i + bs] for i in range(0, len(prompt) - bs + 1, bs)]
        self.committed_blocks = 0
        self.closed = False
        self.tables: list[list[int]] = [[] for _ in store.groups]
        # The last token of a prompt is always computed: its logits are what the request is for.
        path = store.match(self.blocks[: (len(prompt) - 1) // bs], cache_salt)
        self._hold(path)
        self.tail = path[-1] if path else store.tree.root(cache_salt)
        self.tail.pins += 1
        self.committed_blocks = len(path)
        self.cached_tokens = self.computed_tokens = self.reserved_tokens = len(path) * bs

    def reserve(self, upto_tokens: int) -> None:
        """Make pages for positions [computed_tokens, upto_tokens) exist. Never fails within the admission.

        :raises InvariantError: asks for more than the sequence was admitted for.
        """
        self._check_open()
        chunk = upto_tokens - self.computed_tokens
        if upto_tokens > self.admission.total_tokens or chunk > self.admission.max_chunk_tokens:
            raise InvariantError(
                f"expected at most {self.admission.max_chunk_tokens} tokens a step and "
                f"{self.admission.total_tokens} in all, got pages asked for up to token {upto_tokens} "
                f"with {self.computed_tokens} computed"
            )
        blocks = -(-upto_tokens // self._store.block_size)
        for g, table in enumerate(self.tables):
            if blocks > len(table):
                table.extend(self._store.take(g, blocks - len(table)))
        self.reserved_tokens = max(self.reserved_tokens, upto_tokens)

    def advance(self, n_tokens: int) -> None:
        """The next ``n_tokens`` are computed: commit full prompt blocks, let go of stale sliding ones.

        :raises InvariantError: no pages were reserved for them.
        """
        self._check_open()
        if not 0 <= n_tokens <= self.reserved_tokens - self.computed_tokens:
            raise InvariantError(
                f"expected at most {self.reserved_tokens - self.computed_tokens} computed tokens, for which "
                f"pages are reserved, got {n_tokens}"
            )
        self.computed_tokens += n_tokens
        if self._store.reuse:
            self._commit()
        for g, group in enumerate(self._store.groups):
            self._let_go(g, group.stale_end(self.computed_tokens, self._store.block_size))

    def close(self) -> None:
        """Give all pages back, the last block first. Committed ones stay reusable until dropped."""
        if self.closed:
            return
        self.closed = True
        for pool, table in zip(self._store.pools, self.tables, strict=True):
            for page in reversed(table):
                if page != NO_PAGE:
                    pool.release(page)
            table.clear()
        self.tail.pins -= 1
        self._store.tree.prune(self.tail)
        self._on_close(self)

    def _hold(self, path: Sequence[Node]) -> None:
        for g, (group, pool) in enumerate(zip(self._store.groups, self._store.pools, strict=True)):
            first = group.stale_end(len(path) * self._store.block_size, self._store.block_size)
            self.tables[g][:] = [NO_PAGE] * first + [node.pages[g] for node in path[first:]]
            for page in self.tables[g][first:]:
                pool.hold(page)

    def _commit(self) -> None:
        full = min(self.computed_tokens // self._store.block_size, len(self.blocks))
        for block in range(self.committed_blocks, full):
            node = self._store.commit(self.tail, self.blocks[block], self.tables, block)
            self.tail.pins -= 1
            node.pins += 1
            self.tail = node
        self.committed_blocks = max(self.committed_blocks, full)

    def _let_go(self, g: int, stale_end: int) -> None:
        """Release blocks below ``stale_end``, ascending: that is the order in which they will be dropped."""
        table, pool = self.tables[g], self._store.pools[g]
        first = stale_end
        while first > 0 and table[first - 1] != NO_PAGE:
            first -= 1
        for block in range(first, stale_end):
            pool.release(table[block])
            table[block] = NO_PAGE

    def _check_open(self) -> None:
        if self.closed:
            raise InvariantError("a closed sequence is used")
