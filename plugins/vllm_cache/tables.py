"""The blocks that one sequence holds in one cache group. Needs the pool, no I/O."""

from __future__ import annotations

from collections.abc import Sequence

from .families import Family, Keeping, Recurrent
from .pool import Block, Entry, Pool, Range


class Written:
    """The tokens of a sequence and the names of its prefixes, as its tables read them.

    :ivar tokens: prompt and answer so far.
    :ivar prompt_len: how many of them are the prompt.
    :ivar names: of its prefixes so far, the first one at the end of the first unit.
    """

    def __init__(self, tokens: list[int], prompt_len: int, names: list[int], lookahead: int) -> None:
        self.tokens = tokens
        self.prompt_len = prompt_len
        self.names = names
        self.lookahead = lookahead

    def stretch(self, first: int, end: int, size: int, ends: Sequence[int], unit: int) -> Range:
        """What an event says of the blocks from ``first`` to ``end``, of ``size`` tokens each.

        :param ends: where the blocks that are named end, in tokens.
        """
        start = first * size
        ahead = [self.tokens[each : each + self.lookahead] for each in ends] if self.lookahead else None
        return Range(
            parent=self.names[start // unit - 1] if start else None,
            names=[self.names[each // unit - 1] for each in ends],
            tokens=self.tokens[start : end * size],
            block_size=size,
            ahead=ahead,
        )


class Table:
    """Blocks of one sequence in a group of layers that are no states."""

    def __init__(self, family: Family, group_id: int, pool: Pool) -> None:
        self._family = family
        self._group_id = group_id
        self._pool = pool
        self._blocks: list[Block | None] = []
        #: Leading blocks that are through with being entered, whether they were or not.
        self._entered = 0

    def adopt(self, blocks: Sequence[Block | None], length: int) -> None:
        """Hold what was found of the prompt, as far as the next token can see it."""
        unseen = max(0, self._family.stale(length)) // self._family.size
        seen = list(blocks[unseen:])
        self._pool.hold(seen)
        self._blocks = [*(None for _ in range(unseen)), *seen]
        self._entered = len(self._blocks)

    def let_go(self, computed: int) -> None:
        """Give back what no later token sees."""
        unseen = min(max(0, self._family.stale(computed)) // self._family.size, len(self._blocks))
        freed = []
        for index in range(unseen - 1, -1, -1):
            if self._blocks[index] is None:
                break
            freed.append(self._blocks[index])
            self._blocks[index] = None
        self._pool.release(freed)

    def grow(self, upto: int, spare: int) -> None:
        """Have blocks for the first ``upto`` tokens and ``spare`` ones behind them."""
        missing = -(-(upto + spare) // self._family.size) - len(self._blocks)
        self._blocks += self._pool.take(max(0, missing))

    def enter(self, written: Written, upto: int, keeping: Keeping) -> None:
        """Let lookups find the blocks of the first ``upto`` tokens."""
        family = self._family
        whole = min(upto, len(written.names) * family.unit) // family.size
        if whole > self._entered:
            self._enter_whole(written, self._entered, whole, keeping)
            self._entered = whole
        self._enter_tail(written, upto)

    def _enter_whole(self, written: Written, first: int, end: int, keeping: Keeping) -> None:
        family, ends = self._family, []
        for index in range(first, end):
            block = self._blocks[index]
            if block is None or not family.keeps(index, keeping):
                continue
            self._pool.evict(block)  # it may have been found by the end of the prompt, which lies inside it
            ends.append((index + 1) * family.size)
            entry = Entry(self._group_id, family.name(written.names, index))
            self._pool.enter(block, entry, ends[-1])
        self._pool.announce(self._group_id, written.stretch(first, end, family.size, ends, family.unit))

    def _enter_tail(self, written: Written, upto: int) -> None:
        """Enter a block by the end of the prompt, where that lies inside it; no lookup ever uses it."""
        family = self._family
        if family.size == family.unit or type(family) is not Family:
            return
        limit = written.prompt_len if family.drops else written.prompt_len - 1
        end = min(limit // family.unit, len(written.names)) * family.unit
        if 0 < end <= upto and end % family.size and end // family.size < len(self._blocks):
            self._enter_by(written, self._blocks[end // family.size], end)

    def _enter_by(self, written: Written, block: Block | None, end: int) -> None:
        """Let lookups find ``block`` by the prefix of ``end`` tokens."""
        unit = self._family.unit
        entry = Entry(self._group_id, written.names[end // unit - 1])
        if block is None or entry in block.entries:
            return
        if block.entries and block.end < end:
            self._pool.evict(block)
        self._pool.enter(block, entry, end)
        place = end // unit
        self._pool.announce(self._group_id, written.stretch(place - 1, place, unit, [end], unit))

    def end(self) -> None:
        """Give everything back, the last blocks to be taken first."""
        self._pool.release(reversed(self._blocks))
        self._blocks = []


class StateTable(Table):
    """States of one sequence: one before the step, one after it, and none between.

    :param scratch: blocks behind the last state that are for states after drafts.
    """

    def __init__(self, family: Recurrent, group_id: int, pool: Pool, scratch: int) -> None:
        super().__init__(family, group_id, pool)
        self._scratch = scratch
        self._begun = False

    def let_go(self, computed: int) -> None:
        unseen = min(max(0, self._family.stale(computed)) // self._family.size, len(self._blocks))
        self._pool.release(reversed(self._blocks[:unseen]))
        self._blocks[:unseen] = [None] * unseen

    def grow(self, upto: int, spare: int) -> None:
        blocks, scratch, had = self._blocks, self._scratch, len(self._blocks)
        begun, self._begun = self._begun, True
        # Drafts are computed with the step; those that will be drafted behind them have no states.
        state = -(-(upto + max(0, spare - scratch)) // self._family.size) - 1
        if state + 1 + scratch <= had:
            return
        blocks += [None] * (state - had)
        for index in range(had - scratch, min(had, state)) if begun else ():
            blocks.append(blocks[index])
            blocks[index] = None
        blocks += self._pool.take(state + 1 + scratch - len(blocks))

    def _enter_tail(self, written: Written, upto: int) -> None:
        family = self._family
        if upto <= 0 or upto != last_state(written.prompt_len, family.unit, family.drops, written.lookahead):
            return
        block = self._blocks[upto // family.size - 1]
        if block is not None and block.end != upto:
            self._enter_by(written, block, upto)


def last_state(tokens: int, unit: int, drops: bool, lookahead: int) -> int:
    """The deepest prefix of a prompt at which vLLM keeps a state, a multiple of ``unit``."""
    if drops:
        return max(0, tokens // unit * unit - unit)
    return max(0, (tokens - max(1, lookahead)) // unit * unit)
