"""What a cache group is given and how long it keeps blocks: arithmetic only."""

from __future__ import annotations

import msgspec


class GroupSpec(msgspec.Struct, frozen=True):
    """One cache group and the size of its pool.

    :param group_id: TensorRT-LLM's layer group id.
    :param window_size: attention window in tokens; None for global attention.
    :param num_blocks: pages of its pool.
    :param layers: layers that keep their blocks in it: the size of one page, as against other groups.
    :param host_blocks: pages on the host to which evicted ones move; 0 for no host tier.
    """

    group_id: int
    window_size: int | None
    num_blocks: int
    layers: int = 1
    host_blocks: int = 0

    @property
    def label(self) -> str:
        return "global" if self.window_size is None else str(self.window_size)

    def stale_end(self, computed_tokens: int, block_size: int) -> int:
        """First block that the token at position ``computed_tokens`` can still see."""
        if self.window_size is None:
            return 0
        return max(0, (computed_tokens + 1 - self.window_size) // block_size)

    def most_held(self, total_tokens: int, block_size: int, max_chunk_tokens: int) -> int:
        """The most pages that a sequence of ``total_tokens`` holds at any one time.

        Before a step of c tokens at h, a sliding group holds blocks [stale_end(h), ceil((h + c) / bs)):
        with x = h + 1 - W that is ceil((x + W - 1 + c) / bs) - floor(x / bs), largest for x = bs - 1
        (mod bs), where it is ceil((W + c + bs - 2) / bs).
        """
        total = -(-total_tokens // block_size)
        if self.window_size is None:
            return total
        return min(total, -(-(self.window_size + max_chunk_tokens + block_size - 2) // block_size))
