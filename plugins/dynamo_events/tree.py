"""The prefixes that one rank has been told of, as a tree of blocks. No rule, no I/O.

Every block hangs below one whose position is less. So there is no ring, whatever events say, and walks
up end at the root.

A block is kept while it is resident, while others hang below it, and for a while longer: what comes back
without its tokens, as after a loss of events, can then still be published.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import TypeAlias

from vswa_plugin.errors import InvariantError

#: (cache salt, LoRA) of a block whose tokens alone do not name it.
Space: TypeAlias = tuple[str | None, str | None]

#: Bit 0 of :attr:`Block.held` says that the tokens are known; the cache groups follow.
KNOWN = 1


class Block:
    """One block of one prefix: what lies between the one before, or the root, and its end.

    :attr:`position` is the index of the hash unit in which it ends.
    :attr:`state` has, per bit of :attr:`held`, how far back the run of held blocks goes that ends here.
    :attr:`below` counts the children that are to be published; :attr:`published` is what Dynamo was told.
    """

    __slots__ = (
        "below",
        "boundary",
        "first_child",
        "held",
        "next_sibling",
        "parent",
        "position",
        "previous_sibling",
        "published",
        "sequence_hash",
        "space",
        "state",
        "tokens",
    )

    def __init__(self, sequence_hash: int, position: int, state: tuple[int, ...]) -> None:
        self.sequence_hash = sequence_hash
        self.position = position
        self.state = state
        self.held = 0
        self.boundary = False
        self.below = 0
        self.published = False
        self.tokens: bytes | None = None
        self.space: Space | None = None
        self.parent: Block | None = None
        # A set of children would take as much memory as all the rest.
        self.first_child: Block | None = None
        self.next_sibling: Block | None = None
        self.previous_sibling: Block | None = None

    @property
    def wanted(self) -> bool:
        """Whether the block is to be published."""
        return self.boundary or self.below > 0

    @property
    def resident(self) -> bool:
        """Whether some group holds it."""
        return self.held > KNOWN

    def above(self, steps: int) -> Block | None:
        """The block so many steps above; None: the root."""
        block: Block | None = self
        for _ in range(steps):
            if block is None:
                break
            block = block.parent
        return block

    def path(self, steps: int) -> Iterable[Block]:
        """So many blocks, of which this is the last."""
        if steps == 1:
            return (self,)
        path = [self]
        while len(path) < steps and (above := path[-1].parent) is not None:
            path.append(above)
        return reversed(path)

    def children(self) -> Iterator[Block]:
        child = self.first_child
        while child is not None:
            yield child
            child = child.next_sibling


class Tree:
    """All blocks by sequence hash.

    :param spare: blocks that nothing holds are kept up to this number more than twice as many as were ever
        resident at once.
    """

    def __init__(self, spare: int) -> None:
        self.blocks: dict[int, Block] = {}
        self.resident = 0
        self._spare = spare
        self._most_resident = 0
        #: Not resident, oldest first; some may have children or be published.
        self._idle: OrderedDict[Block, None] = OrderedDict()

    def add(self, sequence_hash: int, position: int, above: Block | None, state: tuple[int, ...]) -> Block:
        """The block of that name, made and hung below ``above`` as far as that is new.

        A new one counts as in use until :meth:`now_idle`: it is about to be stored.
        """
        block = self.blocks.get(sequence_hash)
        if block is None:
            block = self.blocks[sequence_hash] = Block(sequence_hash, position, state)
        if above is not None and block.parent is None and above.position < block.position:
            self._hang(block, above)
        return block

    def named(self, sequence_hash: int | None, position: int, state: tuple[int, ...]) -> Block | None:
        """The block of that name that ends there, made where there is none; None: that name is another's.

        Of a new one, its own parent comes to light when it is announced itself.
        """
        if sequence_hash is None:
            return None
        block = self.add(sequence_hash, position, None, state)
        return block if block.position == position else None

    def now_resident(self, block: Block) -> None:
        """Some group holds ``block``, which none did."""
        self._idle.pop(block, None)
        self.resident += 1
        self._most_resident = max(self._most_resident, self.resident)

    def now_idle(self, block: Block) -> None:
        """No group holds ``block`` any more."""
        self._idle[block] = None
        self._idle.move_to_end(block)

    def clear(self) -> None:
        """Nothing is resident; the blocks stay."""
        self.resident = 0
        self._idle = OrderedDict.fromkeys(self.blocks.values())

    def forget_all(self) -> None:
        """Blocks of another shape are to come."""
        self.blocks.clear()
        self._idle.clear()
        self.resident = 0

    def trim(self) -> None:
        """Forget what has been idle the longest while there are too many blocks."""
        limit = 2 * self._most_resident + self._spare
        while len(self.blocks) > limit and self._idle:
            block, _ = self._idle.popitem(last=False)
            if not (block.first_child or block.published):
                self._forget(block)

    def check(self) -> None:
        """:raises InvariantError: blocks, their children and the counts do not agree."""
        hung: dict[Block, set[Block]] = {}
        for block in self.blocks.values():
            if block.parent is not None:
                hung.setdefault(block.parent, set()).add(block)
        for block in self.blocks.values():
            listed = list(block.children())
            if set(listed) != hung.pop(block, set()) or len(set(listed)) != len(listed):
                raise InvariantError(f"projection, position {block.position}: wrong list of children")
        if hung:
            raise InvariantError("projection: a block hangs below one that was forgotten")
        resident = sum(block.resident for block in self.blocks.values())
        if resident != self.resident:
            raise InvariantError(f"projection: expected {resident} resident blocks, got {self.resident}")

    def _hang(self, block: Block, parent: Block) -> None:
        block.parent = parent
        block.next_sibling = parent.first_child
        if parent.first_child is not None:
            parent.first_child.previous_sibling = block
        parent.first_child = block

    def _forget(self, block: Block) -> None:
        del self.blocks[block.sequence_hash]
        parent, after, before = block.parent, block.next_sibling, block.previous_sibling
        if after is not None:
            after.previous_sibling = before
        if before is not None:
            before.next_sibling = after
        elif parent is not None:
            parent.first_child = after
        if parent is not None and not (parent.resident or parent.first_child):
            self.now_idle(parent)


def packed(token_ids: Iterable[int]) -> bytes:
    """Four bytes a token.

    :raises OverflowError: a token id is not 0 <= id < 2**32.
    """
    return array("I", token_ids).tobytes()


def unpacked(blocks: Iterable[Block]) -> list[int]:
    """Token ids of consecutive blocks, all of which are known."""
    ids = array("I")
    for block in blocks:
        ids.frombytes(block.tokens or b"")
    return ids.tolist()
