"""Which cache group an event is of: by its layer group id (manager V2), or by its window (manager V1). Pure.

The engine's windows count, not those that were declared: memory can make them smaller, look-ahead larger, and
windows that become equal share one pool. They come with ``created`` events, one per pool and all before any
block, and with every other event where those are lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vswa_plugin.blocks import CacheLayout
from vswa_plugin.errors import ProtocolError

from . import fields


class Groups:
    """The cache groups of one rank, as declared and as the engine's events say.

    :ivar windows: group id -> window in tokens as far as it is known; None: global.
    """

    def __init__(self, layout: CacheLayout) -> None:
        self.windows = {group.group_id: group.window_size for group in layout.groups}
        self._declared = set(self.windows.values())
        self._sliding = {group_id for group_id, window in self.windows.items() if window is not None}
        self._block_size = layout.block_size
        #: As events gave them; the global group's is a number here.
        self._announced: dict[int, int] = {}
        self._closed = False

    def group_of(self, raw: Mapping[str, Any], where: str, *, created: bool) -> int:
        """Group id of an event; :attr:`windows` learns from it.

        :param created: whether the event may bring a group that was not declared.
        :raises ProtocolError: it names no group that is known.
        """
        group_id = fields.optional_integer(raw, "layer_group_id", where)
        window = fields.optional_integer(raw, "window_size", where)
        if group_id is None:
            group_id = self._by_window(window, where, created=created)
        elif group_id not in self.windows and not created:
            raise ProtocolError(f"{where}: expected a layer_group_id of {self._described()}, got {group_id}")
        if window is not None and self._announced.get(group_id) != window:
            self._announced[group_id] = window
            self._settle()
        self.windows.setdefault(group_id, None)
        return group_id

    def close(self) -> None:
        """All ``created`` events have come: declared groups without one do not exist."""
        if self._announced and not self._closed:
            self._closed = True
            self.windows = {
                group_id: w for group_id, w in self.windows.items() if group_id in self._announced
            }
            self._settle()

    def _settle(self) -> None:
        """Only the widest group is global, and only where no real window is as wide.

        One that was declared to slide is not the widest before all others are known. Once they are, the
        widest is where the global layers are, whatever memory has made of their window.
        """
        widest = max(self._announced.values())
        all_known = self.windows.keys() <= self._announced.keys()
        for group_id, window in self._announced.items():
            joined = self._closed and None in self._declared
            is_global = window == widest and (joined or self._is_global(window))
            waits = group_id in self._sliding and not all_known
            self.windows[group_id] = None if is_global and not waits else window

    def _by_window(self, window: int | None, where: str, *, created: bool) -> int:
        if window is None and len(self.windows) == 1:
            return next(iter(self.windows))
        if window is not None:
            group_id = self._announced_with(window)
            if group_id is None:
                group_id = self._unclaimed_for(window)
            if group_id is None and created:
                group_id = max(self.windows) + 1
            if group_id is None:
                group_id = self._global_for(window)
            if group_id is not None:
                return group_id
        raise ProtocolError(
            f"{where}: expected a layer_group_id or the window_size of {self._described()}, "
            f"got window_size {window}"
        )

    def _announced_with(self, window: int) -> int | None:
        return next((group_id for group_id, size in self._announced.items() if size == window), None)

    def _unclaimed_for(self, window: int) -> int | None:
        """A declared group that the engine has not named yet: of that window, else global, else clamped."""
        free = {group_id: w for group_id, w in self.windows.items() if group_id not in self._announced}
        wanted = None if self._is_global(window) else window
        for group_id, declared in free.items():
            if declared == wanted:
                return group_id
        # A window that memory clamped is smaller than declared, and still made of whole blocks.
        wider = {w: group_id for group_id, w in free.items() if w is not None and w > window}
        return wider[min(wider)] if wider and window % self._block_size == 0 else None

    def _global_for(self, window: int) -> int | None:
        if not self._is_global(window):
            return None
        return next((group_id for group_id, w in self.windows.items() if w is None), None)

    def _is_global(self, window: int) -> bool:
        """The engine gives a global group its longest sequence for a window: more than any real window."""
        return None in self._declared and all(w is None or window > w for w in self._declared)

    def _described(self) -> str:
        return " or ".join(f"{i} (window {'global' if w is None else w})" for i, w in self.windows.items())
