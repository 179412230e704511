"""Blocks of a pool that no request holds, in the order in which they are evicted. Pure.

They lie in batches, of blocks that came free together. The batch that came first goes first; but where an
engine evicts from another one, that is the one that was first in truth, and it is put there.

An engine may have a block several times: it computes what it holds again where other groups have lost theirs.
Lookups find one of the copies, here taken to be the youngest; the others take their turn without an event.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator


class FreeBlocks:
    """Free blocks, by keys, those that were unused for the longest time first."""

    def __init__(self) -> None:
        #: Batch -> key -> index of its group.
        self._batches: OrderedDict[int, dict[int, int]] = OrderedDict()
        #: Key -> the youngest batch that has it.
        self._youngest: dict[int, int] = {}
        self._last = 0
        self._count = 0

    def __len__(self) -> int:
        """Copies included."""
        return self._count

    def __contains__(self, key: int) -> bool:
        return key in self._youngest

    def __iter__(self) -> Iterator[tuple[int, int, bool]]:
        """Key, index of its group, and whether the block is lost with it, in the order of eviction."""
        for batch, keys in self._batches.items():
            for key, group_index in keys.items():
                yield key, group_index, self._youngest.get(key) == batch

    def begin(self) -> None:
        """What comes free from now on does so together."""
        self._last += 1

    def add(self, key: int, group_index: int) -> None:
        """A block comes free now: it is the last to be evicted."""
        batch = self._batches.setdefault(self._last, {})
        self._count += batch.pop(key, None) is None
        batch[key] = group_index
        self._youngest[key] = self._last

    def take(self, key: int) -> bool:
        """A request holds the youngest copy from now on; False: there is none."""
        number = self._youngest.pop(key, None)
        if number is None:
            return False
        self._drop(number, [key])
        return True

    def evicted(self, key: int) -> bool:
        """The block is gone, and with it the copies that lie before it; False: it was not here."""
        number = self._youngest.get(key)
        if number is None:
            return False
        self._batches.move_to_end(number, last=False)
        gone = []
        for other in self._batches[number]:
            if other == key:
                break
            if self._youngest.get(other) != number:
                gone.append(other)
        del self._youngest[key]
        self._drop(number, [*gone, key])
        return True

    def forget_copies(self, count: int) -> int:
        """Copies of which so many must be gone, the oldest first; how many there were."""
        wanted = count
        for number, keys in list(self._batches.items()):
            if count <= 0:
                break
            gone = [key for key in keys if self._youngest.get(key) != number][:count]
            count -= len(gone)
            self._drop(number, gone)
        return wanted - count

    def clear(self, group_index: int) -> None:
        """The group holds nothing any more."""
        for number, keys in list(self._batches.items()):
            gone = [key for key, index in keys.items() if index == group_index]
            for key in gone:
                if self._youngest.get(key) == number:
                    del self._youngest[key]
            self._drop(number, gone)

    def _drop(self, number: int, keys: list[int]) -> None:
        batch = self._batches[number]
        for key in keys:
            del batch[key]
        self._count -= len(keys)
        if not batch:
            del self._batches[number]
