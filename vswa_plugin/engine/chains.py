"""Chains of blocks as events give them: what no engine can hold is refused. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from vswa_plugin.engine.contract import EngineHash
from vswa_plugin.errors import ProtocolError

_EXPECTED = "expected a chain of blocks that each have the one before as parent"


def check_chain(parent: EngineHash | None, names: Sequence[EngineHash], where: str) -> None:
    """Refuse consecutive blocks of which one is its own ancestor: a name stands for a whole prefix.

    :param parent: name of the block before the first one; None: the first one begins a prompt.
    :param where: the event, for the error.
    :raises ProtocolError: a block is its own parent, or comes twice.
    """
    if parent not in names and (len(names) < 2 or len(set(names)) == len(names)):
        return
    seen = {parent}
    before = parent
    for name in names:
        if name in seen:
            how = "as its own parent" if name == before else "again below itself, among its own parents"
            raise ProtocolError(f"{where}: {_EXPECTED}, got block {name!r} {how}")
        seen.add(name)
        before = name


def ring_closed(where: str, name: EngineHash, parent: EngineHash | None) -> ProtocolError:
    """The error for a block that an event stores below ``parent``, which hangs on that block itself."""
    return ProtocolError(
        f"{where}: {_EXPECTED}, got block {name!r} below block {parent!r}, which has it among its own parents"
    )


class ParentLinks:
    """The parents of blocks that are held, in which no ring can be stored: every walk up or down them ends.

    A block may come before its parent. Then a ring can be closed only by a block that has children already,
    and only by a chain below one of them: that is looked for, once for each chain, and refused.
    """

    __slots__ = ("children", "parents")

    def __init__(self) -> None:
        self.parents: dict[EngineHash, EngineHash | None] = {}
        #: The blocks of :attr:`parents` by their parent, in the order in which they came; never empty.
        self.children: dict[EngineHash | None, dict[EngineHash, None]] = {}

    def add(self, parent: EngineHash | None, names: Sequence[EngineHash], where: str) -> None:
        """Hang a chain that :func:`check_chain` takes below ``parent``; a block has its latest parent.

        :raises ProtocolError: a block would be below itself; nothing is changed.
        """
        parents, children = self.parents, self.children
        if parent in names or not children.keys().isdisjoint(names):
            self._check(parent, names, where)
        for name in names:
            if name in parents:
                self._unhang(name)
            parents[name] = parent
            below = children.get(parent)
            if below is None:
                children[parent] = {name: None}
            else:
                below[name] = None
            parent = name

    def discard(self, name: EngineHash) -> None:
        """Forget a block; what hangs on it stays."""
        if name in self.parents:
            self._unhang(name)

    def with_descendants(self, name: EngineHash) -> list[EngineHash]:
        """The block, held or not, and all that hangs on it; each once, since each has one parent."""
        names = [name]
        for each in names:  # grows while it is walked
            names += self.children.get(each, ())
        return names

    def clear(self) -> None:
        self.parents.clear()
        self.children.clear()

    def _check(self, parent: EngineHash | None, names: Sequence[EngineHash], where: str) -> None:
        inside, above = set(names), parent
        while above is not None:
            if above in inside:
                raise ring_closed(where, above, parent)
            above = self.parents.get(above)

    def _unhang(self, name: EngineHash) -> None:
        parent = self.parents.pop(name)
        siblings = self.children[parent]
        del siblings[name]
        if not siblings:
            del self.children[parent]
