"""TensorRT-LLM's KV event JSON, one object at a time, turned into the host's engine events. No I/O.

Blocks that cannot be named by their tokens alone are left out, and with them everything that hangs on
them and every later word about them: partial blocks, multimodal ones, and those with extra token ids.
Leaving a block out makes a prediction too low, never too high.
"""

from __future__ import annotations

from collections.abc import Mapping

from vswa_plugin.engine import (
    BlocksMoved,
    BlocksRemoved,
    BlocksStored,
    EngineBlock,
    EngineEvent,
    EngineHash,
    EventsLost,
    GroupCreated,
    RawEvent,
)
from vswa_plugin.errors import ProtocolError, unknown_choice
from vswa_plugin.layout import CacheLayout

from . import fields
from .fields import Stored, StoredBlock


class TrtllmEventAdapter:
    """Adapter of one worker; keeps apart what each attention-DP rank says. Not thread-safe.

    :param layout: the groups that the worker declared; ``created`` events may correct it. Events without a
        layer group id are joined to groups by window.
    """

    def __init__(self, layout: CacheLayout) -> None:
        self._declared_windows = {group.window_size for group in layout.groups}
        #: As events with a layer group id gave them; the global group's is a number here.
        self._created_windows: dict[int, int] = {}
        self._windows = {group.group_id: group.window_size for group in layout.groups}
        self._block_size = layout.block_size
        self._ranks: dict[int, _Rank] = {}

    def feed(self, raw: RawEvent) -> list[EngineEvent]:
        """Events that ``raw`` means, in order.

        Ids start at 0 and count up by one per rank. A skip is told before anything else is looked at; what
        was lost cannot be asked for again.

        :raises ProtocolError: a field is not as TensorRT-LLM writes it. The id is consumed, and what the
            event said is lost: it may have been a removal. A loss found in the same event is told with the
            rank's next one.
        """
        event_id = fields.integer(raw, "event_id", "an event")
        rank = self._rank(raw)
        rank.see(event_id)
        told = self._read(raw, rank, f"event {event_id}")
        lost, rank.lost = rank.lost, None
        return told if lost is None else [lost, *told]

    def _rank(self, raw: RawEvent) -> _Rank:
        dp_rank = 0
        if raw.get("attention_dp_rank") is not None:
            dp_rank = fields.integer(raw, "attention_dp_rank", "an event")
        return self._ranks.setdefault(dp_rank, _Rank(dp_rank))

    def _read(self, raw: RawEvent, rank: _Rank, where: str) -> list[EngineEvent]:
        data = fields.mapping(raw, "data", where)
        kind = fields.text(data, "type", f"{where}, data")
        if kind == "created":
            return self._created(raw, rank, where)
        reader = {"stored": self._stored, "removed": self._removed, "updated": self._updated}.get(kind)
        if reader is None:
            known = ("created", "stored", "removed", "updated")
            raise ProtocolError(f"{where}: {unknown_choice('event type', kind, known)}")
        return reader(data, self._group_id(raw, where), rank, where)

    def _created(self, raw: RawEvent, rank: _Rank, where: str) -> list[EngineEvent]:
        """The group, and any other whose window turns out to be real because this one's is larger."""
        window = fields.optional_integer(raw, "window_size", where)
        group_id = fields.optional_integer(raw, "layer_group_id", where)
        if group_id is None:
            group_id = self._by_window(window, where)
        if window is not None:
            self._created_windows[group_id] = window
        before = dict(self._windows)
        for known, created in self._created_windows.items():
            is_global = self._is_global(created) and created == max(self._created_windows.values())
            self._windows[known] = None if is_global else created
        return [
            GroupCreated(known, now, rank.dp_rank)
            for known, now in self._windows.items()
            if known == group_id or before.get(known, now) != now
        ]

    def _stored(
        self, data: Mapping[str, object], group_id: int, rank: _Rank, where: str
    ) -> list[EngineEvent]:
        stored = fields.stored(data, self._block_size, where)
        kept = rank.without_unnameable(stored, group_id, self._block_size)
        told: list[EngineEvent] = []
        parent = stored.parent_hash
        for run in _runs_of_one_tier(kept):
            blocks = tuple(EngineBlock(block.hash, block.token_ids) for block in run)
            tier, salt = run[0].tier, stored.cache_salt
            told.append(
                BlocksStored(group_id, parent, blocks, tier=tier, cache_salt=salt, dp_rank=rank.dp_rank)
            )
            parent = run[-1].hash
        return told

    def _removed(
        self, data: Mapping[str, object], group_id: int, rank: _Rank, where: str
    ) -> list[EngineEvent]:
        hashes = fields.removed(data, where)
        known = tuple(block_hash for block_hash in hashes if not rank.forget(block_hash, group_id))
        return [BlocksRemoved(group_id, known, dp_rank=rank.dp_rank)] if known else []

    def _updated(
        self, data: Mapping[str, object], group_id: int, rank: _Rank, where: str
    ) -> list[EngineEvent]:
        block_hash, tier = fields.updated(data, where)
        if tier is None or rank.leaves_out(block_hash, group_id):
            return []
        return [BlocksMoved(group_id, (block_hash,), tier, dp_rank=rank.dp_rank)]

    def _group_id(self, raw: RawEvent, where: str) -> int:
        group_id = fields.optional_integer(raw, "layer_group_id", where)
        if group_id is None:
            return self._by_window(fields.optional_integer(raw, "window_size", where), where)
        if group_id not in self._windows:
            raise ProtocolError(f"{where}: expected a layer_group_id of {self._declared()}, got {group_id}")
        return group_id

    def _by_window(self, window: int | None, where: str) -> int:
        if window is None and len(self._windows) == 1:
            return next(iter(self._windows))
        if window is not None:
            wanted = None if self._is_global(window) else window
            for group_id, known in self._windows.items():
                if known == wanted:
                    return group_id
        raise ProtocolError(
            f"{where}: expected a layer_group_id or the window_size of {self._declared()}, "
            f"got window_size {window}"
        )

    def _is_global(self, window: int) -> bool:
        """The engine gives a global group its longest sequence for a window: more than any real window."""
        return None in self._declared_windows and all(w is None or window > w for w in self._declared_windows)

    def _declared(self) -> str:
        groups = self._windows.items()
        return " or ".join(f"{i} (window {'global' if w is None else w})" for i, w in groups)


class _Rank:
    """What is remembered of one attention-DP rank."""

    def __init__(self, dp_rank: int) -> None:
        self.dp_rank = dp_rank
        #: A loss that is not told yet.
        self.lost: EventsLost | None = None
        self._next_id = 0
        self._partial: dict[int, set[EngineHash]] = {}
        # By block, not by group: a sliding group may store a block whose parent only the global one holds.
        self._unnameable: dict[EngineHash, set[int]] = {}

    def see(self, event_id: int) -> None:
        expected, self._next_id = self._next_id, event_id + 1
        if event_id == expected:
            return
        if self.lost is None:
            self.lost = EventsLost(expected, event_id, self.dp_rank)
        # Removals of these may be among the lost: without this they would pile up. A removal of one that
        # was left out is then passed on, and means nothing to its reader.
        self._partial.clear()

    def without_unnameable(self, stored: Stored, group_id: int, block_size: int) -> list[StoredBlock]:
        """Leading blocks that tokens name; the others are remembered as left out."""
        kept: list[StoredBlock] = []
        tainted = self._is_left_out(stored.parent_hash)
        for block in stored.blocks:
            if tainted or not block.nameable:
                tainted = True
                self._unnameable.setdefault(block.hash, set()).add(group_id)
            elif len(block.token_ids) < block_size:
                tainted = True
                self._partial.setdefault(group_id, set()).add(block.hash)
            else:
                kept.append(block)
        return kept

    def leaves_out(self, block_hash: EngineHash, group_id: int) -> bool:
        """Whether that group's block was left out."""
        in_group = group_id in self._unnameable.get(block_hash, ())
        return in_group or block_hash in self._partial.get(group_id, ())

    def forget(self, block_hash: EngineHash, group_id: int) -> bool:
        """Take back that the block was left out; False if it was not."""
        if not self.leaves_out(block_hash, group_id):
            return False
        self._partial.get(group_id, set()).discard(block_hash)
        groups = self._unnameable.get(block_hash, set())
        groups.discard(group_id)
        if not groups:
            self._unnameable.pop(block_hash, None)
        return True

    def _is_left_out(self, block_hash: EngineHash | None) -> bool:
        if block_hash is None:
            return False
        return block_hash in self._unnameable or any(block_hash in held for held in self._partial.values())


def _runs_of_one_tier(blocks: list[StoredBlock]) -> list[list[StoredBlock]]:
    runs: list[list[StoredBlock]] = []
    for block in blocks:
        if runs and runs[-1][0].tier == block.tier:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs
