"""The one pool of blocks that all cache groups of a vLLM rank take from, and its KV events. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

from vswa_plugin.errors import InvariantError

#: A KV event as vLLM encodes it, fields at their default left out.
Event: TypeAlias = dict[str, Any]


class Entry(NamedTuple):
    """What a lookup finds: one prefix in one cache group."""

    group_id: int
    name: int


class Block:
    """One block of the pool.

    :ivar users: sequences that hold it.
    :ivar entries: under which lookups find it; the first is that of its own end.
    :ivar end: tokens of the prefix that the first entry names.
    """

    __slots__ = ("end", "entries", "users")

    def __init__(self) -> None:
        self.users = 0
        self.entries: list[Entry] = []
        self.end = 0


class Range(NamedTuple):
    """What one ``BlockStored`` event is about.

    :ivar parent: name of the prefix before ``tokens``; None at the root.
    :ivar names: of the blocks that are stored, which may be fewer than the tokens cover.
    :ivar ahead: per name: the tokens after it that are part of it; None: names have no lookahead.
    """

    parent: int | None
    names: list[int]
    tokens: list[int]
    block_size: int
    ahead: list[list[int]] | None


class Pool:
    """Blocks are free or held. A free one keeps its entries until it is taken for something else.

    Free blocks are taken from the front. One without an entry returns to the front, one with an entry to the
    back, so that the entries unused for the longest time are evicted first.

    :param blocks: how many there are; vLLM's own number is one more, since one of its blocks is never used.
    :param described: group id -> fields of ``BlockStored`` that describe the group.
    :param events: False: none are kept.
    """

    def __init__(self, blocks: int, described: dict[int, Event], events: bool) -> None:
        self.blocks = blocks
        # Free blocks, in the order in which they are taken: without an entry, the last one first; those never
        # taken yet; with an entry.
        self._emptied: list[Block] = []
        self._fresh = blocks
        self._kept: OrderedDict[Block, None] = OrderedDict()
        self.entries: dict[Entry, OrderedDict[Block, None]] = {}
        self._described = described
        self._events: list[Event] | None = [] if events else None

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._emptied) + self._fresh + len(self._kept)

    def find(self, group_ids: Sequence[int], name: int) -> tuple[Block, ...] | None:
        """The block of that name in each of the groups; None where one of them has none."""
        firsts = []
        for group_id in group_ids:
            blocks = self.entries.get(Entry(group_id, name))
            if not blocks:
                return None
            firsts.append(next(iter(blocks)))
        return tuple(firsts)

    def take(self, count: int) -> list[Block]:
        """So many free blocks; their entries are evicted.

        :raises InvariantError: there are fewer; what is admitted must fit.
        """
        if count > self.free:
            raise InvariantError(f"expected {count} free blocks, got {self.free}")
        taken = [self._next() for _ in range(count)]
        for block in taken:
            self.evict(block)
            block.users = 1
        return taken

    def _next(self) -> Block:
        if self._emptied:
            return self._emptied.pop()
        if self._fresh:
            self._fresh -= 1
            return Block()
        return self._kept.popitem(last=False)[0]

    def hold(self, blocks: Iterable[Block | None]) -> None:
        """One more sequence holds each of the blocks."""
        for block in blocks:
            if block is None:
                continue
            if block.users == 0:
                del self._kept[block]
            block.users += 1

    def release(self, blocks: Iterable[Block | None]) -> None:
        """One holder less of each; those without any become free, the first ones to be taken first."""
        for block in blocks:
            if block is None:
                continue
            block.users -= 1
            if block.users == 0 and block.entries:
                self._kept[block] = None
            elif block.users == 0:
                self._emptied.append(block)

    def enter(self, block: Block, entry: Entry, end: int) -> None:
        """Let lookups find ``block`` under ``entry``, besides what it is found under already."""
        if entry in block.entries:
            return
        if not block.entries:
            block.end = end
        block.entries.append(entry)
        self.entries.setdefault(entry, OrderedDict())[block] = None

    def evict(self, block: Block) -> None:
        """No lookup finds ``block`` any more."""
        for entry in self._leave(block):
            if self._events is not None:
                self._events.append(
                    {
                        "type": "BlockRemoved",
                        "block_hashes": [entry.name],
                        "medium": "GPU",
                        "group_idx": entry.group_id,
                    }
                )

    def reset(self) -> None:
        """No lookup finds anything any more; blocks that are free stay where they are in their order."""
        for blocks in self.entries.values():
            for block in blocks:
                block.entries, block.end = [], 0
        self.entries.clear()
        if self._events is not None:
            self._events.append({"type": "AllBlocksCleared"})

    def _leave(self, block: Block) -> list[Entry]:
        entries, block.entries, block.end = block.entries, [], 0
        for entry in entries:
            blocks = self.entries[entry]
            del blocks[block]
            if not blocks:
                del self.entries[entry]
        return entries

    def announce(self, group_id: int, stored: Range) -> None:
        """Add a ``BlockStored`` event."""
        if self._events is None:
            return
        event: Event = {
            "type": "BlockStored",
            "block_hashes": stored.names,
            "parent_block_hash": stored.parent,
            "token_ids": stored.tokens,
            "block_size": stored.block_size,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
        }
        if stored.names:
            event["extra_keys"] = [None] * len(stored.names)
        event["group_idx"] = group_id
        event.update(self._described[group_id])
        if stored.ahead is not None:
            event["lookahead_token_ids"] = stored.ahead
        self._events.append(event)

    def take_events(self) -> list[Event]:
        """Events since the last call, in order."""
        if self._events is None:
            return []
        events, self._events = self._events, []
        return events

    def check(self) -> None:
        """:raises InvariantError: a free block is held, or the entries of blocks and pool differ."""
        for block in (*self._emptied, *self._kept):
            if block.users:
                raise InvariantError("a free block is held")
        for entry, blocks in self.entries.items():
            if not blocks or any(entry not in block.entries for block in blocks):
                raise InvariantError(f"the pool has an entry of group {entry.group_id} that no block has")
