"""What the scheduler needs of a cache manager, whichever rules it keeps its blocks by. Protocols only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

#: Levels of a page, as TensorRT-LLM numbers them.
DEVICE, HOST = 0, 1


class Slot(NamedTuple):
    """Where a page lies: its level, and its number on that level."""

    level: int
    page: int


class PageMover(Protocol):
    """Copies the keys and values of one page, all layers of the group; done when it returns."""

    def __call__(self, group: int, source: Slot, target: Slot, /) -> None:
        """``group`` is an index into the manager's groups."""


def no_pages(group: int, source: Slot, target: Slot, /) -> None:
    """The mover of a manager without a model."""


class CacheSequence(Protocol):
    """One running sequence; used from the engine's thread.

    :ivar cached_tokens: prompt tokens that were reused; may end inside a block; less than the prompt.
    :ivar computed_tokens: tokens whose keys and values are in the pages; starts at ``cached_tokens``.
    :ivar tables: per group, by its index: block index -> page on the device, or -1 where none is held. The
        lists stay the same objects; any call may change any entry.
    """

    cached_tokens: int
    computed_tokens: int

    @property
    def tables(self) -> Sequence[list[int]]: ...

    def reserve(self, upto_tokens: int) -> None:
        """Make pages for positions [computed_tokens, upto_tokens) exist. Never fails within the admission.

        :raises InvariantError: the sequence was admitted for less.
        """

    def advance(self, n_tokens: int) -> None:
        """The next ``n_tokens`` are computed: commit what this rule commits now, let stale blocks go.

        :raises InvariantError: no pages were reserved for them.
        """

    def reserve_transfer(self) -> tuple[range, ...]:
        """Make pages for what a transfer of the whole prompt brings; per group the blocks that are lacking.

        Only right after opening. A global group lacks blocks [cached_tokens // bs, ceil(prompt / bs)) or
        fewer, a sliding one at most those of them that the token after the prompt can see. Until
        :meth:`receive` the pages are the sequence's own: their content may be written from another thread.

        :raises InvariantError: something was computed already.
        """

    def receive(self) -> None:
        """The transfer is there: ``computed_tokens`` is the prompt, which is committed as after a prefill."""

    def close(self, output: Sequence[int] = ()) -> None:
        """Give all pages back; what is committed stays reusable until evicted. Closing twice does nothing.

        :param output: the tokens that were generated, for rules that keep them.
        """


class CacheManager(Protocol):
    """Blocks of all cache groups of one engine rank. Used from the engine's thread, except ``stats``."""

    def check_fits(self, prompt_len: int, max_new_tokens: int) -> None:
        """Return if a request of that many tokens could run, were it alone. From any thread.

        :raises InvalidRequest: it never can; the message names the limit and the numbers.
        """

    def open(
        self, prompt: Sequence[int], max_new_tokens: int, cache_salt: str | None = None
    ) -> CacheSequence | None:
        """Admit a sequence and hold the blocks that it reuses; None while there is no room for it.

        :raises InvalidRequest: as :meth:`check_fits`.
        """

    def flush_events(self) -> list[dict[str, Any]]:
        """TensorRT-LLM event dicts since the last call, in order; call it once per engine step."""

    def resident(self) -> dict[int, dict[int, int]]:
        """By group id: hash of each block held for reuse, partial ones included -> its level.

        What all events so far add up to.
        """

    def stats(self) -> dict[str, float]:
        """Gauges and totals by name; from any thread.

        ``blocks_used_<window>``, ``blocks_free_...``, ``blocks_droppable_...`` and, with a host tier,
        ``blocks_host_...``, where the window is in tokens or ``global``; ``kv_events_dropped``.
        """

    def check(self) -> None:
        """Verify every invariant; slow, for tests and bug reports.

        :raises InvariantError: names the first one that does not hold.
        """
