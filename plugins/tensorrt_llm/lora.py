"""LoRA and cache salts by the hash chains of their requests, since the engine's events do not name them.

A request's chain is noted when it is admitted, before any event of it; an event whose blocks are noted, or
hang on noted ones, gets the names added. Called from the event loop and from the polling thread.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..trtllm_events import LORA_SERVED, chain_keys, salt_id

#: Blocks remembered; the oldest are forgotten, and are then left out by the adapter: an under-estimate.
MAX_NOTED = 1 << 20


class Adapter(NamedTuple):
    """A LoRA adapter as requests name it, with the engine's number and its directory."""

    name: str
    number: int
    path: str


class Owner(NamedTuple):
    """The LoRA adapter and the cache salt of a block."""

    lora: Adapter | None
    cache_salt: str | None


class Attribution:
    """Blocks with the adapter and the salt that they belong to.

    :param adapters: all that are served; where there are some, events say so, and the adapter of events then
        publishes only blocks that can be told from each other.
    """

    def __init__(self, adapters: Mapping[str, Adapter], block_size: int) -> None:
        self.adapters = dict(adapters)
        self._block_size = block_size
        self._noted: dict[int, Owner] = {}
        self._lock = threading.Lock()

    def note(self, prompt: Sequence[int], lora: Adapter | None, cache_salt: str | None) -> None:
        """A request is about to be admitted."""
        if lora is None and cache_salt is None:
            return
        salt = None if cache_salt is None else salt_id(cache_salt)
        keys = chain_keys(prompt, self._block_size, lora.number if lora else None, salt)
        with self._lock:
            self._noted |= dict.fromkeys(keys, Owner(lora, cache_salt))
            self._trim()

    def annotate(self, event: dict[str, Any]) -> dict[str, Any]:
        """``event`` with the adapter and salt of its blocks as far as known; itself where nothing is."""
        data = event.get("data")
        if not isinstance(data, dict) or data.get("type") != "stored" or not (self.adapters or self._noted):
            return event
        blocks = [block for block in data.get("blocks") or () if isinstance(block, dict)]
        hashes = [block.get("block_hash") for block in blocks]
        added: dict[str, Any] = {LORA_SERVED: True} if self.adapters else {}
        with self._lock:
            owner = next(
                (self._noted[key] for key in (*hashes, data.get("parent_hash")) if key in self._noted), None
            )
            if owner is not None:
                # What was generated hangs on the prompt and has the same adapter and salt.
                self._noted |= {key: owner for key in hashes if isinstance(key, int)}
                self._trim()
        if owner is not None and owner.lora is not None:
            added |= {"lora_name": owner.lora.name, "lora_id": owner.lora.number}
        if owner is not None and owner.cache_salt is not None:
            added["cache_salt"] = owner.cache_salt
        return {**event, "data": {**data, **added}} if added else event

    def _trim(self) -> None:
        excess = len(self._noted) - MAX_NOTED
        if excess > 0:
            for key in list(self._noted)[: excess + MAX_NOTED // 8]:
                del self._noted[key]
