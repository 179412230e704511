"""All pages of one rank, on the device and on the host: what a cache manager moves and a transfer copies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..cache.api import DEVICE, Slot
from ..model.config import Gemma3Config
from ..model.tensors import Float32
from .pools import CachePlan


class PageStore:
    """Keys and values of one rank in float32; the model reads it as a ``KVStore``.

    Cache groups that draw from one pool share its array: their pages are distinct. A cache group that keeps
    the blocks of several windows of the model has all their layers in one page.

    :param shared: cache groups by index, those that draw from one pool together.
    """

    def __init__(self, config: Gemma3Config, plan: CachePlan, shared: Sequence[Sequence[int]]) -> None:
        self.block_size = plan.pools[0].group.block_size
        self._shape = (config.num_key_value_heads, config.head_dim)
        #: Per cache group and level: [2 (keys, values), layers, kv_heads, pages * block_size, head_dim].
        self._levels: dict[int, tuple[Float32, Float32]] = {}
        for groups in shared:
            members = [plan.pools[group] for group in groups]
            device = self._new(members[0].layers, sum(pool.num_blocks for pool in members))
            host = self._new(members[0].layers, sum(pool.host_blocks for pool in members))
            for group in groups:
                self._levels[group] = (device, host)
        self.k: list[Float32] = []
        self.v: list[Float32] = []
        windows = config.windows()
        for window in config.groups:
            group = next(i for i, pool in enumerate(plan.pools) if window in pool.model_windows)
            inside = plan.pools[group].model_windows
            first = sum(windows.count(other) for other in inside[: inside.index(window)])
            layers = slice(first, first + windows.count(window))
            keys, values = self._levels[group][DEVICE][:, layers]
            self.k.append(keys)
            self.v.append(values)

    def move(self, group: int, source: Slot, target: Slot, /) -> None:
        """Copy one page, all its layers; see :class:`.cache.api.PageMover`."""
        self._page(group, target)[...] = self._page(group, source)

    def read_page(self, group: int, page: int) -> Float32:
        """A copy of one page on the device: [2, layers, kv_heads, block_size, head_dim]."""
        return self._page(group, Slot(DEVICE, page)).copy()

    def write_page(self, group: int, page: int, content: Float32) -> None:
        """Fill one page on the device with what :meth:`read_page` gave."""
        self._page(group, Slot(DEVICE, page))[...] = content

    def page_shape(self, group: int) -> tuple[int, ...]:
        """Of what :meth:`read_page` gives."""
        heads, dim = self._shape
        return (2, self._levels[group][DEVICE].shape[1], heads, self.block_size, dim)

    def _new(self, layers: int, pages: int) -> Float32:
        heads, dim = self._shape
        return np.zeros((2, layers, heads, pages * self.block_size, dim), dtype=np.float32)

    def _page(self, group: int, slot: Slot) -> Float32:
        first = slot.page * self.block_size
        return self._levels[group][slot.level][:, :, :, first : first + self.block_size]
