"""One request of a rank: the names of its prefixes, how far it is, and the blocks that it holds. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence

from vswa_plugin.blocks.memory import TRTLLM_V2
from vswa_plugin.forecast.shape import Shape

_MASK = (1 << 64) - 1
_SALT = 0x9E3779B97F4A7C15


def key_of(group_index: int, name: int) -> int:
    """What stands for the block of that name in that group."""
    return name ^ (group_index * _SALT & _MASK)


def name_of(group_index: int, key: int) -> int:
    """The name of the block that ``key`` stands for."""
    return key_of(group_index, key)


class Request:
    """A request that waits or runs.

    :ivar names: of its prefixes, one a hash unit; of what is generated as far as it is known.
    :ivar computed: its first tokens, of which the blocks are there.
    :ivar tables: per group: block -> its key; blocks without a name are not in it.
    :ivar began: step at which its prompt was computed, by the step clock; None: it is not computed yet.
    :ivar let_go: its first tokens, behind which no block is held that the next of them does not see.
    :ivar heard: when an event of it came last; a running number.
    :ivar sent: step at which it came.
    :ivar reads_cache: whether the engine looks its cache up for it.
    """

    __slots__ = (
        "began",
        "computed",
        "heard",
        "key",
        "let_go",
        "names",
        "prompt_len",
        "reads_cache",
        "sent",
        "tables",
    )

    def __init__(
        self, key: Hashable, names: Sequence[int], prompt_len: int, groups: int, reads_cache: bool = True
    ) -> None:
        self.key = key
        self.names = list(names)
        self.prompt_len = prompt_len
        self.computed = 0
        self.tables: list[dict[int, int]] = [{} for _ in range(groups)]
        self.began: int | None = None
        self.sent = 0
        self.heard = 0
        self.let_go = 0
        self.reads_cache = reads_cache

    def prompt_done(self, shape: Shape) -> bool:
        """Whether all whole blocks of its prompt are computed."""
        return self.computed >= self.prompt_len // shape.unit * shape.unit

    def tokens(self, shape: Shape) -> int:
        """Tokens that have their places in blocks, as far as events show it."""
        return max(self.computed, self.prompt_len) if self.prompt_done(shape) else self.computed

    def spans(self, shape: Shape) -> Iterator[tuple[int, range]]:
        """Index of each group, and the blocks that it holds there, named or not."""
        tokens = self.tokens(shape)
        for group in shape.groups:
            yield group.index, range(group.first_seen(self.let_go), group.blocks(tokens))

    def unnamed(self, shape: Shape) -> list[int]:
        """Per pool: blocks that it holds and that have no name."""
        counts = [0] * len(shape.sizes)
        for index, blocks in self.spans(shape):
            table = self.tables[index]
            counts[shape.groups[index].pool] += sum(block not in table for block in blocks)
        return counts


def in_order_of_release(
    tables: Sequence[Mapping[int, int | None]], shape: Shape
) -> list[tuple[int, int, int | None]]:
    """(index of the group, block, key) in the order in which an engine lets go of them at the end."""
    held = [(index, block, key) for index, table in enumerate(tables) for block, key in table.items()]
    if shape.eviction == TRTLLM_V2:
        held.sort(key=lambda each: (-each[1], -each[0]))
    else:
        held.sort(key=lambda each: (each[0], -each[1]))
    return held
