"""The cache manager: admits sequences, matches their prompts, keeps what they computed for reuse.

The rules are those of TensorRT-LLM's KV cache manager V2 for whole blocks. What a prompt can reuse is
found by walking the pages of the manager's own token tree, so that a router's prediction from events can
be compared with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vswa_plugin.errors import ConfigError, InvalidRequest

from .check import check_store
from .events import EventLog
from .sequence import Admission, CacheSequence
from .spec import GroupSpec
from .store import BlockStore


class CacheManager:
    """Blocks of all cache groups of one engine rank. Used from the engine's thread, except :meth:`stats`.

    :param groups: windows and pool sizes; block tables come in this order.
    :param block_size: tokens per block, in all groups.
    :param max_seq_len: longest sequence in tokens; events give it as the window of a global group.
    :param event_buffer_max_size: events kept between two flushes; 0 turns events off.
    :param enable_block_reuse: False: every block is gone when its sequence closes.
    :param max_chunk_tokens: most tokens of one sequence that are computed in one step.
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
        max_chunk_tokens: int = 512,
    ) -> None:
        _check_settings(groups, block_size, max_seq_len, max_chunk_tokens)
        self._groups = tuple(groups)
        self._block_size = block_size
        self._max_seq_len = max_seq_len
        self._max_chunk_tokens = max_chunk_tokens
        windows = [(g.group_id, g.window_size or max_seq_len) for g in self._groups]
        self._log = EventLog(windows, event_buffer_max_size)
        self._store = BlockStore(self._groups, block_size, self._log, enable_block_reuse)
        self._open: set[CacheSequence] = set()
        self._reserved = [0] * len(self._groups)

    def check_fits(self, prompt_len: int, max_new_tokens: int) -> None:
        """Return if a request of that many tokens could run, were it alone.

        :raises InvalidRequest: it never can; says which limit and the numbers.
        """
        if prompt_len < 1 or max_new_tokens < 1:
            raise InvalidRequest(
                f"expected a prompt and an output of at least one token each, got {prompt_len} prompt tokens "
                f"and max_tokens {max_new_tokens}"
            )
        total = prompt_len + max_new_tokens
        request = f"{prompt_len} prompt tokens and up to {max_new_tokens} output tokens"
        if total > self._max_seq_len:
            raise InvalidRequest(
                f"{request} make {total}, but a sequence has at most {self._max_seq_len}; "
                "shorten the prompt or lower max_tokens"
            )
        for group, held in zip(self._groups, self._admission(total).held, strict=True):
            if held > group.num_blocks:
                raise InvalidRequest(
                    f"{request} need {held} blocks of {self._block_size} tokens in the pool of window "
                    f"{group.label}, which has {group.num_blocks}; shorten the prompt, lower max_tokens or "
                    "give the KV cache more blocks"
                )

    def open(
        self, prompt: Sequence[int], max_new_tokens: int, cache_salt: str | None = None
    ) -> CacheSequence | None:
        """Admit a sequence and hold the blocks that it reuses; None while there is no room for it.

        Room is counted for the most pages that each open sequence can ever hold, reused ones included, so
        that one which runs never has to wait or stop for lack of pages.

        :raises InvalidRequest: as :meth:`check_fits`.
        """
        self.check_fits(len(prompt), max_new_tokens)
        admission = self._admission(len(prompt) + max_new_tokens)
        reserved = [have + more for have, more in zip(self._reserved, admission.held, strict=True)]
        if any(total > group.num_blocks for total, group in zip(reserved, self._groups, strict=True)):
            return None
        self._reserved = reserved
        sequence = CacheSequence(self._store, tuple(prompt), cache_salt, admission, self._closed)
        self._open.add(sequence)
        return sequence

    def flush_events(self) -> list[dict[str, Any]]:
        """TensorRT-LLM event dicts since the last call, in order; call it once per engine step."""
        return self._log.flush()

    def resident(self) -> dict[int, set[int]]:
        """Hashes of the blocks held for reuse, by group id: what all events so far add up to."""
        return {
            group.group_id: {node.hash for node in pool.nodes if node is not None and node.hash is not None}
            for group, pool in zip(self._groups, self._store.pools, strict=True)
        }

    def stats(self) -> dict[str, float]:
        """Gauges ``blocks_used_<window>``, ``blocks_free_...`` and ``blocks_droppable_...``; any thread.

        The window is in tokens, or ``global``. ``kv_events_dropped`` counts events lost to a full buffer.
        """
        gauges: dict[str, float] = {"kv_events_dropped": float(self._log.dropped)}
        for group, pool in zip(self._groups, self._store.pools, strict=True):
            for state, count in pool.counts().items():
                name = f"blocks_{state}_{group.label}"
                gauges[name] = gauges.get(name, 0.0) + count
        return gauges

    def check(self) -> None:
        """Verify every invariant; slow, for tests and bug reports.

        :raises InvariantError: names the first one that does not hold.
        """
        check_store(self._store, self._open, self._reserved)

    def _admission(self, total_tokens: int) -> Admission:
        held = [g.most_held(total_tokens, self._block_size, self._max_chunk_tokens) for g in self._groups]
        return Admission(total_tokens, self._max_chunk_tokens, tuple(held))

    def _closed(self, sequence: CacheSequence) -> None:
        self._open.discard(sequence)
        for g, held in enumerate(sequence.admission.held):
            self._reserved[g] -= held


def _check_settings(
    groups: Sequence[GroupSpec], block_size: int, max_seq_len: int, max_chunk_tokens: int
) -> None:
    sizes = {"block_size": block_size, "max_seq_len": max_seq_len, "max_chunk_tokens": max_chunk_tokens}
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"KV cache: expected {name} of at least 1, got {size}")
    ids = [group.group_id for group in groups]
    if not ids or len(set(ids)) != len(ids):
        raise ConfigError(f"KV cache: expected at least one cache group and each id once, got ids {ids}")
    for group in groups:
        if group.num_blocks < 1:
            raise ConfigError(
                f"KV cache, window {group.label}: expected a block at least, got {group.num_blocks}"
            )
        if group.window_size is not None and (group.window_size < 1 or group.window_size % block_size):
            raise ConfigError(
                f"KV cache, cache group {group.group_id}: expected a window that is a multiple of the "
                f"block size ({block_size} tokens), got {group.window_size}; choose a tokens_per_block "
                "that divides it"
            )
