"""Blocks that some group holds and whose place in a sequence an event gave, or a computed name. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vswa_plugin.engine import EngineBlock, EngineHash, ring_closed


class Namespace(NamedTuple):
    """What keeps equal tokens apart."""

    cache_salt: str | None
    lora_name: str | None


class Named(NamedTuple):
    """A block of which the place in its sequence is known."""

    parent_hash: EngineHash | None
    block: EngineBlock
    namespace: Namespace


class NamedBlocks:
    """Only blocks of which some group has a copy, so that the host knows all that are :meth:`sure`.

    A block is sure where its parent is the root, or sure itself. The host may know the parent of another one
    all the same: it remembers blocks that no group holds any more.

    :ivar unsure: the others, and those that are not named at all.
    :ivar fresh: those of ``unsure`` that came since this list was cleared.
    """

    def __init__(self) -> None:
        self.unsure: dict[EngineHash, None] = {}
        self.fresh: list[EngineHash] = []
        self._named: dict[EngineHash, Named] = {}
        #: How many of these hang on a block, named or not.
        self._below: dict[EngineHash | None, int] = {}

    def get(self, name: EngineHash) -> Named | None:
        return self._named.get(name)

    def __contains__(self, name: EngineHash) -> bool:
        return name in self._named

    def sure(self, name: EngineHash) -> bool:
        return name in self._named and name not in self.unsure

    def hold(self, name: EngineHash) -> None:
        """A group holds that block."""
        if name not in self._named:
            self._doubt(name)

    def _doubt(self, name: EngineHash) -> None:
        if name not in self.unsure:
            self.unsure[name] = None
            self.fresh.append(name)

    def hang(self, block: EngineBlock, parent: EngineHash | None, namespace: Namespace) -> bool:
        """Note where a block lies; whether that is news. A block that is sure stays where it is."""
        name = block.hash
        if self.sure(name):
            return False
        known, sure = self._named.get(name), parent is None or self.sure(parent)
        if known is not None:
            if known.parent_hash == parent and not sure:
                return False
            self._unhang(known)
        self._named[name] = Named(parent, block, namespace)
        self._below[parent] = self._below.get(parent, 0) + 1
        if sure:
            self.unsure.pop(name, None)
        else:
            self._doubt(name)
        return known is None or sure

    def forget(self, name: EngineHash) -> None:
        """No group holds the block any more."""
        self.unsure.pop(name, None)
        named = self._named.pop(name, None)
        if named is not None:
            self._unhang(named)

    def clear(self) -> None:
        self.unsure.clear()
        self.fresh.clear()
        self._named.clear()
        self._below.clear()

    def _unhang(self, named: Named) -> None:
        parent = named.parent_hash
        left = self._below[parent] - 1
        if left:
            self._below[parent] = left
        else:
            del self._below[parent]

    def check_rings(self, parent: EngineHash | None, names: Sequence[EngineHash]) -> None:
        """Refuse a chain below ``parent`` that has a block of it among its own parents.

        So no ring is ever stored, and every walk up from a block ends. Only a block that something hangs on
        already can close one, as where a child came before its parent; then the walk is made once for all.

        :raises ProtocolError: nothing was changed.
        """
        known, before = self._named, parent
        if self._below.keys().isdisjoint(names):
            return
        for name in names:
            if name not in known or known[name].parent_hash != before:
                break
            before = name
        else:
            return
        self._walk(parent, dict.fromkeys(names, 0), 0, set())
        places = {name: index for index, name in enumerate(names)}
        seen: set[EngineHash] = set()
        for index, name in enumerate(names):
            held = known.get(name)
            if held is not None and name not in self.unsure:  # it stays where it is
                self._walk(held.parent_hash, places, index, seen)

    def _walk(
        self, name: EngineHash | None, places: dict[EngineHash, int], index: int, seen: set[EngineHash]
    ) -> None:
        """Up from ``name``: no block may come there whose place is at ``index`` or behind it."""
        start = name
        while name is not None and name not in seen:
            place = places.get(name)
            if place is not None:
                if place >= index:
                    raise ring_closed("BlockStored", name, start)
                return
            seen.add(name)
            named = self._named.get(name)
            name = None if named is None else named.parent_hash
