"""One running sequence of manager V1: its block tables, what it reused, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from vswa_plugin.errors import InvariantError

from ..admission import Admission, check_computed
from .match import Matcher, chop
from .tree import Page, Tree
from .window import Window

_NO_PAGE = -1


class SaltedPrompt(NamedTuple):
    """What a sequence was opened with."""

    tokens: tuple[int, ...]
    cache_salt: str | None


class CacheSequenceV1:
    """Made by :meth:`CacheManagerV1.open`; keeps to :class:`~..api.CacheSequence`.

    :param matcher: finds what can be reused; None: nothing is.
    :param ascending: all windows, smallest first.
    :param max_new_tokens: of the request.
    """

    def __init__(
        self,
        prompt: SaltedPrompt,
        matcher: Matcher | None,
        tree: Tree,
        ascending: Sequence[Window],
        admission: Admission,
        *,
        block_size: int,
        max_new_tokens: int,
        on_close: Callable[[CacheSequenceV1], None],
    ) -> None:
        self.prompt = prompt
        self.admission = admission
        self.closed = False
        self._tree = tree
        self._ascending = ascending
        self._contiguous = ascending[0].contiguous
        self.block_size = block_size
        self._one_token = max_new_tokens == 1
        # Whether the engine of the 1.2 line computes the prompt in one step more than it needs.
        self._split = False
        self._reuse = matcher is not None
        self._on_close = on_close
        self._keys = chop(prompt.tokens, block_size)
        self._receiving = False
        #: Blocks of the prompt that came by transfer, with holes in sliding windows.
        self._received_blocks = 0
        self.tables: list[list[int]] = [[] for _ in ascending]
        #: Per window: block -> the page that is held.
        self.pages: list[list[Page | None]] = [[] for _ in ascending]
        #: Per window: whole blocks that were reused. A window may have more than all the others.
        self._reused = [0] * len(ascending)
        # Per window: blocks from the first on that the sequence has let go of, or never had.
        self._front = [0] * len(ascending)
        # Per window: block -> a page that has slid out, as it was then. Only contiguous windows store those.
        self._slid_out: list[dict[int, tuple[Page, int]]] = [{} for _ in ascending]
        self.cached_tokens = self._begin(matcher)
        self.computed_tokens = self.reserved_tokens = self.cached_tokens

    def reserve(self, upto_tokens: int) -> None:
        """See :meth:`..api.CacheSequence.reserve`.

        The pages of the prompt are there since the beginning. Before pages for a generated token are taken,
        what that token does not see is let go.
        """
        self._check_running()
        self.admission.check_step(self.computed_tokens, upto_tokens)
        if upto_tokens > len(self.prompt.tokens):
            self._let_go_of_stale(self.computed_tokens)
        blocks = -(-upto_tokens // self.block_size)
        for window in self._ascending:
            self._take(window, blocks)
        self.reserved_tokens = max(self.reserved_tokens, upto_tokens)

    def advance(self, n_tokens: int) -> None:
        """See :meth:`..api.CacheSequence.advance`."""
        self._check_running()
        check_computed(n_tokens, self.reserved_tokens - self.computed_tokens)
        prompt_len = len(self.prompt.tokens)
        in_prompt = self.computed_tokens < prompt_len
        self.computed_tokens += n_tokens
        if not in_prompt:
            return
        # The 1.2 line ends a request whose only step gives its last token before it comes to store blocks.
        one_step = n_tokens == prompt_len - self.cached_tokens and not self._split
        if not (self._contiguous and self._one_token and one_step):
            self._store_context()

    def reserve_transfer(self) -> tuple[range, ...]:
        """See :meth:`..api.CacheSequence.reserve_transfer`."""
        self._check_running()
        if self.reserved_tokens != self.cached_tokens or self.computed_tokens != self.cached_tokens:
            raise InvariantError(
                "a transfer is possible only right after opening, but something was reserved or computed"
            )
        self._receiving = True
        tokens = len(self.prompt.tokens)
        self._let_go_of_stale(tokens)
        lacking = [range(0)] * len(self._ascending)
        for window in self._ascending:
            g = window.index
            first = max(self._reused[g], self._stale_end(window, tokens))
            lacking[g] = range(first, len(self._keys))
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
            path = self._tree.insert(self.prompt.cache_salt, chop(tokens[:usable], self.block_size))
        for window in self._ascending:
            window.store(path, self._own(window), self._received_blocks)
            for page in reversed(self.pages[window.index]):
                if page is not None:
                    window.pool.release(page, first=page.node is None and not self._contiguous)
            self.pages[window.index].clear()
            self.tables[window.index].clear()
        if path:
            self._tree.prune(path[-1])
        self._on_close(self)

    def _begin(self, matcher: Matcher | None) -> int:
        """Hold what can be reused, take the other pages of the prompt; how many tokens every window has."""
        if matcher is None:
            for window in self._ascending:
                self._take(window, len(self._keys))
            return 0
        return self._reuse_one_by_one(matcher) if self._contiguous else self._reuse_together(matcher)

    def _reuse_together(self, matcher: Matcher) -> int:
        """Hold what each window has, the widest first, before a page is taken: none of it is lost."""
        windows = self._ascending[::-1]
        reused = matcher.match(windows, *self.prompt)
        for window, found in zip(windows, reused, strict=True):
            for page in [*found.pages, found.part]:
                if page is not None:
                    window.pool.hold(page)
        for window, found in zip(windows, reused, strict=True):
            part = found.part
            takes_over = part is not None and window.can_take_over(part, held=1)
            for page in found.pages:
                if page is not None:
                    window.onboard(page)
            self._have_whole(window, found.pages)
            if part is not None and takes_over:
                window.take_over(part)
                self._have(window, part)
            elif part is not None:
                self._have(window, window.copy_held(part))
            self._take(window, len(self._keys))
        return reused[-1].tokens

    def _reuse_one_by_one(self, matcher: Matcher) -> int:
        """Hold block after block, the smallest window first: to bring one back may cost a later one."""
        tokens, most = len(self.prompt.tokens) - 1, 0
        for window in self._ascending:
            found = matcher.in_window(window, *self.prompt, tokens)
            tokens, part = 0, found.part
            for page in found.pages:
                if page is None or page.node is None:
                    part = None
                    break
                window.pool.hold(page)
                window.onboard(page)
                self._have_whole(window, [page])
                tokens += self.block_size
            if part is not None and part.node is not None:
                tokens = found.tokens
                if window.can_take_over(part, held=0):
                    window.pool.hold(part)
                    window.take_over(part)
                    self._have(window, part)
                else:
                    self._have(window, window.copy(part))
            most = max(most, tokens)
            self._take(window, len(self._keys))
        # The engine's first step is as long as if all windows had what the first one has, and leaves a rest.
        self._split = 0 < tokens < most
        return tokens

    def _have_whole(self, window: Window, pages: Sequence[Page | None]) -> None:
        """Lengthen the window's table by whole blocks that are held, or holes."""
        for page in pages:
            self._have(window, page)
        self._reused[window.index] += len(pages)

    def _have(self, window: Window, page: Page | None) -> None:
        """Lengthen the window's table by one page that is held."""
        self.pages[window.index].append(page)
        self.tables[window.index].append(_NO_PAGE if page is None else page.slot.page)

    def _take(self, window: Window, blocks: int) -> None:
        """Make the window's table ``blocks`` long."""
        for block in range(len(self.tables[window.index]), blocks):
            page = window.take()
            page.used = page.used or block < len(self._keys)
            self._have(window, page)

    def _store_context(self) -> None:
        """Let the prompt's blocks be reused, as far as it is computed.

        Until the prompt is done the last computed token does not count. Windows that slide wait for the end
        in the 1.2 line; since then those wait that began with a hole.
        """
        if not self._reuse:
            return
        usable = self.computed_tokens
        if self._split or (usable < len(self.prompt.tokens) and not self._contiguous):
            usable -= 1
        path = self._tree.insert(self.prompt.cache_salt, self._keys[: max(usable, 0) // self.block_size])
        for window in reversed(self._ascending):
            if self._contiguous and window.spec.window_size is not None:
                continue
            if not self._contiguous and not self._received_blocks and None in self.pages[window.index]:
                continue
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
            for block in range(self._front[g], end):
                page = self.pages[g][block]
                if page is None:
                    continue
                # A transfer starts behind a block of which only the beginning was reused.
                if self._contiguous and (block + 1) * self.block_size <= self.computed_tokens:
                    self._slid_out[g][block] = (page, page.life)
                window.pool.release(page)
                self.pages[g][block] = None
                self.tables[g][block] = _NO_PAGE
            self._front[g] = max(self._front[g], end)

    def _stale_end(self, window: Window, computed_tokens: int) -> int:
        return window.spec.stale_end(computed_tokens, self.block_size)

    def _check_running(self) -> None:
        if self.closed:
            raise InvariantError("a closed sequence is used")
        if self._receiving:
            raise InvariantError("a sequence computes while its blocks are transferred: receive or close it")
