"""What the two sides of a transfer must agree on, and how a rank's pages go over the wire."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from ..model.config import Gemma3Config
from ..transfer.plan import GroupBlocks, fingerprint
from .managers import cache_groups
from .pages import PageStore
from .pools import CachePlan

_DTYPE = np.dtype(np.float32)


class Contract:
    """One rank's side of it. ``read`` and ``write`` are called from the transfer's threads.

    :param digest: tells apart weights of one shape.
    """

    def __init__(self, config: Gemma3Config, plan: CachePlan, digest: str, store: PageStore) -> None:
        self.groups = cache_groups(plan)
        self._store = store
        self._shapes = [store.page_shape(index) for index in range(len(self.groups))]
        self._block_bytes = [int(np.prod(shape)) * _DTYPE.itemsize for shape in self._shapes]
        self.fingerprint = fingerprint(
            {"config": msgspec.to_builtins(config), "weights": digest},
            # Tells the byte order too.
            _DTYPE.str,
            store.block_size,
            [(g.window_size, size) for g, size in zip(self.groups, self._block_bytes, strict=True)],
        )

    def blocks(self, ranges: Sequence[range]) -> tuple[GroupBlocks, ...]:
        """Blocks of each group with their sizes."""
        return tuple(GroupBlocks(r, size) for r, size in zip(ranges, self._block_bytes, strict=True))

    def visible(self, prompt_len: int) -> list[range]:
        """Per group the blocks that the token after a prompt can see."""
        size = self._store.block_size
        return [range(group.stale_end(prompt_len, size), -(-prompt_len // size)) for group in self.groups]

    def read(self, tables: Sequence[Sequence[int]], group: int, first: int, stop: int) -> memoryview:
        """Raw bytes of blocks [first, stop)."""
        return np.stack([self._store.read_page(group, page) for page in tables[group][first:stop]]).data

    def write(self, tables: Sequence[Sequence[int]], group: int, first: int, data: memoryview) -> None:
        """Fill blocks from ``first`` on."""
        blocks = np.frombuffer(data, _DTYPE).reshape(-1, *self._shapes[group])
        for page, content in zip(tables[group][first : first + len(blocks)], blocks, strict=True):
            self._store.write_page(group, page, content)
