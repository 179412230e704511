"""Cache groups: layers with one retention rule and one block pool. Pure."""

from __future__ import annotations

import math

import msgspec

from vswa_plugin.errors import ConfigError

#: Our sequence hashes equal Dynamo's: see hashing.py.
HASH_SCHEME = "dynamo-xxh3-1337"

#: Kind of a group whose layers read all tokens before the current one.
FULL = "full"
#: Kind of a group whose layers read the last tokens only, as many as the window has.
SLIDING = "sliding"
#: Kind of a group whose layers read the tokens since the start of the current chunk.
CHUNKED = "chunked"
#: Kind of a group that keeps one state (Mamba, linear attention): nothing before it is read.
RECURRENT = "recurrent"
KINDS = (FULL, SLIDING, CHUNKED, RECURRENT)


class CacheGroup(msgspec.Struct, frozen=True, array_like=True):
    """Layers that keep and evict their KV blocks together.

    :param group_id: the engine's own number for it.
    :param window_size: attention window in tokens; None: the group has none.
    :param block_size: tokens per block of this group.
    :param stated_kind: one of :data:`KINDS`; None: ``sliding`` where there is a window, else ``full``. A
        later version may state another one.
    :param chunk_size: tokens of a chunk, beyond whose start ``chunked`` layers read nothing.
    :param drops_last: the engine gives up the last block that it finds in this group (EAGLE and MTP without
        hash lookahead), so that one more block must be held than is reused.
    """

    group_id: int
    window_size: int | None
    block_size: int
    stated_kind: str | None = None
    chunk_size: int | None = None
    drops_last: bool = False

    @property
    def kind(self) -> str:
        """``full``, ``sliding``, ``chunked``, ``recurrent``, or what a later version states."""
        if self.stated_kind is not None:
            return self.stated_kind
        return FULL if self.window_size is None else SLIDING

    @property
    def label(self) -> str:
        """How people are shown the group: its window in tokens, ``global``, or its kind."""
        match self.kind:
            case "full":
                return "global"
            case "sliding":
                return str(self.window_size)
            case "chunked":
                return f"chunk{self.chunk_size}"
            case kind:
                return kind


class Resumption(msgspec.Struct, frozen=True, array_like=True):
    """Where an engine resumes prompts, as far as the cache groups do not say it.

    :param alignment: every reused prefix is a multiple of so many tokens.
    :param hash_block_size: tokens between two positions at which a prefix has a name.
    :param partial: prefixes may end inside blocks, at any position that has a name.
    :param lookahead: so many tokens after a position are part of its name.
    :param spare_last: a block that is given up (:attr:`CacheGroup.drops_last`) ends before the last token of
        the prompt; False: it may contain it.
    :param least_tokens: a prefix of no more than so many tokens is not reused.
    """

    alignment: int
    hash_block_size: int
    partial: bool = False
    lookahead: int = 0
    spare_last: bool = False
    least_tokens: int = 0


class Naming(msgspec.Struct, frozen=True):
    """How the prefixes of a prompt are named; ranks with one naming can be scored by the same names.

    :param block_size: as :attr:`CacheLayout.block_size`.
    :param hash_block_size: as :attr:`CacheLayout.hash_block_size`.
    :param lookahead: as :attr:`CacheLayout.lookahead`.
    """

    block_size: int
    hash_block_size: int
    lookahead: int = 0

    @property
    def by_blocks(self) -> bool:
        """Whether the names are the sequence hashes of the blocks."""
        return self.hash_block_size == self.block_size and not self.lookahead


class CacheLayout(msgspec.Struct, frozen=True):
    """All cache groups of one rank, and the rule by which its engine resumes a prompt.

    :param rule: name of a reuse rule, e.g. ``trtllm_v2``.
    :param model: name under which the model is served.
    :param resumption: None: prefixes are named and resumed as the block sizes of the groups imply.
    :raises ConfigError: from :meth:`check`.
    """

    groups: tuple[CacheGroup, ...]
    rule: str
    model: str
    hash_scheme: str = HASH_SCHEME
    resumption: Resumption | None = None

    def check(self) -> CacheLayout:
        """Return self, or raise :class:`ConfigError` that names what does not fit."""
        if not self.groups:
            raise ConfigError("expected at least one cache group, got none")
        ids = [group.group_id for group in self.groups]
        if len(set(ids)) != len(ids):
            raise ConfigError(f"expected each cache group id once, got {ids}")
        for group in self.groups:
            _check_group(group)
        if self.resumption is not None:
            _check_resumption(self.resumption, self.groups)
        return self

    @property
    def block_size(self) -> int:
        """Tokens of the blocks in which prompts are counted: every reused prefix is a multiple of it.

        The block size of all groups where it is one; else their least common multiple, or what the engine
        states.
        """
        if self.resumption is not None:
            return self.resumption.alignment
        return math.lcm(*(group.block_size for group in self.groups))

    @property
    def hash_block_size(self) -> int:
        """Tokens between two positions at which a prefix has a name."""
        if self.resumption is not None:
            return self.resumption.hash_block_size
        return math.gcd(*(group.block_size for group in self.groups))

    @property
    def lookahead(self) -> int:
        """So many tokens after a position are part of its name."""
        return 0 if self.resumption is None else self.resumption.lookahead

    @property
    def naming(self) -> Naming:
        """How its prefixes are named."""
        return Naming(self.block_size, self.hash_block_size, self.lookahead)

    @property
    def plain(self) -> bool:
        """Whether all groups are full or sliding, have one block size, and nothing is out of the ordinary."""
        usual = self.resumption is None or self.resumption == Resumption(self.block_size, self.block_size)
        return (
            usual
            and len({group.block_size for group in self.groups}) == 1
            and all(group.kind in (FULL, SLIDING) and not group.drops_last for group in self.groups)
        )

    @property
    def unknown_kinds(self) -> dict[int, str]:
        """Group id -> kind, of the groups whose kind this version does not know."""
        return {group.group_id: group.kind for group in self.groups if group.kind not in KINDS}

    def group(self, group_id: int) -> CacheGroup:
        """The group of that id; raises ConfigError that lists the declared ones."""
        for group in self.groups:
            if group.group_id == group_id:
                return group
        declared = ", ".join(f"{g.group_id} (window {g.label})" for g in self.groups)
        raise ConfigError(f"unknown cache group {group_id}; the engine declared {declared}")


def _check_group(group: CacheGroup) -> None:
    where = f"cache group {group.group_id}"
    if group.block_size <= 0:
        raise ConfigError(f"{where}: expected a positive block size, got {group.block_size}")
    if group.window_size is not None and group.window_size <= 0:
        raise ConfigError(f"{where}: expected a positive window, got {group.window_size} tokens")
    if group.kind == SLIDING and group.window_size is None:
        raise ConfigError(f"{where}: expected a window for a sliding group, got none")
    if group.kind == CHUNKED and not _chunk_fits(group):
        raise ConfigError(
            f"{where}: expected chunks of a multiple of the block size ({group.block_size} tokens), "
            f"got {group.chunk_size}"
        )


def _chunk_fits(group: CacheGroup) -> bool:
    size = group.chunk_size
    return size is not None and size > 0 and size % group.block_size == 0


def _check_resumption(resumption: Resumption, groups: tuple[CacheGroup, ...]) -> None:
    unit, alignment = resumption.hash_block_size, resumption.alignment
    if unit <= 0 or alignment <= 0 or alignment % unit:
        raise ConfigError(
            "expected an alignment that is a multiple of the hash block size, "
            f"got {alignment} and {unit} tokens"
        )
    if resumption.lookahead < 0 or resumption.least_tokens < 0:
        raise ConfigError(
            "expected a lookahead and least_tokens of 0 or more, "
            f"got {resumption.lookahead} and {resumption.least_tokens}"
        )
    for group in groups:
        if group.block_size % unit:
            raise ConfigError(
                f"cache group {group.group_id}: expected a block size that is a multiple of the hash block "
                f"size ({unit} tokens), got {group.block_size}"
            )
        if not resumption.partial and alignment % group.block_size:
            raise ConfigError(
                f"cache group {group.group_id}: expected a block size that divides the alignment "
                f"({alignment} tokens), got {group.block_size}"
            )
