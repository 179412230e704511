"""A rank run forward: what is queued there gets its turn, one after the other. Pure.

Only what differs from the rank's memory is kept here, so that looking ahead costs as much as what is ahead.
Prompts are computed in the order in which they came, each as far as a step goes; running ones first. So when
a prompt's turn comes, all before it are computed. For one that finds no room, running requests end, those
that have run for the longest time first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

from vswa_plugin.blocks.memory import TRTLLM_V2, VLLM
from vswa_plugin.forecast.books import Books
from vswa_plugin.forecast.requests import Request, in_order_of_release, key_of


class _Turn:
    """A request as it goes on.

    :ivar tables: per group: block -> its key, None for one without a name.
    :ivar edges: prefixes before which sparse groups keep a window.
    """

    def __init__(
        self, request: Request, computed: int, tables: list[dict[int, int | None]], edges: tuple[int, ...]
    ) -> None:
        self.request = request
        self.computed = computed
        self.tables = tables
        self.edges = edges


class Future:
    """What the rank holds later.

    :ivar stored: blocks that it does not hold now, and will.
    :ivar evicted: blocks that it holds now, and will not.
    """

    def __init__(self, memory: Books) -> None:
        self._memory = memory
        self._shape = memory.shape
        self.stored: set[int] = set()
        self.evicted: set[int] = set()
        #: Key -> running requests that hold it; of those that are not in it, the memory knows.
        self._users = dict(memory.users)
        #: Per pool: blocks that are free now, from the front on; those that come free later; and the empty.
        self._fronts = [iter(pool) for pool in memory.free]
        self._left = [len(pool) for pool in memory.free]
        self._later: list[deque[int]] = [deque() for _ in memory.free]
        #: Key -> how often it is among the later ones; copies as in the memory.
        self._free_later: dict[int, int] = {}
        self._copies = dict(memory.copies)
        self._generated_blocks = 1 << 40  # beyond what the memory counts of such keys
        self._touched: set[int] = set()
        self._empty = [memory.empty(pool) for pool in range(len(memory.free))]
        self._unlimited = [memory.size(pool) == 0 for pool in range(len(memory.free))]
        self._turns = [self._going_on(request) for request in memory.running.values()]

    def holds(self, group_index: int, name: int) -> bool:
        """Whether the group will hold the block."""
        key = key_of(group_index, name)
        if key in self.evicted:
            return False
        return key in self.stored or self._memory.holds(group_index, name)

    def run(self) -> None:
        """All that runs has its prompt computed, and so has all that waits."""
        for turn in list(self._turns):
            self._compute(turn)
        for request in self._memory.waiting.values():
            self.admit(request)

    def admit(self, request: Request) -> None:
        """It has its turn: it holds what it reuses, and its prompt is computed."""
        while True:
            cached, needed = self._needed(request)
            if all(self._room(pool) >= count for pool, count in enumerate(needed)) or not self._end_one():
                break
        # Where prompts part, a window is kept that no prompt before has kept.
        edges = (request.prompt_len - 1, max(cached, self._reach(request)))
        turn = _Turn(request, cached, [{} for _ in self._shape.groups], edges)
        for group in self._shape.groups:
            for block in range(group.first_seen(cached), cached // group.size):
                key = key_of(group.index, request.names[(block + 1) * group.stride - 1])
                self._hold(key, group.pool)
                turn.tables[group.index][block] = key
        self._turns.append(turn)
        self._compute(turn)

    def _going_on(self, request: Request) -> _Turn:
        tables: list[dict[int, int | None]] = []
        for index, blocks in request.spans(self._shape):
            table = request.tables[index]
            tables.append({block: table.get(block) for block in blocks})
        return _Turn(request, request.tokens(self._shape), tables, (request.prompt_len - 1,))

    def _needed(self, request: Request) -> tuple[int, list[int]]:
        """What it reuses, and the blocks that must be free in each pool for it, reused ones included."""
        shape = self._shape
        cached = shape.score(request.names, request.prompt_len, self.holds) if request.reads_cache else 0
        cached = cached // shape.unit * shape.unit
        needed = [0] * len(shape.sizes)
        for group in shape.groups:
            needed[group.pool] += group.most(request.prompt_len, shape.step_tokens)
            for block in range(group.first_seen(cached), cached // group.size):
                key = key_of(group.index, request.names[(block + 1) * group.stride - 1])
                needed[group.pool] -= self._users.get(key, 0) > 0
        return cached, needed

    def _compute(self, turn: _Turn) -> None:
        """Its prompt is computed, step by step."""
        request, shape = turn.request, self._shape
        while turn.computed < request.prompt_len:
            end = min(request.prompt_len, turn.computed + shape.step_tokens)
            if shape.eviction == VLLM:
                self._let_go(turn)
            for group in shape.groups:
                for block in range(group.blocks(turn.computed), group.blocks(end)):
                    self._take(group.pool)
                    turn.tables[group.index][block] = self._entered(turn, group.index, block)
            turn.computed = end
            if shape.eviction != VLLM:
                self._let_go(turn)

    def _entered(self, turn: _Turn, group_index: int, block: int) -> int | None:
        """The key of a block that is computed; None: it cannot be found by another prompt."""
        request, group = turn.request, self._shape.groups[group_index]
        if (
            self._shape.eviction == TRTLLM_V2
            and block * group.size < request.prompt_len < (block + 1) * group.size
        ):
            self._generated_blocks += 1
            return -self._generated_blocks  # the rest of a prompt is kept like a block
        if (block + 1) * group.size > request.prompt_len or not self._kept(turn, group_index, block):
            return None
        name = request.names[(block + 1) * group.stride - 1]
        key = key_of(group_index, name)
        if self.holds(group_index, name):
            if self._shape.eviction != VLLM:  # its own copy goes, and the one that is there is used
                self._empty[group.pool] += 1
                self._hold(key, group.pool)
            else:
                users = self._users.get(key, 0)
                self._users[key] = users + 1
                if users:
                    self._copies[key] = self._copies.get(key, 0) + 1
            return key
        self.evicted.discard(key)
        self.stored.add(key)
        self._users[key] = self._users.get(key, 0) + 1
        return key

    def _kept(self, turn: _Turn, group_index: int, block: int) -> bool:
        group, aligned = self._shape.groups[group_index], self._shape.layout.block_size
        trailing = group.trailing
        if trailing is None or self._memory.dense[group_index]:
            return True
        ends = (edge // aligned * aligned // group.size for edge in turn.edges)
        return any(end - trailing <= block < end for end in ends)

    def _reach(self, request: Request) -> int:
        """The tokens of a prompt that groups which read everything hold, but for its last one."""
        if not request.reads_cache:
            return 0
        reach = request.prompt_len - 1
        for group in self._shape.groups:
            if not group.windowed:
                names = request.names[group.stride - 1 :: group.stride]
                held = next(
                    (i for i, name in enumerate(names) if not self.holds(group.index, name)), len(names)
                )
                reach = min(reach, held * group.size)
        return reach

    def _let_go(self, turn: _Turn) -> None:
        for group in self._shape.groups:
            if group.windowed:
                table, first = turn.tables[group.index], group.first_seen(turn.computed)
                for block in sorted((block for block in table if block < first), reverse=True):
                    self._release(group.index, table.pop(block))

    def _end_one(self) -> bool:
        """The request that nothing was heard of for the longest time ends; False: none can."""
        done = (each for each in self._turns if each.computed >= each.request.prompt_len)
        turn = min(done, key=lambda each: each.request.heard or 1 << 60, default=None)
        if turn is None:
            return False
        self._turns.remove(turn)
        self._pass_time()
        self._give_back(turn)
        return True

    def end(self, key: Hashable) -> None:
        """The request ends, for whoever knows the order of the ends; one that does not run does nothing."""
        for turn in [each for each in self._turns if each.request.key == key]:
            self._turns.remove(turn)
            self._give_back(turn)

    def _give_back(self, turn: _Turn) -> None:
        for index, block, _ in in_order_of_release(turn.tables, self._shape):
            self._release(index, turn.tables[index][block])

    def _pass_time(self) -> None:
        """Until one of those that run ends, each generates its share of what an answer is in the mean."""
        steps = round(self._memory.answer / (len(self._turns) + 1))
        for turn in list(self._turns):
            before, turn.computed = turn.computed, turn.computed + steps
            if before < turn.request.prompt_len:
                turn.computed = before
                continue
            self._let_go(turn)
            for group in self._shape.groups:
                for block in range(group.blocks(before), group.blocks(turn.computed)):
                    if not self._take_or_give_up(group.pool):
                        return
                    turn.tables[group.index][block] = self._generated(group.index)

    def _take_or_give_up(self, pool: int) -> bool:
        if self._empty[pool] > 0:
            self._empty[pool] -= 1
            return True
        return self._unlimited[pool] or self._evict_one(pool)

    def _generated(self, group_index: int) -> int | None:
        """The key of a block of an answer, which no prompt here will ask for."""
        if not self._memory.dense[group_index] or self._shape.eviction == TRTLLM_V2:
            return None
        self._generated_blocks += 1
        return -self._generated_blocks

    # -- blocks ------------------------------------------------------------------------------------------

    def _room(self, pool: int) -> int:
        if self._unlimited[pool]:
            return 1 << 60
        return self._empty[pool] + self._left[pool] + len(self._later[pool])

    def _hold(self, key: int, pool: int) -> None:
        """A request holds what it has found."""
        users = self._users.get(key, 0)
        self._users[key] = users + 1
        if users:
            return
        if later := self._free_later.pop(key, 0):
            self._later[pool].remove(key)
            if later > 1:
                self._free_later[key] = later - 1
        else:
            self._touched.add(key)
            self._left[pool] -= 1

    def _release(self, group_index: int, key: int | None) -> None:
        pool = self._shape.groups[group_index].pool
        if key is None:
            self._empty[pool] += 1
            return
        left = self._users.get(key, 0) - 1
        if left > 0:
            self._users[key] = left
        else:
            self._users.pop(key, None)
        copies = self._copies.pop(key, 0)
        if copies > 1:
            self._copies[key] = copies - 1
        if copies or left <= 0:
            self._later[pool].append(key)
            self._free_later[key] = self._free_later.get(key, 0) + 1

    def _take(self, pool: int) -> None:
        """One block of the pool; what lies there longest unused is evicted."""
        if self._unlimited[pool]:
            return
        while True:
            if self._empty[pool] > 0:
                self._empty[pool] -= 1
                return
            if self._evict_one(pool) or not self._end_one():
                return

    def _evict_one(self, pool: int) -> bool:
        """The next free block is emptied; False: there is none."""
        for key, _, youngest in self._fronts[pool]:
            if key in self._touched and youngest:
                continue
            self._left[pool] -= 1
            if youngest:
                self._lose(key)
            return True
        if not self._later[pool]:
            return False
        key = self._later[pool].popleft()
        count = self._free_later.pop(key) - 1
        if count:
            self._free_later[key] = count
        self._lose(key)
        return True

    def _lose(self, key: int) -> None:
        """A copy is emptied; the last one takes the block along."""
        if not self._users.get(key, 0) and key not in self._free_later:
            self.stored.discard(key)
            self.evicted.add(key)
