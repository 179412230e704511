"""A reuse rule: an engine that resumes at whole blocks where every window is still held."""

from __future__ import annotations

from collections.abc import Mapping

from vswa_plugin.blocks import CacheGroup, CacheLayout, Needs, ReuseRule
from vswa_plugin.errors import ConfigError
from vswa_plugin.hookspecs import hookimpl

NAME = "example"


class ExampleRule:
    """Pure: no I/O and no state, called from any thread, on the path of every request."""

    name = NAME
    provenance = "read"

    def boundaries(self, layout: CacheLayout, prompt_len: int) -> int:
        """The deepest block boundary at which a prompt of this length could be resumed."""
        _check(layout)
        return max(0, prompt_len - 1) // layout.block_size

    def tokens(self, layout: CacheLayout, boundary: int, prompt_len: int) -> int:
        """Tokens that are reused at that boundary."""
        return boundary * layout.block_size

    def first_needed(self, group: CacheGroup, boundary: int, prompt_len: int) -> int:
        """A group must hold the blocks from this one to the boundary."""
        blocks = _trailing(group)
        return 0 if blocks is None else max(0, boundary - blocks)

    def needs(self, layout: CacheLayout, prompt_len: int) -> Needs | None:
        """The same as numbers: how many blocks before the boundary; None for a group: all of them."""
        _check(layout)
        trailing = tuple(map(_trailing, layout.groups))
        return Needs(trailing, trailing)


def _trailing(group: CacheGroup) -> int | None:
    """Blocks before the boundary that the next token reads: it sees the ``window_size - 1`` before it."""
    return None if group.window_size is None else max(1, -(-(group.window_size - 1) // group.block_size))


def _check(layout: CacheLayout) -> None:
    layout.check()
    if len({group.block_size for group in layout.groups}) > 1:
        raise ConfigError(f"expected groups of one block size for the rule {NAME}, got {layout.groups}")


@hookimpl
def vswa_reuse_rules() -> Mapping[str, ReuseRule]:
    return {NAME: ExampleRule()}
