"""One running sequence: which pages it holds, what it has committed, what it lets go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from vswa_plugin.errors import InvariantError

from ..admission import Admission, check_computed
from .store import BlockStore
from .tree import Node, Page, Tokens

#: In block tables: no page.
NO_PAGE = -1


class Request(NamedTuple):
    """What is asked for, and the path in the tree that it goes on from."""

    prompt: Tokens
    cache_salt: str | None
    path: list[Node]
    matched: int


class CacheSequence:
    """Made by :meth:`CacheManager.open`; used from the engine's thread. See :class:`..api.CacheSequence`."""

    def __init__(
        self,
        store: BlockStore,
        request: Request,
        admission: Admission,
        on_close: Callable[[CacheSequence], None],
    ) -> None:
        self.admission = admission
        self.prompt = request.prompt
        self.closed = False
        self._store = store
        self._on_close = on_close
        self._bs = store.block_size
        self.cached_tokens = self.computed_tokens = self.reserved_tokens = request.matched
        self._cache_salt = request.cache_salt
        #: Blocks of the tree that this sequence computed or reused; ``tail`` is the last of them.
        self.committed_blocks = request.matched // self._bs
        self.tail = request.path[self.committed_blocks - 1] if self.committed_blocks else None
        #: Whether more blocks may follow ``tail``.
        self.committing = store.reuse
        self.transferring = False
        self.pages = store.reuse_path(request.path, request.matched)
        self.tables = [[NO_PAGE if page is None else page.number for page in pages] for pages in self.pages]
        self._stale_ends = self._stale_ends_at(request.matched)

    def reserve(self, upto_tokens: int) -> None:
        """Make pages for positions [computed_tokens, upto_tokens) exist. Never fails within the admission.

        :raises InvariantError: the sequence was admitted for less.
        """
        self._check_open()
        self.admission.check_step(self.computed_tokens, upto_tokens)
        if upto_tokens <= self.reserved_tokens:
            return
        more = -(-upto_tokens // self._bs) - len(self.tables[0])
        if more > 0:
            for g, pages in enumerate(self._store.take([more] * len(self.tables))):
                self._append(g, pages)
        self.reserved_tokens = upto_tokens

    def advance(self, n_tokens: int) -> None:
        """The next ``n_tokens`` are computed: commit prompt blocks, let go of stale sliding ones.

        :raises InvariantError: no pages were reserved for them.
        """
        self._check_open()
        check_computed(n_tokens, self.reserved_tokens - self.computed_tokens)
        self.computed_tokens += n_tokens
        if self.committing:
            self._commit_full()
        self._let_go()
        if self.committing and self.computed_tokens >= len(self.prompt):
            self._commit_tail()

    def reserve_transfer(self) -> tuple[range, ...]:
        """See :meth:`..api.CacheSequence.reserve_transfer`."""
        self._check_open()
        if self.reserved_tokens != self.cached_tokens:
            raise InvariantError("expected a transfer right after opening, got one after pages were reserved")
        self.transferring = True
        prompt_len = len(self.prompt)
        blocks = -(-prompt_len // self._bs)
        self._let_go(prompt_len)
        lacking = [range(max(self.cached_tokens // self._bs, end), blocks) for end in self._stale_ends]
        have = len(self.tables[0])
        missing = [range(max(have, end), blocks) for end in self._stale_ends]
        for g, pages in enumerate(self._store.take([len(part) for part in missing])):
            self._append(g, [*[None] * (missing[g].start - have), *pages])
        self.reserved_tokens = prompt_len
        return tuple(lacking)

    def receive(self) -> None:
        """The transfer is there: ``computed_tokens`` is the prompt, which is committed as after a prefill.

        :raises InvariantError: none was reserved for.
        """
        if not self.transferring:
            raise InvariantError("expected a transfer that was reserved for, got none")
        self.transferring = False
        self.advance(len(self.prompt) - self.computed_tokens)

    def close(self, output: Sequence[int] = ()) -> None:
        """Give all pages back, the last block first; what is committed stays reusable until evicted.

        :param output: not kept under these rules.
        """
        if self.closed:
            return
        self.closed = True
        release = self._store.release
        groups = [self.pages[g] for g in reversed(self._store.order)]
        for block in range(len(self.tables[0]) - 1, -1, -1):
            for pages in groups:
                page = pages[block]
                if page is not None:
                    release(page)
        for g, table in enumerate(self.tables):
            table.clear()
            self.pages[g].clear()
        self._on_close(self)

    def _append(self, g: int, pages: Sequence[Page | None]) -> None:
        self.pages[g].extend(pages)
        self.tables[g].extend(NO_PAGE if page is None else page.number for page in pages)

    def _commit_full(self) -> None:
        full = min(self.computed_tokens, len(self.prompt)) // self._bs
        for block in range(self.committed_blocks, full):
            parent = self._parent()
            if parent is None:
                return
            tokens = self.prompt[block * self._bs : (block + 1) * self._bs]
            own = [pages[block] for pages in self.pages]
            node = parent.children.get(tokens)
            if node is None:
                self.tail = self._store.commit_new(parent, tokens, own)
            else:
                self._use(block, self._store.commit_known(node, own))
                self.tail = node
            self.committed_blocks += 1

    def _commit_tail(self) -> None:
        """The prompt is done: its last tokens go in as a block that is not full, unless one covers them."""
        tokens = self.prompt[self.committed_blocks * self._bs :]
        parent = self._parent() if tokens else None
        if parent is not None and not self._store.tree.covers(parent, tokens):
            own = [pages[self.committed_blocks] for pages in self.pages]
            self.tail = self._store.commit_new(parent, tokens, own)
            self.committed_blocks += 1
        self.committing = False

    def _parent(self) -> Node | None:
        """The node below which the next block goes; None if there is none any more."""
        if self.tail is None:
            return self._store.tree.root(self._cache_salt)
        # With a window of one block the tail can be stale before the next is computed, and be evicted.
        self.committing = self.tail.attached
        return self.tail if self.committing else None

    def _use(self, block: int, used: Sequence[Page | None]) -> None:
        for g, page in enumerate(used):
            self.pages[g][block] = page
            self.tables[g][block] = NO_PAGE if page is None else page.number

    def _let_go(self, computed_tokens: int | None = None) -> None:
        """Release stale blocks. They are evicted in the order in which they become droppable."""
        ends = self._stale_ends_at(self.computed_tokens if computed_tokens is None else computed_tokens)
        if ends == self._stale_ends:
            return
        stale = [
            (g, block)
            for g in self._store.order
            for block in range(self._stale_ends[g], min(ends[g], len(self.pages[g])))
        ]
        # With a lower level a page is in line as soon as its block is stale, else once it was let go, and
        # the engine lets go of what one step makes stale from the end.
        if not self._store.has_host:
            stale.reverse()
        for g, block in stale:
            page = self.pages[g][block]
            self.pages[g][block], self.tables[g][block] = None, NO_PAGE
            if page is not None:
                self._store.release(page)
        self._stale_ends = ends

    def _stale_ends_at(self, computed_tokens: int) -> list[int]:
        return [group.stale_end(computed_tokens, self._bs) for group in self._store.groups]

    def _check_open(self) -> None:
        if self.closed:
            raise InvariantError("a closed sequence is used")
