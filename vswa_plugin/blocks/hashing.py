"""Block hashes and sequence hashes, equal to Dynamo's. Pure.

A *block hash* covers one full block of tokens and nothing else; a *sequence hash* chains block hashes
and so names a whole prefix. Both are unsigned 64-bit:

    b_i = xxh3_64(little-endian u32 token ids, seed 1337)
    s_0 = b_0;  s_i = xxh3_64(le64(s_{i-1}) + le64(b_i), seed 1337)

These are the numbers that Dynamo's ``compute_block_hash_for_seq`` and its index use for plain text.
LoRA and cache salt change the seed: for those the worker calls Dynamo's own function
(``vswa_plugin.dynamo.runtime.namespaced_block_hash``).
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable, Sequence

from xxhash import xxh3_64_intdigest

from vswa_plugin.blocks.kernel import load_kernel

SEED = 1337
_PAIR = struct.Struct("<QQ")
_kernel = load_kernel()


def _packed(token_ids: Sequence[int]) -> bytes:
    words = array("I", token_ids)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def block_hash(token_ids: Sequence[int]) -> int:
    """Hash of the tokens of one block (each 0 <= id < 2**32), independent of what came before."""
    return xxh3_64_intdigest(_packed(token_ids), SEED)


def block_hashes(token_ids: Sequence[int], block_size: int) -> list[int]:
    """Hashes of all full blocks of ``token_ids``; a tail shorter than ``block_size`` has none."""
    packed = memoryview(_packed(token_ids))
    step = 4 * block_size
    return [xxh3_64_intdigest(packed[at : at + step], SEED) for at in range(0, len(packed) - step + 1, step)]


def chain(parent: int | None, block: int) -> int:
    """Sequence hash of a block under the prefix named ``parent`` (None at the root)."""
    return block if parent is None else xxh3_64_intdigest(_PAIR.pack(parent, block), SEED)


def sequence_hashes(blocks: Iterable[int], parent: int | None = None) -> list[int]:
    """Sequence hashes of consecutive ``blocks`` (block hashes) that follow the prefix ``parent``."""
    chained = []
    for block in blocks:
        parent = chain(parent, block)
        chained.append(parent)
    return chained


def sequence_hashes_of_tokens(token_ids: Sequence[int], block_size: int) -> array[int]:
    """Sequence hashes of all full blocks of ``token_ids`` from the root on, compiled where that is there.

    An array, which the index reads faster than Python's numbers.

    :raises OverflowError: a token id of a full block is not 0 <= id < 2**32.
    """
    if _kernel is not None:
        return array("Q", _kernel.sequence_hashes(token_ids, block_size))
    whole = len(token_ids) - len(token_ids) % block_size
    return array("Q", sequence_hashes(block_hashes(token_ids[:whole], block_size)))


def lookahead_name(sequence_hash: int, next_tokens: Sequence[int]) -> int:
    """Name of a prefix where the tokens after it are a part of its name.

    :param sequence_hash: of the prefix.
    """
    packed = _PAIR.pack(sequence_hash, len(next_tokens)) + _packed(next_tokens)
    return xxh3_64_intdigest(packed, SEED)


def prefix_names(token_ids: Sequence[int], unit: int, lookahead: int = 0) -> Sequence[int]:
    """Names of the prefixes that end at multiples of ``unit`` tokens, as far as the prompt has them.

    :param lookahead: so many tokens after a prefix are a part of its name; 0: names are sequence hashes.
    :raises OverflowError: a token id of a full block is not 0 <= id < 2**32.
    """
    return with_lookahead(sequence_hashes_of_tokens(token_ids, unit), token_ids, unit, lookahead)


def with_lookahead(
    hashes: Sequence[int], token_ids: Sequence[int], unit: int, lookahead: int
) -> Sequence[int]:
    """Names out of the sequence hashes of blocks of ``unit`` tokens; these themselves without a lookahead."""
    if not lookahead:
        return hashes
    ends = range(unit, len(token_ids) - lookahead + 1, unit)
    names = (
        lookahead_name(each, token_ids[end : end + lookahead])
        for each, end in zip(hashes, ends, strict=False)
    )
    return array("Q", names)
