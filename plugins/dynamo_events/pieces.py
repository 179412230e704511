"""Blocks of the projection's tree, cut out of announced blocks of any size. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, TypeAlias

from vswa_plugin.blocks import block_hashes, sequence_hashes
from vswa_plugin.engine import BlocksStored, EngineHash, Node

from .grid import Grid
from .tree import Block, Space, Tree, packed

#: (token ids, tokens of a unit, cache salt, LoRA) -> block hashes of the units
UnitHasher: TypeAlias = Callable[[Sequence[int], int, str | None, str | None], list[int]]


def plain_hashes(
    token_ids: Sequence[int], unit: int, cache_salt: str | None, lora_name: str | None
) -> list[int]:
    """A hasher that knows plain text alone: others get names that are not theirs, and are left out."""
    return block_hashes(token_ids, unit)


class _End(NamedTuple):
    """Where an announced block ends: behind a block of the tree, or the root, and so many tokens more."""

    above: int | None
    tail: tuple[int, ...]


_ROOT = _End(None, ())


class Pieces:
    """Where announced blocks end, from which later ones go on.

    :param spare: ends that are no blocks of the tree are kept up to this number.
    """

    def __init__(self, spare: int, hasher: UnitHasher) -> None:
        self._hasher = hasher
        self._spare = spare
        self._ends: dict[EngineHash, _End] = {}

    def __len__(self) -> int:
        return len(self._ends)

    def clear(self) -> None:
        self._ends.clear()

    def cut(self, tree: Tree, grid: Grid, stored: BlocksStored, nodes: Sequence[Node]) -> Iterator[Block]:
        """The blocks whose tokens have become known, parents first.

        What goes on from a block that was forgotten stays unknown until that one is announced again.
        """
        end = _ROOT if stored.parent_hash is None else self._ends.get(stored.parent_hash)
        space = (stored.cache_salt, stored.lora_name)
        for node, announced in zip(nodes, stored.blocks, strict=False):
            if end is None or (end.above is not None and end.above not in tree.blocks):
                return
            end, blocks = self._cut(tree, grid, end, announced.token_ids, node.sequence_hash, space)
            yield from blocks
            if end is not None:
                self._ends[announced.hash] = end

    def _cut(
        self, tree: Tree, grid: Grid, end: _End, token_ids: tuple[int, ...], name: int, space: Space
    ) -> tuple[_End | None, list[Block]]:
        """Where the tokens behind ``end`` end, and the blocks that they complete; None: not as named."""
        above = None if end.above is None else tree.blocks[end.above]
        position = -1 if above is None else above.position
        tokens, unit, start, known = end.tail + token_ids, grid.unit, 0, []
        names = sequence_hashes(self._hasher(tokens, unit, *space), end.above)
        if not names or names[-1] != name or len(tokens) % unit:
            return None, []
        for at, each in enumerate(names, 1):
            if not grid.has(position + at):
                continue
            block = tree.add(each, position + at, above, grid.nothing)
            if block.tokens is None:
                block.tokens = packed(tokens[start : at * unit])
                block.space = space if any(space) else None
                known.append(block)
            above, start = block, at * unit
        return _End(None if above is None else above.sequence_hash, tokens[start:]), known

    def trim(self, tree: Tree) -> None:
        """Forget where blocks end that the tree has forgotten, and of the others that are none the oldest."""
        if len(self._ends) <= 2 * len(tree.blocks) + 2 * self._spare:
            return
        kept = {key: end for key, end in self._ends.items() if end.above is None or end.above in tree.blocks}
        odd = [key for key, end in kept.items() if end.tail]
        for key in islice(odd, max(0, len(odd) - self._spare)):
            del kept[key]
        self._ends = kept
