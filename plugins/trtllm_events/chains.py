"""What manager V1's events leave out about its chains of blocks, recovered from the rest. Pure.

* A ``stored`` event goes on behind blocks that were there already, so that a block's parent need not be the
  one before it. The hash shows it: it is that of the block's tokens behind its parent.
* In the 1.2 line a block that is removed takes all below it along in its window, and only it is announced.
"""

from __future__ import annotations

from typing import NamedTuple

from vswa_plugin.engine import EngineHash, ParentLinks

from .fields import Stored, StoredBlock
from .hashing import names
from .searches import Searches


class Run(NamedTuple):
    """Blocks of which each hangs on the one before, the first one on ``parent_hash``."""

    parent_hash: EngineHash | None
    blocks: list[StoredBlock]


class Chains:
    """What each window of one rank holds, and what hangs on what. As large as what is held.

    No ring is ever stored (:class:`~vswa_plugin.engine.ParentLinks`), so the walks here end.
    """

    def __init__(self) -> None:
        self._held: dict[int, ParentLinks] = {}
        #: Whether a hash was ever what we make of its tokens; before, one that is not says nothing.
        self._proven = False
        self._searches = Searches()

    def clear(self) -> None:
        """What is held is not known any more."""
        self._held.clear()

    def holds(self, group_id: int, block_hash: EngineHash) -> bool:
        held = self._held.get(group_id)
        return held is not None and block_hash in held.parents

    def store(self, group_id: int, run: Run, where: str) -> None:
        """:raises ProtocolError: a block would hang on itself."""
        names = [block.hash for block in run.blocks]
        self._held.setdefault(group_id, ParentLinks()).add(run.parent_hash, names, where)

    def remove(self, group_id: int, block_hash: EngineHash, *, with_descendants: bool) -> list[EngineHash]:
        """What a window has lost with that block, itself first; it may be unknown."""
        held = self._held.get(group_id)
        if held is None:
            return [block_hash]
        lost = held.with_descendants(block_hash) if with_descendants else [block_hash]
        for block in lost:
            held.discard(block)
        return lost

    def anchored(self, group_id: int, runs: list[Run]) -> list[Run]:
        """Those of an event's runs that begin a prompt or hang on what the window is known to hold.

        In the 1.2 line a window holds all blocks before one that it stores. Where those are not known, as
        after a loss, it is not known either which removal takes the new ones along: they are left out.
        """
        held = self._held.get(group_id)
        before = {} if held is None else held.parents
        anchored: list[Run] = []
        new: set[EngineHash] = set()
        for run in runs:
            if run.parent_hash is None or run.parent_hash in before or run.parent_hash in new:
                anchored.append(run)
                new.update(block.hash for block in run.blocks)
        return anchored

    def verified(self, group_id: int, stored: Stored, *, strict: bool) -> tuple[list[Run], int]:
        """The blocks of an event as runs, and how many of them could be named.

        :param strict: take a hash that is not that of its tokens as unnamed even if none ever was: LoRA and
            plain requests cannot be told apart otherwise.
        """
        self._searches.begin()
        runs: list[Run] = []
        parent = stored.parent_hash
        for index, block in enumerate(stored.blocks):
            is_known, actual = self._parent_of(group_id, block, parent, stored)
            if not is_known and (strict or self._proven):
                return runs, index
            if runs and actual == parent:
                runs[-1].blocks.append(block)
            else:
                runs.append(Run(actual, [block]))
            parent = block.hash
        return runs, len(stored.blocks)

    def _parent_of(
        self, group_id: int, block: StoredBlock, supposed: EngineHash | None, stored: Stored
    ) -> tuple[bool, EngineHash | None]:
        """Whether the block's parent is known, and that parent: ``supposed`` or a block below it."""
        if supposed is None and stored.cache_salt is not None:
            return True, supposed  # the salt's number is not known here
        held = self._held.get(group_id)
        below = {} if held is None else held.children
        shown, actual = self._searches.from_top(
            supposed,
            lambda above: below.get(above, ()),
            lambda parent: names(block.hash, block.token_ids, parent, stored.lora_id),
        )
        self._proven = self._proven or shown
        return shown, actual
