"""What manager V1's events leave out about its chains of blocks, recovered from the rest. Pure.

* A ``stored`` event goes on behind blocks that were there already, so that a block's parent need not be the
  one before it. The hash shows it: it is that of the block's tokens behind its parent.
* In the 1.2 line a block that is removed takes all below it along in its window, and only it is announced.
"""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

from vswa_plugin.engine import EngineHash

from .fields import Stored, StoredBlock
from .hashing import block_key

#: Blocks looked at for a parent. Beyond that the block is left out: an under-estimate.
MAX_SEARCHED = 256


class Run(NamedTuple):
    """Blocks of which each hangs on the one before, the first one on ``parent_hash``."""

    parent_hash: EngineHash | None
    blocks: list[StoredBlock]


class Chains:
    """What each window of one rank holds, and what hangs on what. As large as what is held."""

    def __init__(self) -> None:
        self._parents: dict[int, dict[EngineHash, EngineHash | None]] = {}
        self._children: dict[EngineHash | None, set[EngineHash]] = {}
        #: Whether a hash was ever what we make of its tokens; before, one that is not says nothing.
        self._proven = False

    def clear(self) -> None:
        """What is held is not known any more."""
        self._parents.clear()
        self._children.clear()

    def store(self, group_id: int, run: Run) -> None:
        parent = run.parent_hash
        held = self._parents.setdefault(group_id, {})
        for block in run.blocks:
            held[block.hash] = parent
            self._children.setdefault(parent, set()).add(block.hash)
            parent = block.hash

    def remove(self, group_id: int, block_hash: EngineHash, *, with_descendants: bool) -> list[EngineHash]:
        """What a window has lost with that block, itself first; it may be unknown."""
        lost = [block_hash]
        if with_descendants:
            held = self._parents.get(group_id, {})
            for block in lost:  # grows while it is walked
                lost += [child for child in self._children.get(block, ()) if child in held]
        for block in lost:
            self._forget(group_id, block)
        return lost

    def verified(self, group_id: int, stored: Stored, *, strict: bool) -> tuple[list[Run], int]:
        """The blocks of an event as runs, and how many of them could be named.

        :param strict: take a hash that is not that of its tokens as unnamed even if none ever was: LoRA and
            plain requests cannot be told apart otherwise.
        """
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
        held = self._parents.get(group_id, {})
        candidates: list[EngineHash | None] = [supposed]
        for candidate in candidates:  # grows while it is walked
            if not isinstance(candidate, str) and _is_named(block, candidate, stored.lora_id):
                self._proven = True
                return True, candidate
            room = MAX_SEARCHED - len(candidates)
            if room > 0:
                below = (child for child in self._children.get(candidate, ()) if child in held)
                candidates += islice(below, room)
        return False, supposed

    def _forget(self, group_id: int, block_hash: EngineHash) -> None:
        held = self._parents.get(group_id, {})
        if block_hash not in held:
            return
        parent = held.pop(block_hash)
        if any(block_hash in other for other in self._parents.values()):
            return
        siblings = self._children.get(parent, set())
        siblings.discard(block_hash)
        if not siblings:
            self._children.pop(parent, None)


def _is_named(block: StoredBlock, parent: int | None, lora_id: int | None) -> bool:
    return block.hash == block_key(block.token_ids, parent, lora_id)
