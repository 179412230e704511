"""Who is alive: one entry per worker, gone when the worker is. Protocol only; see etcd.py.

Dynamo's own discovery tells which instances serve a model. This registry tells what a router of ours
needs besides: the cache groups and reuse rule of each rank, and the epoch of its event stream.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from vswa_plugin.errors import ProtocolError
from vswa_plugin.layout import CacheGroup

#: All keys of this project in a shared etcd.
PREFIX = "vswa/v1/workers/"


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One worker, as its router and its operators need to know it. JSON in the registry.

    :param epochs: current epoch of each dp_rank's event stream.
    :param worker_id: Dynamo's instance id.
    """

    namespace: str
    component: str
    worker_id: int
    mode: str
    engine: str
    served_model_name: str
    model_path: str
    context_length: int
    block_size: int
    rule: str
    hash_scheme: str
    groups: tuple[CacheGroup, ...]
    epochs: dict[int, int]
    total_kv_blocks: int
    endpoint: str = "generate"
    host: str = ""
    pid: int = 0
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None

    @property
    def key(self) -> str:
        """The registry key: unique per worker, sorted by namespace and component."""
        return f"{PREFIX}{self.namespace}/{self.component}/{self.worker_id:016x}"


def encode_entry(entry: Entry) -> bytes:
    return msgspec.json.encode(entry)


def decode_entry(key: str, payload: bytes) -> Entry:
    """The entry in ``payload``; raises ProtocolError that names the key and the field."""
    try:
        return msgspec.json.decode(payload, type=Entry)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ProtocolError(f"expected a worker entry at {key}, got {len(payload)} bytes: {error}") from error


class Registry(Protocol):
    """Where workers announce themselves. All calls may be made from an event loop; none blocks it."""

    async def join(self, entry: Entry) -> None:
        """Put ``entry`` and keep it alive until :meth:`leave`; again with the same key: replace it.

        :raises ConnectError: the registry cannot be reached.
        """

    async def entries(self) -> list[Entry]:
        """All live entries; malformed ones are logged and left out."""

    async def leave(self) -> None:
        """Remove the entry and stop keeping it alive. Never raises: the lease ends it otherwise."""
