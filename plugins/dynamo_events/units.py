"""Block hashes of hash units, by Dynamo where tokens alone do not say them."""

from __future__ import annotations

from collections.abc import Sequence

from vswa_plugin.blocks import block_hashes


def unit_hashes(
    token_ids: Sequence[int], unit: int, cache_salt: str | None, lora_name: str | None
) -> list[int]:
    """Block hashes of consecutive units of ``unit`` tokens."""
    if not cache_salt and not lora_name:
        return block_hashes(token_ids, unit)
    from dynamo.llm import compute_block_hash_for_seq

    hashes: list[int] = compute_block_hash_for_seq(
        list(token_ids), unit, lora_name=lora_name or None, cache_namespace=cache_salt or None
    )
    return hashes
