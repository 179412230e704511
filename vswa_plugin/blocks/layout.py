"""Cache groups: layers with one retention rule and one block pool. Pure."""

from __future__ import annotations

import msgspec

from vswa_plugin.errors import ConfigError

#: Our sequence hashes equal Dynamo's: see hashing.py.
HASH_SCHEME = "dynamo-xxh3-1337"


class CacheGroup(msgspec.Struct, frozen=True, array_like=True):
    """Layers that keep and evict their KV blocks together.

    :param group_id: the engine's own number for it.
    :param window_size: attention window in tokens; None for global attention.
    :param block_size: tokens per block.
    """

    group_id: int
    window_size: int | None
    block_size: int

    @property
    def label(self) -> str:
        """How people are shown the group: its window in tokens, or ``global``."""
        return "global" if self.window_size is None else str(self.window_size)


class CacheLayout(msgspec.Struct, frozen=True):
    """All cache groups of one rank, and the rule by which its engine resumes a prompt.

    :param rule: name of a reuse rule, e.g. ``trtllm_v2``.
    :param model: name under which the model is served.
    :raises ConfigError: from :meth:`check`.
    """

    groups: tuple[CacheGroup, ...]
    rule: str
    model: str
    hash_scheme: str = HASH_SCHEME

    def check(self) -> CacheLayout:
        """Return self, or raise :class:`ConfigError` that names what does not fit."""
        if not self.groups:
            raise ConfigError("expected at least one cache group, got none")
        ids = [group.group_id for group in self.groups]
        if len(set(ids)) != len(ids):
            raise ConfigError(f"expected each cache group id once, got {ids}")
        for group in self.groups:
            _check_group(group)
        return self

    @property
    def block_size(self) -> int:
        """Tokens per block, where all groups agree.

        :raises ConfigError: where they do not.
        """
        sizes = {group.block_size for group in self.groups}
        if len(sizes) != 1:
            raise ConfigError(f"expected one block size for all cache groups, got {sorted(sizes)}")
        return sizes.pop()

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
    if group.window_size is None:
        return
    if group.window_size <= 0:
        raise ConfigError(f"{where}: expected a positive window, got {group.window_size} tokens")
    if group.window_size % group.block_size:
        raise ConfigError(
            f"{where}: expected a window that is a multiple of the block size ({group.block_size} tokens), "
            f"got {group.window_size}; choose a tokens_per_block that divides the window"
        )
