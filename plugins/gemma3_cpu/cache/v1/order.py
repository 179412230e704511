"""The order in which a C++ hash table goes through its entries. Pure.

Of several blocks that share equally much of a prompt, TensorRT-LLM takes the first one that its table of
child blocks comes to: a ``std::unordered_map`` of libstdc++, whose order follows from the hashes and from
what was put in when. Entries of one bucket lie together, the youngest first, and so do the buckets.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..hashing import block_key

#: How many buckets the table has: each time it is full it takes the next number.
_BUCKETS = (13, 29, 59, 127, 257, 541, 1109, 2357, 5087, 10273, 20753, 42043, 85229, 172933, 351061, 712697)


class TableOrder:
    """Keys, the tokens of blocks, in the order of such a table."""

    def __init__(self) -> None:
        # Not placed yet: where there is but one, its place does not matter.
        self._single: tuple[int, ...] | None = None
        self._size = 0
        self._growths = 0
        #: Bucket -> its keys; the first ones of the table are last.
        self._buckets: dict[int, list[tuple[int, ...]]] = {}

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        if self._single is not None:
            yield self._single
        for bucket in reversed(self._buckets):
            yield from reversed(self._buckets[bucket])

    def add(self, key: tuple[int, ...]) -> None:
        """Put in a key that is not there."""
        self._size += 1
        if self._size == 1:
            self._single = key
            return
        if self._single is not None:
            self._place(self._single)
            self._single = None
        if self._size > _BUCKETS[self._growths] and self._growths + 1 < len(_BUCKETS):
            moved = list(self)
            self._growths += 1
            self._buckets.clear()
            for each in moved:
                self._place(each)
        self._place(key)

    def remove(self, key: tuple[int, ...]) -> None:
        """Take out a key that is there."""
        self._size -= 1
        if key == self._single:
            self._single = None
            return
        bucket = self._bucket_of(key)
        keys = self._buckets[bucket]
        keys.remove(key)
        if not keys:
            del self._buckets[bucket]

    def _place(self, key: tuple[int, ...]) -> None:
        self._buckets.setdefault(self._bucket_of(key), []).append(key)

    def _bucket_of(self, key: tuple[int, ...]) -> int:
        return block_key(key, None) % _BUCKETS[self._growths]
