"""One running sequence of manager V1: its block tables, what it reused, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from vswa_plugin.errors import InvariantError

from ..admission import Admission, check_computed
from .match import Match, chop
from .tree import Page, Tree
from .window import Window

_NO_PAGE = -1


class SaltedPrompt(NamedTuple):
    """What a sequence was opened with."""

    tokens: tuple[int, ...]
    cache_salt: str | None


class CacheSequenceV1:
    """Made by :meth:`CacheManagerV1.open`; keeps to :class:`~..api.CacheSequence`.

    :param ascending: all windows, smallest first, the order in which V1 ends a sequence; after a chunk it
        goes the other way round.
    :param reuse: whether blocks outlive the sequence that computed them.
    """

    def __init__(
        self,
        prompt: SaltedPrompt,
        match: Match,
        tree: Tree,
        ascending: Sequence[Window],
        admission: Admission,
        *,
        block_size: int,
        reuse: bool,
        on_close: Callable[[CacheSequenceV1], None],
    ) -> None:
        self.prompt = prompt
        self.admission = admission
        self.closed = False
        self.cached_tokens = self.computed_tokens = self.reserved_tokens = match.tokens
        self._tree = tree
        self._ascending = ascending
        self._block_size = block_size
        self._reuse = reuse
        self._on_close = on_close
        self._keys = chop(prompt.tokens, block_size)
        self._receiving = False
        #: Blocks of the prompt that came by transfer, with holes in sliding windows.
        self._received_blocks = 0
        self.tables: list[list[int]] = [[] for _ in ascending]
        #: Per window: block -> the page that is held.
        self.pages: list[list[Page | None]] = [[] for _ in ascending]
        # Per window: block -> a page that has slid out, as it was then. Only contiguous windows store those.
        self._slid_out: list[dict[int, tuple[Page, int]]] = [{} for _ in ascending]
        for window in ascending:
            self._claim(window, match)

    def reserve(self, upto_tokens: int) -> None:
        """See :meth:`..api.CacheSequence.reserve`."""
        self._check_running()
        self.admission.check_step(self.computed_tokens, upto_tokens)
        blocks = -(-upto_tokens // self._block_size)
        for window in self._ascending:
            self._take(window, blocks)
        self.reserved_tokens = max(self.reserved_tokens, upto_tokens)

    def advance(self, n_tokens: int) -> None:
        """See :meth:`..api.CacheSequence.advance`.

        After a chunk of the prompt the full blocks so far can be reused, but for the prompt's last token.
        TensorRT-LLM lets go of stale blocks from the first output token on; here it happens after each
        chunk, so that a prompt needs no more pages of a window than it sees.
        """
        self._check_running()
        check_computed(n_tokens, self.reserved_tokens - self.computed_tokens)
        in_prompt = self.computed_tokens < len(self.prompt.tokens)
        self.computed_tokens += n_tokens
        if in_prompt:
            self._store_context()
        self._let_go_of_stale(self.computed_tokens)

    def reserve_transfer(self) -> tuple[range, ...]:
        """See :meth:`..api.CacheSequence.reserve_transfer`."""
        self._check_running()
        if self.reserved_tokens != self.cached_tokens or self.computed_tokens != self.cached_tokens:
            raise InvariantError(
                "a transfer is possible only right after opening, but something was reserved or computed"
            )
        self._receiving = True
        tokens = len(self.prompt.tokens)
        end = -(-tokens // self._block_size)
        self._let_go_of_stale(tokens)
        lacking = [range(0)] * len(self._ascending)
        for window in self._ascending:
            g = window.index
            first = max(self.cached_tokens // self._block_size, self._stale_end(window, tokens))
            skipped = first - len(self.tables[g])
            self.tables[g] += [_NO_PAGE] * skipped
            self.pages[g] += [None] * skipped
            self._take(window, end)
            lacking[g] = range(first, end)
        self.reserved_tokens = tokens
        return tuple(lacking)

    def receive(self) -> None:
        """See :meth:`..api.CacheSequence.receive`.

        A contiguous window stores nothing of what it received behind a hole, so that its rule can reuse
        nothing of it either.
        """
        if self.closed or not self._receiving:
            raise InvariantError("a transfer ends that was never begun, or after its sequence was closed")
        self._receiving = False
        self._received_blocks = len(self._keys)
        self.computed_tokens = len(self.prompt.tokens)
        self._store_context()

    def close(self, output: Sequence[int] = ()) -> None:
        """See :meth:`..api.CacheSequence.close`.

        All that was computed can be reused from now on, ``output`` and a partial block at the end included,
        but for the last token, which TensorRT-LLM takes as not computed.
        """
        if self.closed:
            return
        self.closed = True
        path = []
        if self._reuse and not self._lost_blocks():
            tokens = self.prompt.tokens + tuple(output)
            usable = min(self.computed_tokens, len(tokens) - 1)
            path = self._tree.insert(self.prompt.cache_salt, chop(tokens[:usable], self._block_size))
        for window in self._ascending:
            window.store(path, self._own(window), self._received_blocks)
            for page in reversed(self.pages[window.index]):
                if page is not None:
                    window.pool.release(page)
            self.pages[window.index].clear()
            self.tables[window.index].clear()
        if path:
            self._tree.prune(path[-1])
        self._on_close(self)

    def _claim(self, window: Window, match: Match) -> None:
        g = window.index
        first = self._stale_end(window, match.tokens)
        if window.contiguous:
            # A sequence that resumes this prompt needs them again. TensorRT-LLM holds them until the first
            # output token, and fetches those on the host too.
            for node in match.path[:first]:
                window.pool.touch(node.page_of(g))
        needed = [node.page_of(g) for node in match.path[first:]]
        claimed = window.claim(needed, match.parts[g] if match.parts else None)
        self.pages[g] = [None] * first + claimed
        self.tables[g] += [_NO_PAGE] * first + [page.slot.page for page in claimed]

    def _take(self, window: Window, blocks: int) -> None:
        """Make the window's table ``blocks`` long."""
        g = window.index
        for _ in range(blocks - len(self.tables[g])):
            page = window.take()
            self.pages[g].append(page)
            self.tables[g].append(page.slot.page)

    def _store_context(self) -> None:
        if not self._reuse:
            return
        usable = min(self.computed_tokens, len(self.prompt.tokens) - 1)
        path = self._tree.insert(self.prompt.cache_salt, self._keys[: usable // self._block_size])
        for window in reversed(self._ascending):
            window.store(path, self._own(window), self._received_blocks)
        if path:
            self._tree.prune(path[-1])

    def _own(self, window: Window) -> list[Page | None]:
        """The sequence's page per block, as far as its content is still there."""
        own = list(self.pages[window.index])
        for block, (page, life) in self._slid_out[window.index].items():
            own[block] = page if page.life == life else None
        return own

    def _lost_blocks(self) -> bool:
        """Whether others took what slid out of a contiguous window: then nothing is stored in any window."""
        return any(page.life != life for slid_out in self._slid_out for page, life in slid_out.values())

    def _let_go_of_stale(self, computed_tokens: int) -> None:
        """Release blocks out of window, ascending: that is the order in which they will be taken."""
        for window in self._ascending:
            g = window.index
            end = min(self._stale_end(window, computed_tokens), len(self.pages[g]))
            first = end
            while first > 0 and self.pages[g][first - 1] is not None:
                first -= 1
            for block in range(first, end):
                page = self.pages[g][block]
                assert page is not None
                # A transfer starts behind a block of which only the beginning was reused.
                if window.contiguous and (block + 1) * self._block_size <= self.computed_tokens:
                    self._slid_out[g][block] = (page, page.life)
                window.pool.release(page)
                self.pages[g][block] = None
                self.tables[g][block] = _NO_PAGE

    def _stale_end(self, window: Window, computed_tokens: int) -> int:
        return window.spec.stale_end(computed_tokens, self._block_size)

    def _check_running(self) -> None:
        if self.closed:
            raise InvariantError("a closed sequence is used")
        if self._receiving:
            raise InvariantError("a sequence computes while its blocks are transferred: receive or close it")
