"""The cache manager V1: admits sequences, matches their prompts, keeps what they computed for reuse.

It does what TensorRT-LLM's C++ manager does: one pool, one queue and one stream of events per window; the
same blocks are reused, taken over, stored, evicted and moved to the host, in the same order and under the
same names. The engine's decision code was transcribed from its sources, statement by statement, and run. On
those traces, of one request at a time, ours reuses as many tokens for each request, and all events are equal.
What differs, because it would give wrong answers or is not in the traces:

* TensorRT-LLM asks each sliding window once, so that a wider one may have a hole where a smaller one resumes
  the prompt. Here they are asked again then.
* The 1.2 line announces a whole prompt after its first chunk; here a block is stored once it is computed.
  It stores at a sequence's end what has slid out even if others took it; here nothing is stored then.
* A block is held while it is copied from the host.
* Names contain the SHA-256 of a cache salt, as manager V2's do; V1's depend on its C++ library.
* A transfer fills only what the next token sees. The blocks before that are let go, and those behind them are
  named by their whole prefix.
* Room is counted for the most pages that each open sequence can ever hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from vswa_plugin.errors import ConfigError

from ..admission import Admission, RequestSize, check_settings
from ..api import PageMover, no_pages
from ..buffer import EventBuffer
from ..spec import GroupSpec
from .check import check_manager
from .events import EventLog
from .match import Matcher
from .sequence import CacheSequenceV1, SaltedPrompt
from .tree import Tree
from .window import Window


class CacheManagerV1:
    """Blocks of all windows of one engine rank; keeps to :class:`~..api.CacheManager`.

    :param groups: windows and pool sizes, each window once; block tables come in this order.
    :param block_size: tokens per block, in all windows.
    :param max_seq_len: longest sequence in tokens; events give it as the window of a global group.
    :param contiguous: reuse rule ``trtllm_v1_contiguous``, of the 1.2 line, instead of ``trtllm_v1``.
    :param event_buffer_max_size: events kept between two flushes; 0 turns events off.
    :param enable_block_reuse: False: every block is gone when its sequence closes.
    :param enable_partial_reuse: whether part of a block may be reused that goes on differently.
    :param max_chunk_tokens: most tokens of one sequence that are computed in one step.
    :param dp_rank: rank that events name; None leaves it out.
    :param mover: copies a page's keys and values.
    :raises ConfigError: sizes that cannot work.
    """

    def __init__(
        self,
        groups: Sequence[GroupSpec],
        block_size: int,
        max_seq_len: int,
        *,
        contiguous: bool,
        event_buffer_max_size: int = 100_000,
        enable_block_reuse: bool = True,
        enable_partial_reuse: bool = True,
        max_chunk_tokens: int = 512,
        dp_rank: int | None = None,
        mover: PageMover = no_pages,
    ) -> None:
        check_settings(groups, block_size, max_seq_len, max_chunk_tokens)
        _check_windows(groups, max_seq_len)
        # A window that every sequence fits in does not slide.
        self._groups = tuple(
            msgspec.structs.replace(g, window_size=None) if g.window_size == max_seq_len else g
            for g in groups
        )
        self._block_size = block_size
        self._max_seq_len = max_seq_len
        self._max_chunk_tokens = max_chunk_tokens
        self._reuse = enable_block_reuse
        windows = {g.group_id: g.window_size or max_seq_len for g in self._groups}
        buffer = EventBuffer(windows, event_buffer_max_size, dp_rank=dp_rank, layer_groups=False)
        self._log = EventLog(buffer, at_once=contiguous)
        self._tree = Tree(len(self._groups), apart=contiguous)
        by_size = sorted(range(len(groups)), key=lambda g: groups[g].window_size or max_seq_len)
        self.windows = [
            Window(g, self._groups[g], self._tree, self._log, mover=mover, contiguous=contiguous)
            for g in by_size
        ]
        self._matcher = Matcher(self._tree, block_size, partial=enable_partial_reuse)
        self._open: set[CacheSequenceV1] = set()
        self._reserved = [0] * len(self._groups)

    def check_fits(self, prompt_len: int, max_new_tokens: int) -> None:
        """See :meth:`..api.CacheManager.check_fits`."""
        size = RequestSize(prompt_len, max_new_tokens)
        size.check(self._max_seq_len)
        for group, held in zip(self._groups, self._admission(size).held, strict=True):
            size.check_pool(held, group.num_blocks, self._block_size, f"window {group.label}")

    def open(
        self, prompt: Sequence[int], max_new_tokens: int, cache_salt: str | None = None
    ) -> CacheSequenceV1 | None:
        """See :meth:`..api.CacheManager.open`.

        Room is counted for the most pages that each open sequence can ever hold, reused ones included, so
        that one which runs never has to wait or stop for lack of pages.
        """
        self.check_fits(len(prompt), max_new_tokens)
        admission = self._admission(RequestSize(len(prompt), max_new_tokens))
        reserved = [have + more for have, more in zip(self._reserved, admission.held, strict=True)]
        if any(total > group.num_blocks for total, group in zip(reserved, self._groups, strict=True)):
            return None
        self._reserved = reserved
        sequence = CacheSequenceV1(
            SaltedPrompt(tuple(prompt), cache_salt),
            self._matcher if self._reuse else None,
            self._tree,
            self.windows,
            admission,
            block_size=self._block_size,
            max_new_tokens=max_new_tokens,
            on_close=self._closed,
        )
        self._open.add(sequence)
        return sequence

    def flush_events(self) -> list[dict[str, Any]]:
        """See :meth:`..api.CacheManager.flush_events`."""
        return self._log.flush()

    def resident(self) -> dict[int, dict[int, int]]:
        """See :meth:`..api.CacheManager.resident`.

        A contiguous window has silently lost what hung on a removed block: events add up to this where what
        hangs on a removed block is taken as gone with it.
        """
        return {
            window.spec.group_id: {
                page.hash: page.slot.level for page in window.pool.pages if page.hash is not None
            }
            for window in self.windows
        }

    def stats(self) -> dict[str, float]:
        """See :meth:`..api.CacheManager.stats`."""
        gauges: dict[str, float] = {"kv_events_dropped": float(self._log.dropped)}
        for window in self.windows:
            counts = window.pool.counts()
            if window.spec.host_blocks:
                counts["host"] = window.pool.on_host
            for state, count in counts.items():
                gauges[f"blocks_{state}_{window.spec.label}"] = float(count)
        return gauges

    def check(self) -> None:
        """See :meth:`..api.CacheManager.check`."""
        check_manager(self.windows, self._tree, self._open, self._reserved)

    def _admission(self, size: RequestSize) -> Admission:
        """A sequence holds the whole prompt in every window until its first token is generated."""
        prompt = -(-size.prompt_len // self._block_size)
        held = [
            max(prompt, g.most_held(size.total, self._block_size, self._max_chunk_tokens))
            for g in self._groups
        ]
        return Admission(size.total, self._max_chunk_tokens, tuple(held))

    def _closed(self, sequence: CacheSequenceV1) -> None:
        self._open.discard(sequence)
        for g, held in enumerate(sequence.admission.held):
            self._reserved[g] -= held


def _check_windows(groups: Sequence[GroupSpec], max_seq_len: int) -> None:
    """What manager V1 asks of windows beside :func:`check_settings`."""
    windows = [group.window_size or max_seq_len for group in groups]
    if len(set(windows)) != len(windows):
        raise ConfigError(
            f"KV cache: expected each window once, because manager V1 tells cache groups apart by it, got "
            f"{sorted(windows)} tokens; join groups of one window"
        )
    for group in groups:
        if group.window_size is not None and group.window_size > max_seq_len:
            raise ConfigError(
                f"KV cache, cache group {group.group_id}: expected a window of at most max_seq_len "
                f"({max_seq_len} tokens), got {group.window_size}; give it as global"
            )
