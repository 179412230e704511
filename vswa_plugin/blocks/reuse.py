"""Reuse rules: how far an engine can resume a prompt, from which blocks each cache group holds. Pure.

A rule knows the *boundaries* of a prompt, counted in blocks, at which its engine could resume, and which
blocks each cache group must then hold. The answer for a prompt is the deepest boundary whose blocks are
all resident. The length of the prompt takes part, because an engine computes at least its last token: eight
full blocks and eight full blocks plus five tokens have equal hashes and differ in what can be reused.

What hashes alone cannot show, because engines also reuse parts of blocks:

* a partial match of some *other* block that ends one token short of its edge: we promise less;
* a repeated prompt of whole blocks whose last block the engine does not match (partial reuse off, 32 or more
  siblings, or a sibling that matches as far and came first): we may promise more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol, TypeAlias, TypeGuard

import msgspec

from vswa_plugin.blocks import hybrid
from vswa_plugin.blocks.hybrid import Need
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.blocks.search import Holds, searches
from vswa_plugin.errors import ConfigError, unknown_choice

#: Which blocks of one prompt a group holds: by index, or a function of it. Beyond the end: not held.
Held: TypeAlias = Callable[[int], bool] | Sequence[bool]


class Needs(msgspec.Struct, frozen=True):
    """How many blocks before a boundary must be resident, per group in the layout's order.

    Blocks are those of the group. Fewer blocks before the boundary: all of them. None: all from block 0.

    :param trailing: at any boundary but the one below.
    :param at_prompt_end: at the boundary at the very end of a prompt that is a whole number of blocks, for
        rules that have such a boundary.
    :param chunks: blocks of a chunk: of the blocks before a boundary only those since the last multiple of it
        are needed, and none at a multiple; None: the group has no chunks. Empty: no group has.
    :param after: blocks behind a boundary that are needed too. Empty: none.
    """

    trailing: tuple[int | None, ...]
    at_prompt_end: tuple[int | None, ...]
    chunks: tuple[int | None, ...] = ()
    after: tuple[int, ...] = ()


class ReuseRule(Protocol):
    """How one family of engines resumes a prompt. Stateless; called from any thread.

    Boundaries are counted in blocks of ``layout.block_size``: at boundary b the blocks [0, b) are behind. A
    boundary at which no group needs any block is never resumable: nothing shows that the engine knows this
    prefix.
    """

    @property
    def name(self) -> str:
        """The name that layouts give for it."""

    @property
    def provenance(self) -> str:
        """How the rule was checked.

        ``run``: against the engine's own core. ``transcribed``: against its decision code, written down from
        the sources statement by statement and run. ``read``: it was taken from the sources, and not run.
        """

    def boundaries(self, layout: CacheLayout, prompt_len: int) -> int:
        """The deepest boundary of a prompt of that many tokens; 0 is always one, and needs nothing.

        :raises ConfigError: the groups of ``layout`` do not have one block size.
        """

    def tokens(self, layout: CacheLayout, boundary: int, prompt_len: int) -> int:
        """Cached tokens of a prompt resumed at ``boundary``: less than ``prompt_len``; 0 at boundary 0."""

    def first_needed(self, group: CacheGroup, boundary: int, prompt_len: int) -> int:
        """Blocks [first_needed, ``boundary``) of ``group`` must be resident."""

    def needs(self, layout: CacheLayout, prompt_len: int) -> Needs | None:
        """The same as numbers, or None where they depend on the boundary.

        :raises ConfigError: the rule cannot be applied to ``layout``.
        """


class HybridRule(ReuseRule, Protocol):
    """A rule for groups whose block sizes differ, or that need other blocks than those before a boundary."""

    def need(self, layout: CacheLayout, group: CacheGroup, boundary: int, prompt_len: int) -> Need:
        """What ``group`` must hold at ``boundary``, in place of :meth:`first_needed`."""


class SearchingRule(HybridRule, Protocol):
    """A rule whose engine searches, in some layouts, so that no list of blocks says what it reuses."""

    def searches(self, layout: CacheLayout) -> bool:
        """Whether that is so in this layout; :meth:`needs` is then None."""

    def search(self, layout: CacheLayout, holds: Holds, prompt_len: int) -> int:
        """The boundary that the search comes to."""


def searching(rule: ReuseRule, layout: CacheLayout) -> SearchingRule | None:
    """The rule, where only its search says what is reused."""
    if not isinstance(rule, VllmHybrid):  # rules of plugins say it by needs
        return None
    return rule if rule.searches(layout) else None


def is_hybrid(rule: ReuseRule) -> TypeGuard[HybridRule]:
    """Whether the rule takes layouts that are not plain."""
    return hasattr(rule, "need")


def check_applicable(rule: ReuseRule, layout: CacheLayout) -> None:
    """Check ``layout``, and that the rule knows what is in it; whether it takes it, ``needs`` says.

    :raises ConfigError: it does not.
    """
    layout.check()
    if not is_hybrid(rule):
        _one_block_size(layout, rule.name)


def need_of(rule: ReuseRule, layout: CacheLayout, group: CacheGroup, boundary: int, prompt_len: int) -> Need:
    """What ``group`` must hold at ``boundary``, by either kind of rule."""
    if is_hybrid(rule):
        return rule.need(layout, group, boundary, prompt_len)
    first, size = rule.first_needed(group, boundary, prompt_len), group.block_size
    return Need(range((first + 1) * size, boundary * size + 1, size))


class _Trtllm:
    """What TensorRT-LLM's rules share: it looks up all tokens but the last, and reuses parts of blocks.

    So a repeated prompt that is a whole number of blocks is resumed one token before its end.
    """

    name: str
    provenance: str

    def boundaries(self, layout: CacheLayout, prompt_len: int) -> int:
        block_size = _one_block_size(layout, self.name)
        # A block of one token has no part.
        whole = prompt_len if block_size > 1 else prompt_len - 1
        return max(0, whole // block_size)

    def tokens(self, layout: CacheLayout, boundary: int, prompt_len: int) -> int:
        return _resumed_at(layout.block_size, boundary, prompt_len)

    def first_needed(self, group: CacheGroup, boundary: int, prompt_len: int) -> int:
        if group.window_size is None or boundary == 0:
            return 0
        resumed_at = _resumed_at(group.block_size, boundary, prompt_len)
        first = self._first_in_window(resumed_at, group.window_size, group.block_size)
        # A boundary whose own block no group needs would be taken without evidence (windows of one token).
        return max(0, min(first, boundary - 1))

    def needs(self, layout: CacheLayout, prompt_len: int) -> Needs | None:
        size = _one_block_size(layout.check(), self.name)
        windows = [group.window_size for group in layout.groups]
        for group in layout.groups:
            _check_window(group)
        return Needs(
            tuple(None if w is None else self._trailing(w, size) for w in windows),
            tuple(None if w is None else self._at_prompt_end(w, size) for w in windows),
        )

    def _first_in_window(self, resumed_at: int, window: int, block_size: int) -> int:
        raise NotImplementedError

    def _trailing(self, window: int, block_size: int) -> int | None:
        raise NotImplementedError

    def _at_prompt_end(self, window: int, block_size: int) -> int | None:
        raise NotImplementedError


class TrtllmV2(_Trtllm):
    """KV cache manager V2, the default for Gemma 3 aggregated: what the token at the boundary can see."""

    name = "trtllm_v2"
    provenance = "run"

    def _first_in_window(self, resumed_at: int, window: int, block_size: int) -> int:
        return (resumed_at + 1 - window) // block_size

    def _trailing(self, window: int, block_size: int) -> int:
        return max(1, _blocks_of(window - 1, block_size))

    def _at_prompt_end(self, window: int, block_size: int) -> int:
        return _blocks_of(window, block_size)


class TrtllmV1(_Trtllm):
    """KV cache manager V1 since it looks past what has slid out: a whole window without a hole.

    It counts from the boundary and not from the token there, so that one token before the end of a block it
    needs one block more than V2. Its one pass over the windows can promise more where there are several
    sliding ones, and then reads blocks that are gone; here all windows must agree.
    """

    name = "trtllm_v1"
    provenance = "transcribed"

    def _first_in_window(self, resumed_at: int, window: int, block_size: int) -> int:
        return (resumed_at - window) // block_size

    def _trailing(self, window: int, block_size: int) -> int:
        return _blocks_of(window, block_size)

    def _at_prompt_end(self, window: int, block_size: int) -> int:
        return _blocks_of(window, block_size) + 1


class TrtllmV1Contiguous(_Trtllm):
    """KV cache manager V1 of the 1.2 line: every window from block 0, however little attention reads."""

    name = "trtllm_v1_contiguous"
    provenance = "transcribed"

    def _first_in_window(self, resumed_at: int, window: int, block_size: int) -> int:
        return 0

    def _trailing(self, window: int, block_size: int) -> None:
        return None

    def _at_prompt_end(self, window: int, block_size: int) -> None:
        return None


class Vllm:
    """vLLM's KV cache with full and sliding groups of one block size: whole blocks only.

    At least one token is left to compute. Other groups need the rule ``vllm_hybrid``.
    """

    name = "vllm"
    provenance = "run"

    def boundaries(self, layout: CacheLayout, prompt_len: int) -> int:
        return max(0, prompt_len - 1) // _one_block_size(layout, self.name)

    def tokens(self, layout: CacheLayout, boundary: int, prompt_len: int) -> int:
        return boundary * layout.block_size

    def first_needed(self, group: CacheGroup, boundary: int, prompt_len: int) -> int:
        blocks = self._trailing(group)
        return 0 if blocks is None else max(0, boundary - blocks)

    def needs(self, layout: CacheLayout, prompt_len: int) -> Needs | None:
        _one_block_size(layout.check(), self.name)
        trailing = tuple(map(self._trailing, layout.groups))
        return Needs(trailing, trailing)

    @staticmethod
    def _trailing(group: CacheGroup) -> int | None:
        return hybrid.trailing_blocks(CacheLayout((group,), Vllm.name, ""), group)


class VllmHybrid:
    """vLLM's hybrid KV cache with groups of any kind and block size; see hybrid.py."""

    name = "vllm_hybrid"
    provenance = "run"

    def boundaries(self, layout: CacheLayout, prompt_len: int) -> int:
        return hybrid.deepest(layout, prompt_len)

    def tokens(self, layout: CacheLayout, boundary: int, prompt_len: int) -> int:
        return hybrid.reused(layout, boundary)

    def need(self, layout: CacheLayout, group: CacheGroup, boundary: int, prompt_len: int) -> Need:
        return hybrid.need(layout, group, boundary, prompt_len)

    def searches(self, layout: CacheLayout) -> bool:
        return searches(layout)

    def search(self, layout: CacheLayout, holds: Holds, prompt_len: int) -> int:
        return hybrid.searched(layout, holds, prompt_len)

    def first_needed(self, group: CacheGroup, boundary: int, prompt_len: int) -> int:
        """For a layout of this group alone."""
        needed = hybrid.need(CacheLayout((group,), self.name, ""), group, boundary, prompt_len).all_of
        return needed[0] // group.block_size - 1 if needed else boundary

    def needs(self, layout: CacheLayout, prompt_len: int) -> Needs | None:
        hybrid.check_kinds(layout.check())
        if self.searches(layout) or (layout.resumption is not None and layout.resumption.partial):
            return None
        trailing = tuple(hybrid.trailing_blocks(layout, group) for group in layout.groups)
        chunks = tuple(map(hybrid.chunk_blocks, layout.groups))
        return Needs(trailing, trailing, chunks, tuple(map(hybrid.blocks_after, layout.groups)))


def _one_block_size(layout: CacheLayout, rule: str) -> int:
    """The block size of all groups; raises ConfigError where the layout has what such rules do not know."""
    if not layout.plain:
        shown = ", ".join(f"{g.group_id}: {g.kind} of {g.block_size} tokens" for g in layout.groups)
        raise ConfigError(
            f"rule {rule}: expected full and sliding groups of one block size, got {shown}; "
            "the rule vllm_hybrid takes others"
        )
    return layout.block_size


def _check_window(group: CacheGroup) -> None:
    """TensorRT-LLM refuses such windows itself."""
    if group.window_size is not None and group.window_size % group.block_size:
        raise ConfigError(
            f"cache group {group.group_id}: expected a window that is a multiple of the block size "
            f"({group.block_size} tokens), got {group.window_size}; choose a tokens_per_block that "
            "divides the window"
        )


def _resumed_at(block_size: int, boundary: int, prompt_len: int) -> int:
    return max(0, min(boundary * block_size, prompt_len - 1))


def _blocks_of(tokens: int, block_size: int) -> int:
    """Blocks that hold so many tokens before a block's edge."""
    return -(-tokens // block_size)


#: The rules that come with the package, by name; plugins add theirs through ``vswa_reuse_rules``.
RULES: Mapping[str, ReuseRule] = MappingProxyType(
    {rule.name: rule for rule in (TrtllmV2(), TrtllmV1(), TrtllmV1Contiguous(), Vllm(), VllmHybrid())}
)


def rule_named(name: str, rules: Mapping[str, ReuseRule] = RULES) -> ReuseRule:
    """The rule of that name.

    :raises ConfigError: there is none; the known ones are listed.
    """
    rule = rules.get(name)
    if rule is None:
        raise ConfigError(f"{unknown_choice('reuse rule', name, rules)}; a plugin can add one")
    return rule


def checked(layout: CacheLayout, rules: Mapping[str, ReuseRule] = RULES) -> CacheLayout:
    """``layout``, which its rule takes: for engines, before they start.

    :param rules: a rule that is not among them is that of a plugin, and checked where it is known.
    :raises ConfigError: it does not fit, or its rule refuses it.
    """
    layout.check()
    if (rule := rules.get(layout.rule)) is not None:
        check_applicable(rule, layout)
        rule.needs(layout, layout.block_size)
    return layout


def resumable(rule: ReuseRule, layout: CacheLayout, held: Mapping[int, Held], prompt_len: int) -> int:
    """Cached tokens of a prompt, by looking at every boundary from the deepest: slow, and the reference.

    :param held: group id -> which blocks of the prompt that group holds; a group left out holds none. Blocks
        are counted in units of ``layout.hash_block_size``: one of several units is named by its last.
    :param prompt_len: tokens of the prompt.
    :raises ConfigError: the rule cannot be applied to ``layout``.
    """
    check_applicable(rule, layout)
    rule.needs(layout, prompt_len)
    unit = layout.hash_block_size
    holds = {group.group_id: _as_function(held.get(group.group_id, ())) for group in layout.groups}
    if (by_search := searching(rule, layout)) is not None:
        return rule.tokens(layout, by_search.search(layout, holds, prompt_len), prompt_len)
    for boundary in range(rule.boundaries(layout, prompt_len), 0, -1):
        needs = [
            (holds[group.group_id], need_of(rule, layout, group, boundary, prompt_len))
            for group in layout.groups
        ]
        if any(need.all_of or need.any_of is not None for _, need in needs) and all(
            all(is_held(end // unit - 1) for end in need.all_of)
            and (need.any_of is None or any(is_held(end // unit - 1) for end in need.any_of))
            for is_held, need in needs
        ):
            return rule.tokens(layout, boundary, prompt_len)
    return 0


def _as_function(held: Held) -> Callable[[int], bool]:
    if callable(held):
        return held
    blocks = held
    return lambda block: block < len(blocks) and bool(blocks[block])
