"""Rotary position embedding as one complex multiplication.

Hugging Face rotates dimension j together with j + head_dim/2. The model stores both next to each other
(rows of the q and k projections are permuted at load), so a head is a vector of head_dim/2 complex
numbers and rotating it is one multiplication. Dot products do not change by permuting both sides.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .config import Rope

#: Positions computed ahead at least; the table doubles when a later position is asked for.
_FIRST_POSITIONS = 4096


def interleave(array: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """Permute the first axis, a multiple of ``head_dim``, so that j and j + head_dim/2 are neighbours."""
    halves = array.reshape(-1, 2, head_dim // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)


class RopeTable:
    """``exp(i * position * frequency)`` for all positions so far: complex64 [positions, head_dim/2]."""

    def __init__(self, rope: Rope, head_dim: int) -> None:
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        # Rounded to float32 like Hugging Face's: the error grows with the position, so it must be the same.
        frequencies = (1.0 / np.float32(rope.theta) ** exponents.astype(np.float64)).astype(np.float32)
        self._frequencies = frequencies / np.float32(rope.factor)
        self._table = self._compute(_FIRST_POSITIONS)

    def _compute(self, positions: int) -> NDArray[np.complex64]:
        angles = np.arange(positions, dtype=np.float32)[:, None] * self._frequencies
        table: NDArray[np.complex64] = np.exp(1j * angles.astype(np.float64)).astype(np.complex64)
        return table

    def upto(self, positions: int) -> NDArray[np.complex64]:
        """The table, grown to at least that many positions. From any thread."""
        # What another thread puts there meanwhile may be shorter, so the attribute is read once.
        table = self._table
        if positions > len(table):
            table = self._table = self._compute(1 << (positions - 1).bit_length())
        return table
