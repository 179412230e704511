"""The structs of the wire and of the registry as they were first published: an old reader, for tests.

They are test data, and never change: every later stream must be readable with them, and what they write must
be readable by every later version (docs/protocol.md, "How the protocol grows").
"""

from __future__ import annotations

import msgspec


class CacheGroup(msgspec.Struct, frozen=True, array_like=True):
    group_id: int
    window_size: int | None
    block_size: int


class Layout(msgspec.Struct, frozen=True, array_like=True, tag="layout"):
    groups: tuple[CacheGroup, ...]
    rule: str
    hash_scheme: str
    model: str


class Stored(msgspec.Struct, frozen=True, array_like=True, tag="stored"):
    group_id: int
    position: int
    parent_hash: int | None
    sequence_hashes: tuple[int, ...]
    tier: str = "device"


class Removed(msgspec.Struct, frozen=True, array_like=True, tag="removed"):
    group_id: int
    sequence_hashes: tuple[int, ...]


class Moved(msgspec.Struct, frozen=True, array_like=True, tag="moved"):
    group_id: int
    sequence_hashes: tuple[int, ...]
    tier: str


class Cleared(msgspec.Struct, frozen=True, array_like=True, tag="cleared"):
    group_id: int | None = None


class Batch(msgspec.Struct, frozen=True, array_like=True):
    version: int
    epoch: int
    first_event_id: int
    published_at_ns: int
    events: tuple[Layout | Stored | Removed | Moved | Cleared, ...] = ()


class SnapshotPart(msgspec.Struct, frozen=True, array_like=True, tag="events"):
    epoch: int
    snapshot_id: int
    part: int
    events: tuple[Layout | Stored | Removed | Moved | Cleared, ...]


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A worker in the registry, as JSON."""

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
    taints: tuple[str, ...] = ()
    visible: bool = True
