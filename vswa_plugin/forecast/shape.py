"""A layout, its reuse rule and what the engine states of its memory, as numbers. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from vswa_plugin.blocks.layout import CHUNKED, FULL, RECURRENT, SLIDING, CacheGroup, CacheLayout
from vswa_plugin.blocks.memory import TRTLLM_V1, TRTLLM_V2, VLLM, Memory
from vswa_plugin.blocks.reuse import RULES, ReuseRule, rule_named
from vswa_plugin.index.boundaries import boundaries_for

#: The order of eviction of engines that do not state it, by their reuse rule.
_ORDER_OF_RULE = {
    "trtllm_v2": TRTLLM_V2,
    "trtllm_v1": TRTLLM_V1,
    "trtllm_v1_contiguous": TRTLLM_V1,
    "vllm": VLLM,
    "vllm_hybrid": VLLM,
}
#: What engines compute in one step where they do not say it.
DEFAULT_STEP = 2048

#: (index of a group, name) -> whether the group holds the block of that name.
Holds = Callable[[int, int], bool]


class Group:
    """One cache group.

    :ivar index: in the layout.
    :ivar pool: index of the pool that it takes its blocks from.
    :ivar stride: names between two blocks of it.
    """

    __slots__ = ("_chunk", "_kind", "_window", "group_id", "index", "pool", "size", "stride", "windowed")

    def __init__(self, index: int, group: CacheGroup, pool: int, unit: int) -> None:
        self.index = index
        self.group_id = group.group_id
        self.pool = pool
        self.size = group.block_size
        self.stride = group.block_size // unit
        self._kind = group.kind
        self._window = group.window_size or 0
        self._chunk = group.chunk_size or 0
        #: Whether blocks go out of sight while a sequence runs.
        self.windowed = group.kind in (SLIDING, CHUNKED, RECURRENT)

    def first_seen(self, tokens: int) -> int:
        """The first block that the token behind the first ``tokens`` ones can see."""
        if self._kind == SLIDING:
            return max(0, tokens + 1 - self._window) // self.size
        if self._kind == CHUNKED:
            return tokens // self._chunk * self._chunk // self.size
        if self._kind == RECURRENT:
            return max(0, tokens - 1) // self.size
        return 0

    def blocks(self, tokens: int) -> int:
        """Blocks that the first ``tokens`` tokens reach into."""
        return -(-tokens // self.size)

    def most(self, tokens: int, step: int) -> int:
        """Blocks that a sequence of ``tokens`` never exceeds, where a step computes at most ``step``."""
        total = self.blocks(tokens)
        if not self.windowed:
            return total
        seen = {SLIDING: self._window - 1, CHUNKED: self._chunk, RECURRENT: 1}[self._kind]
        return min(total, self.blocks(seen + step) + 1)

    @property
    def trailing(self) -> int | None:
        """Blocks before a boundary that are needed there; None: all."""
        if self._kind == SLIDING:
            return max(1, -(-(self._window - 1) // self.size))
        return 1 if self._kind == RECURRENT else None


class Shape:
    """How a rank's blocks are named, pooled and evicted.

    :param memory: what the engine states; None: nothing.
    :ivar sizes: per pool: its blocks on the device, None where that is not known.
    :raises ConfigError: an unknown rule.
    """

    def __init__(
        self, layout: CacheLayout, memory: Memory | None = None, rules: Mapping[str, ReuseRule] = RULES
    ) -> None:
        self.layout = layout
        self.rule = rule_named(layout.rule, rules)
        self.unit = layout.hash_block_size
        self.memory = memory or Memory()
        stated = self.memory.eviction
        self.eviction = stated if stated is not None else _ORDER_OF_RULE.get(layout.rule)
        #: Groups of one pool share its blocks, and one order of eviction.
        pool_of, self.sizes = self._pools()
        self.groups = tuple(
            Group(index, group, pool_of[group.group_id], self.unit)
            for index, group in enumerate(layout.groups)
        )
        self.by_id = {group.group_id: group for group in self.groups}
        full = [index for index, group in enumerate(layout.groups) if group.kind == FULL]
        #: The groups whose blocks show how far a request is.
        self.telling = frozenset(full or range(len(self.groups)))
        #: Whether boundaries are edges of blocks, at which groups need only some of the blocks before.
        self._simple = layout.plain and self.rule is RULES.get(layout.rule)
        stated_step = self.memory.step_tokens
        self.step_tokens = stated_step if stated_step is not None and stated_step > 0 else DEFAULT_STEP

    def _pools(self) -> tuple[dict[int, int], list[int | None]]:
        pool_of: dict[int, int] = {}
        sizes: list[int | None] = []
        for pool in self.memory.pools:
            pool_of.update(dict.fromkeys(pool.group_ids, len(sizes)))
            sizes.append(pool.blocks)
        missing = [each.group_id for each in self.layout.groups if each.group_id not in pool_of]
        if self.eviction == VLLM and missing and not sizes:  # its groups have one pool in common
            return dict.fromkeys(missing, 0), [None]
        for group_id in missing:
            pool_of[group_id] = len(sizes)
            sizes.append(None)
        return pool_of, sizes

    def score(self, names: Sequence[int], prompt_len: int, holds: Holds) -> int:
        """Cached tokens of a prompt where the groups hold what ``holds`` says."""
        needs = self.rule.needs(self.layout, prompt_len) if self._simple else None
        if needs is None:
            return self._score_any(names, prompt_len, holds)
        deepest = min(self.rule.boundaries(self.layout, prompt_len), len(names))
        boundary = deepest
        for index, trailing in enumerate(needs.trailing):
            if trailing is None:
                boundary = next((b for b in range(boundary) if not holds(index, names[b])), boundary)
        windows = [
            (index, trailing, at_end)
            for index, (trailing, at_end) in enumerate(zip(needs.trailing, needs.at_prompt_end, strict=True))
            if trailing is not None and at_end is not None
        ]
        while boundary:
            at_end = boundary * self.unit >= prompt_len
            missing = -1
            for index, trailing, trailing_at_end in windows:
                first = max(0, boundary - (trailing_at_end if at_end else trailing))
                blocks = range(boundary - 1, first - 1, -1)
                missing = max(missing, next((b for b in blocks if not holds(index, names[b])), -1))
            if missing < 0:
                return self.rule.tokens(self.layout, boundary, prompt_len)
            boundary = missing
        return 0

    def _score_any(self, names: Sequence[int], prompt_len: int, holds: Holds) -> int:
        boundaries = boundaries_for(self.rule, self.layout, prompt_len, len(names))
        masks = [[int(holds(group.index, name)) for name in names] for group in self.groups]
        boundary = boundaries.deepest(masks, 1).get(0, 0)
        return self.rule.tokens(self.layout, boundary, prompt_len) if boundary else 0
