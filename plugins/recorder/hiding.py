"""Traces without people's words: token ids and engine hashes replaced, equal ones by equal ones. Pure.

A cache compares blocks from their start, so that is all that is kept: each token becomes a number that
depends, by a secret key, on itself and the tokens before it *in its block*. Blocks that begin alike still
begin alike, equal blocks are equal wherever they stand, and no number says anything of a token elsewhere.
An engine's hashes are functions of the tokens that anybody can compute, so they are replaced too, each by a
name of its own; so are cache salts and LoRA names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from vswa_plugin.engine import RawEvent
from vswa_plugin.errors import ConfigError

#: Blocks whose new tokens are remembered: they come once per cache group and with every prompt.
_REMEMBERED = 1 << 14
_KEY_BYTES = 32
_U64 = 1 << 64


class Hiding:
    """One replacement; files with one ``key`` can be compared. Used from any thread.

    :param event_format: of the engine's events.
    :param key: secret; None: a new one, which nobody will ever know.
    :raises ConfigError: where the tokens of such events stand is not known.
    """

    def __init__(self, event_format: str, block_size: int, rule: str, key: bytes | None = None) -> None:
        if event_format not in _FORMATS or rule.startswith("trtllm_v1"):
            raise ConfigError(
                f"token ids can be hidden in events of the formats {', '.join(_FORMATS)}, but not under the "
                f"trtllm_v1 rules, whose readers need the engine's own hashes; got {event_format!r} under "
                f"{rule!r}. Record them as they are with the option tokens=plain (VSWA_RECORD_TOKENS=plain), "
                f"and keep the file safe"
            )
        self._block_size = block_size
        self._key = key or os.urandom(_KEY_BYTES)
        self._event = _FORMATS[event_format]
        self.block = lru_cache(_REMEMBERED)(self._hidden)

    def event(self, raw: RawEvent) -> Any:
        """An event of the engine; fields that are not known are left out."""
        return self._event(self, raw)

    def prompt(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """Token ids from the start of a sequence."""
        size = self._block_size
        hidden: list[int] = []
        for at in range(0, len(token_ids), size):
            hidden += self.block(tuple(token_ids[at : at + size]))
        return tuple(hidden)

    def text(self, value: str | None) -> str | None:
        """A cache salt, or the name of a LoRA."""
        return None if value is None else self._digest(b"text", value.encode(), 16).hex()

    def name(self, value: Any) -> Any:
        """An engine's hash: a number for a number, text for a digest."""
        if value is None:
            return None
        if isinstance(value, int):
            return int.from_bytes(self._digest(b"name", (value % _U64).to_bytes(8, "little"), 8), "little")
        given = value if isinstance(value, bytes) else str(value).encode()
        return self._digest(b"name", given, 32).hex()

    def _hidden(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        state = blake2b(key=self._key, digest_size=4, person=b"tokens")
        hidden = []
        for token_id in token_ids:
            state.update(token_id.to_bytes(4, "little"))
            hidden.append(int.from_bytes(state.copy().digest(), "little"))
        return tuple(hidden)

    def _digest(self, purpose: bytes, value: bytes, size: int) -> bytes:
        return blake2b(value, key=self._key, digest_size=size, person=purpose).digest()


# -- TensorRT-LLM --------------------------------------------------------------------------------------

_ENVELOPE = ("event_id", "window_size", "layer_group_id", "attention_dp_rank")


def _trtllm(hiding: Hiding, raw: RawEvent) -> dict[str, Any]:
    event: dict[str, Any] = {key: raw[key] for key in _ENVELOPE if key in raw}
    if "hash_algo" in raw:
        event["hash_algo"] = "hidden"
    data = raw["data"]
    kept: dict[str, Any] = {"type": data["type"]}
    match data["type"]:
        case "created":
            kept["num_blocks_per_cache_level"] = data.get("num_blocks_per_cache_level")
        case "stored":
            kept["parent_hash"] = hiding.name(data["parent_hash"])
            kept["blocks"] = [_trtllm_block(hiding, block) for block in data["blocks"]]
            if data.get("cache_salt") is not None:
                kept["cache_salt"] = hiding.text(data["cache_salt"])
            if data.get("lora_name") is not None:
                kept |= {"lora_name": hiding.text(data["lora_name"]), "lora_id": data.get("lora_id")}
        case "removed":
            kept["block_hashes"] = [hiding.name(each) for each in data["block_hashes"]]
        case "updated":
            kept["block_hash"] = hiding.name(data["block_hash"])
            kept["cache_level"] = data.get("cache_level")
    event["data"] = kept
    return event


def _trtllm_block(hiding: Hiding, raw: Mapping[str, Any]) -> dict[str, Any]:
    block = {
        "type": "stored_block",
        "block_hash": hiding.name(raw["block_hash"]),
        "cache_level": raw.get("cache_level", 0),
    }
    if raw.get("cache_salt") is not None:
        block["cache_salt"] = hiding.text(raw["cache_salt"])
    tokens = [(each.get("token_id"), each.get("token_extra_id")) for each in raw["tokens"]]
    if raw.get("mm_keys") or any(type(token_id) is not int or extra for token_id, extra in tokens):
        # More than text: that it is so is all that a reader needs.
        return {**block, "tokens": [_unique(0)], "mm_keys": ["hidden"]}
    hidden = hiding.block(tuple(token_id for token_id, _ in tokens))
    return {**block, "tokens": [_unique(token_id) for token_id in hidden]}


def _unique(token_id: int) -> dict[str, Any]:
    return {"type": "unique_token", "token_id": token_id, "token_extra_id": 0}


# -- vLLM ----------------------------------------------------------------------------------------------

#: In the order of the array encoding.
_VLLM = {
    "BlockStored": (
        *("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name"),
        *("extra_keys", "group_idx", "kv_cache_spec_kind", "kv_cache_spec_sliding_window"),
    ),
    "BlockRemoved": ("block_hashes", "medium", "group_idx"),
    "AllBlocksCleared": (),
    # What a worker adds where its engine's batches have not come.
    "BatchesLost": ("expected", "got"),
}


def _vllm(hiding: Hiding, raw: RawEvent | Sequence[Any]) -> dict[str, Any]:
    kind = raw["type"] if isinstance(raw, Mapping) else raw[0]
    names = _VLLM.get(kind, ())
    given = raw if isinstance(raw, Mapping) else dict(zip(names, raw[1:], strict=False))
    kept: dict[str, Any] = {name: given[name] for name in names if given.get(name) is not None}
    if "block_hashes" in kept:
        kept["block_hashes"] = [hiding.name(each) for each in kept["block_hashes"]]
    if kind == "BlockStored":
        kept["parent_block_hash"] = hiding.name(given.get("parent_block_hash"))
        # A range of tokens begins at a block's edge.
        kept["token_ids"] = hiding.prompt(kept["token_ids"])
        if "lora_name" in kept:
            kept["lora_name"] = hiding.text(kept["lora_name"])
        if "extra_keys" in kept:
            kept["extra_keys"] = _without_text(hiding, kept["extra_keys"])
    return {"type": kind, **kept}


def _without_text(hiding: Hiding, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_without_text(hiding, each) for each in value]
    if isinstance(value, str):
        return hiding.text(value)
    return value if value is None or isinstance(value, int | float) else "hidden"


_FORMATS: Mapping[str, Callable[[Hiding, Any], dict[str, Any]]] = {"trtllm": _trtllm, "vllm": _vllm}
