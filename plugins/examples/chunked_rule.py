"""A reuse rule for chunked attention: a token sees its own chunk only, from the chunk's first token on.

Groups with a window are read as chunked, their window as the chunk. At the edge of a chunk such a group needs
nothing at all; one token later it needs that chunk's first block, and then one more with every block.
"""

from vswa_plugin.blocks import CacheGroup, CacheLayout, Needs, ReuseRule
from vswa_plugin.errors import ConfigError
from vswa_plugin.hookspecs import hookimpl


class ChunkedRule:
    """Resumes at whole blocks and leaves at least one token to compute."""

    name = "chunked"
    provenance = "read"

    def boundaries(self, layout: CacheLayout, prompt_len: int) -> int:
        return max(0, prompt_len - 1) // layout.block_size

    def tokens(self, layout: CacheLayout, boundary: int, prompt_len: int) -> int:
        return boundary * layout.block_size

    def first_needed(self, group: CacheGroup, boundary: int, prompt_len: int) -> int:
        if group.window_size is None:
            return 0
        return boundary - boundary % (group.window_size // group.block_size)

    def needs(self, layout: CacheLayout, prompt_len: int) -> Needs | None:
        layout.check()
        sizes = {group.block_size for group in layout.groups}
        if len(sizes) > 1 or any((group.window_size or 0) % group.block_size for group in layout.groups):
            raise ConfigError(f"expected one block size that divides all chunks, got {layout.groups}")
        return None  # how many blocks depends on where in its chunk the boundary lies


@hookimpl
def vswa_reuse_rules() -> dict[str, ReuseRule]:
    return {"chunked": ChunkedRule()}
