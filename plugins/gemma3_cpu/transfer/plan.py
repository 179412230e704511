"""What both sides work out for themselves: which blocks, in runs of what size, of what shape. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

#: Bytes of one run at most, unless a single block is larger. Far above what a header costs, and still small
#: beside the memory of either side.
RUN_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class GroupBlocks:
    """Blocks of one cache group: offered by the prefill side, or wanted by the decode side.

    :param blocks: indexes in the sequence, half-open, step 1; may be empty.
    :param block_bytes: keys and values of one block, all layers of the group; at least 1.
    """

    blocks: range
    block_bytes: int

    @property
    def bounds(self) -> tuple[int, int]:
        """First block and the one after the last; equal where there is none."""
        return self.blocks.start, max(self.blocks.start, self.blocks.stop)

    @property
    def run_blocks(self) -> int:
        """Blocks of one run at most."""
        return max(1, RUN_BYTES // self.block_bytes)

    @property
    def run_bytes(self) -> int:
        """Bytes of the largest run that these blocks make; 0 where there is none."""
        return min(self.run_blocks, len(self.blocks)) * self.block_bytes

    def runs(self) -> Iterator[tuple[int, int]]:
        """(first, stop) of each run, in order."""
        first, stop = self.bounds
        for start in range(first, stop, self.run_blocks):
            yield start, min(start + self.run_blocks, stop)


def fingerprint(
    model: Mapping[str, Any], dtype: str, block_size: int, groups: Sequence[tuple[int | None, int]]
) -> str:
    """What must be equal on both sides for blocks to mean the same. Readable, but for the model's digest.

    :param model: all that changes the content of a block, of JSON's types: the model's config, and something
        that tells apart weights of one shape.
    :param block_size: tokens.
    :param groups: window in tokens (None: global) and bytes per block of each cache group, in order.
    """
    digest = hashlib.sha256(msgspec.json.encode(model, order="deterministic")).hexdigest()[:16]
    parts = ",".join(f"{'global' if window is None else window}:{size}" for window, size in groups)
    return f"gemma3_cpu model={digest} dtype={dtype} block_size={block_size} groups={parts}"
