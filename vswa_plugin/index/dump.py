"""All that an index holds as plain data, for ``/dump`` and for tests: our schema, versioned."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from vswa_plugin.blocks.layout import CacheLayout

DUMP_VERSION = 2


class GroupDump(msgspec.Struct, frozen=True):
    """:param blocks: tier -> sequence hashes, ascending."""

    group_id: int
    blocks: dict[str, tuple[int, ...]]


class RankDump(msgspec.Struct, frozen=True):
    """:param worker_id: as ``id_text`` writes it."""

    worker_id: Annotated[str, Meta(pattern="^[0-9]{1,20}$")]
    dp_rank: int
    scored: bool
    layout: CacheLayout
    groups: tuple[GroupDump, ...]


class IndexDump(msgspec.Struct, frozen=True):
    version: int
    ranks: tuple[RankDump, ...]
