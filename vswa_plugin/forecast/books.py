"""Which blocks one rank holds: those of its requests, and free ones in the order of their eviction. Pure."""

from __future__ import annotations

from collections.abc import Hashable

from vswa_plugin.blocks.memory import VLLM
from vswa_plugin.forecast.free import FreeBlocks
from vswa_plugin.forecast.requests import Request, key_of
from vswa_plugin.forecast.shape import Shape


class Books:
    """The blocks and requests of one rank, as far as they are known.

    :ivar free: per pool: blocks that no request holds.
    :ivar users: key -> running requests that hold the block.
    :ivar copies: key -> how often running requests have the block beyond once.
    :ivar dense: per group: whether it keeps every block of a prompt, not only those that end it.
    :ivar highest: per pool: the most blocks that were ever there, for engines that do not state a size.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.free = [FreeBlocks() for _ in shape.sizes]
        self.users: dict[int, int] = {}
        self.copies: dict[int, int] = {}
        self.waiting: dict[Hashable, Request] = {}
        self.running: dict[Hashable, Request] = {}
        self.dense = [not group.windowed or shape.eviction != VLLM for group in shape.groups]
        self.highest = [0] * len(shape.sizes)
        #: Per pool: blocks of which events show nothing, such as second copies of a block.
        self.hidden = [0] * len(shape.sizes)
        #: Tokens that a request generates, in the mean of the last ones.
        self.answer = 0.0
        #: Per pool: whether blocks were evicted since :meth:`calibrate`.
        self.evicted = [False] * len(shape.sizes)
        #: Per pool: whether blocks were ever evicted.
        self.evicts = [False] * len(shape.sizes)

    def holds(self, group_index: int, name: int) -> bool:
        """Whether the group holds the block."""
        key = key_of(group_index, name)
        return key in self.users or key in self.free[self.shape.groups[group_index].pool]

    def size(self, pool: int) -> int:
        """Blocks of a pool, as stated or as the most that were there once it has evicted; 0: unknown."""
        stated = self.shape.sizes[pool]
        if stated is None:
            return self.highest[pool] if self.evicts[pool] else 0
        return stated

    def empty(self, pool: int) -> int:
        """Blocks of a pool that hold nothing; below 0: more is thought to be held than there is."""
        return self.size(pool) - self.held(pool) - len(self.free[pool]) - self.hidden[pool]

    def needed(self, request: Request, cached_tokens: int) -> list[int]:
        """Blocks of each pool that a prompt takes that finds so many tokens cached."""
        needed = [0] * len(self.shape.sizes)
        for group in self.shape.groups:
            cached = cached_tokens // group.size - group.first_seen(cached_tokens)
            needed[group.pool] += group.most(request.prompt_len, self.shape.step_tokens) - cached
        return needed

    def calibrate(self) -> None:
        """An engine evicts where no block is empty: so all that is not accounted for holds something.

        Where more is accounted for than there is, copies are gone that nothing was heard of.
        """
        for pool, evicted in enumerate(self.evicted):
            if evicted and self.shape.sizes[pool] is not None:
                self.hidden[pool] = 0
                empty = self.empty(pool)
                if empty < 0:
                    self.free[pool].forget_copies(-empty)
                else:
                    self.hidden[pool] = empty
            self.evicted[pool] = False

    def held(self, pool: int) -> int:
        """Blocks of a pool that running requests hold."""
        groups = [group.index for group in self.shape.groups if group.pool == pool]
        named: set[int] = set()
        count = 0
        for request in self.running.values():
            for index in groups:
                named.update(request.tables[index].values())
            count += request.unnamed(self.shape)[pool]
        return count + len(named) + sum(self.copies.get(key, 0) for key in named if self.copies)

    def hold(self, request: Request, group_index: int, block: int, key: int, *, computed: bool) -> None:
        """A running request holds a block: one that it has computed, or has found."""
        table = request.tables[group_index]
        if table.get(block) == key:
            return
        table[block] = key
        users = self.users.get(key, 0)
        self.users[key] = users + 1
        if not computed or self.shape.eviction != VLLM:
            self.free[self.shape.groups[group_index].pool].take(key)
        elif users:
            self.copies[key] = self.copies.get(key, 0) + 1

    def release(self, group_index: int, key: int) -> None:
        """One running request less holds the block."""
        left = self.users.get(key, 0) - 1
        if left > 0:
            self.users[key] = left
        else:
            self.users.pop(key, None)
        copies = self.copies.pop(key, 0)
        if copies > 1:
            self.copies[key] = copies - 1
        if copies or left == 0:
            self.free[self.shape.groups[group_index].pool].add(key, group_index)

    def measure(self, pool: int) -> None:
        if self.shape.sizes[pool] is None:
            self.highest[pool] = max(self.highest[pool], self.held(pool) + len(self.free[pool]))
