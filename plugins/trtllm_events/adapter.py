"""TensorRT-LLM's KV event JSON, one object at a time, turned into the host's engine events. No I/O.

Blocks that cannot be named by their tokens alone are left out, and with them everything that hangs on
them and every later event about them: partial blocks, multimodal ones, those with extra token ids, and those
whose hash shows that a salt or a LoRA is in it that the event does not name. Leaving a block out makes a
prediction too low, never too high.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from vswa_plugin.blocks import CacheLayout
from vswa_plugin.engine import (
    NO_SUCH_GROUP,
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

from . import fields
from .chains import Chains, Run
from .fields import Stored, StoredBlock
from .groups import Groups
from .hashing import HASH_ALGO

logger = logging.getLogger(__name__)

#: A worker that serves LoRA adapters adds this key to the ``data`` of ``stored`` events.
LORA_SERVED = "lora_served"

_V1_RULES = ("trtllm_v1", "trtllm_v1_contiguous")


class TrtllmEventAdapter:
    """Adapter of one worker; keeps the events of each attention-DP rank apart. Not thread-safe.

    :param layout: the groups that the worker declared, which the engine's events may correct, and the rule:
        under those of manager V1 what its events leave unsaid is recovered (:mod:`.chains`).
    """

    def __init__(self, layout: CacheLayout) -> None:
        self._groups = Groups(layout)
        self._declared = dict(self._groups.windows)
        self._block_size = layout.block_size
        self._rule = layout.rule
        self._ranks: dict[int, _Rank] = {}
        self._warned = False

    def feed(self, raw: RawEvent) -> list[EngineEvent]:
        """Events that ``raw`` means, in order.

        Ids start at 0 and count up by one per rank. A skip is reported before the event is read any further;
        what was lost cannot be requested again.

        :raises ProtocolError: a field is not as TensorRT-LLM writes it. The id is consumed, and what the
            event said is lost: it may have been a removal. A loss found in the same event is reported with
            the rank's next one.
        """
        event_id = fields.integer(raw, "event_id", "an event")
        rank = self._rank(raw)
        rank.see(event_id)
        events = self._read(raw, rank, f"event {event_id}")
        lost, rank.lost = rank.lost, None
        return events if lost is None else [lost, *events]

    def _rank(self, raw: RawEvent) -> _Rank:
        dp_rank = 0
        if raw.get("attention_dp_rank") is not None:
            dp_rank = fields.integer(raw, "attention_dp_rank", "an event")
        if dp_rank not in self._ranks:
            self._ranks[dp_rank] = _Rank(dp_rank, self._declared)
        return self._ranks[dp_rank]

    def _read(self, raw: RawEvent, rank: _Rank, where: str) -> list[EngineEvent]:
        data = fields.mapping(raw, "data", where)
        kind = fields.text(data, "type", f"{where}, data")
        readers = {"stored": self._stored, "removed": self._removed, "updated": self._updated}
        if kind != "created" and kind not in readers:
            raise ProtocolError(f"{where}: {unknown_choice('event type', kind, ('created', *readers))}")
        created = kind == "created"
        if created:
            rank.created += 1
        elif rank.only_created:
            rank.only_created = False
            if rank.created:
                self._groups.close()
        group_id = self._groups.group_of(raw, where, created=created)
        events = self._corrected(rank, group_id if created else None)
        if not created:
            self._check_manager(raw)
            events += readers[kind](raw, group_id, rank, where)
        return events

    def _corrected(self, rank: _Rank, group_id: int | None) -> list[EngineEvent]:
        """What the host does not know of the groups, and that group's window in any case."""
        events: list[EngineEvent] = []
        windows = self._groups.windows
        for other, window in windows.items():
            if rank.only_created and window is not None and window % self._block_size:
                continue  # no real window: the global one, clamped by memory, which is clear in the end
            if other == group_id or rank.announced.get(other, NO_SUCH_GROUP) != window:
                events.append(GroupCreated(other, window, rank.dp_rank))
            rank.announced[other] = window
        for absent in rank.announced.keys() - windows.keys():
            del rank.announced[absent]
            events.append(GroupCreated(absent, NO_SUCH_GROUP, rank.dp_rank))
        return events

    def _stored(self, raw: RawEvent, group_id: int, rank: _Rank, where: str) -> list[EngineEvent]:
        data = raw["data"]
        stored = fields.stored(data, self._block_size, where)
        nameable = rank.without_unnameable(stored, group_id, self._block_size)
        events: list[EngineEvent] = []
        for run in self._chained(raw, nameable, group_id, rank):
            parent = run.parent_hash
            for part in _parts_of_one_tier(run.blocks):
                events.append(
                    BlocksStored(
                        group_id,
                        parent,
                        tuple(EngineBlock(block.hash, block.token_ids) for block in part),
                        tier=part[0].tier,
                        cache_salt=stored.cache_salt,
                        lora_name=stored.lora_name,
                        dp_rank=rank.dp_rank,
                    )
                )
                parent = part[-1].hash
        return events

    def _chained(self, raw: RawEvent, stored: Stored, group_id: int, rank: _Rank) -> list[Run]:
        """Blocks with their true parents. Manager V2 names them; V1 may leave blocks out between two."""
        strict = bool(raw["data"].get(LORA_SERVED))
        own_names = raw.get("hash_algo", HASH_ALGO) == HASH_ALGO
        if not stored.blocks or not ((self._is_v1(raw) and own_names) or strict):
            return [Run(stored.parent_hash, stored.blocks)] if stored.blocks else []
        runs, named = rank.chains.verified(group_id, stored, strict=strict)
        rank.leave_out(stored.blocks[named:], group_id)
        for run in runs:
            rank.chains.store(group_id, run)
        return runs

    def _removed(self, raw: RawEvent, group_id: int, rank: _Rank, where: str) -> list[EngineEvent]:
        hashes: list[EngineHash] = []
        silent = self._rule == "trtllm_v1_contiguous"
        for block_hash in fields.removed(raw["data"], where):
            if not rank.forget(block_hash, group_id):
                hashes += rank.chains.remove(group_id, block_hash, with_descendants=silent)
        return [BlocksRemoved(group_id, tuple(hashes), dp_rank=rank.dp_rank)] if hashes else []

    def _updated(self, raw: RawEvent, group_id: int, rank: _Rank, where: str) -> list[EngineEvent]:
        block_hash, tier = fields.updated(raw["data"], where)
        if tier is None or rank.leaves_out(block_hash, group_id):
            return []
        return [BlocksMoved(group_id, (block_hash,), tier, dp_rank=rank.dp_rank)]

    def _is_v1(self, raw: RawEvent) -> bool:
        return self._rule in _V1_RULES and raw.get("layer_group_id") is None

    def _check_manager(self, raw: RawEvent) -> None:
        """Warn once where the events are those of another cache manager than the rule is for."""
        is_v2 = raw.get("layer_group_id") is not None
        if self._warned or not self._rule.startswith("trtllm_") or is_v2 == (self._rule == "trtllm_v2"):
            return
        self._warned = True
        logger.warning(
            "reuse rule %s, but the events are those of KV cache manager %s: predictions may be wrong; set "
            "reuse_rule to %s",
            self._rule,
            "V2" if is_v2 else "V1",
            "trtllm_v2" if is_v2 else " or ".join(_V1_RULES),
        )


class _Rank:
    """What is remembered of one attention-DP rank."""

    def __init__(self, dp_rank: int, declared: Mapping[int, int | None]) -> None:
        self.dp_rank = dp_rank
        #: Windows by group as the host knows them.
        self.announced = dict(declared)
        #: A loss that is not reported yet.
        self.lost: EventsLost | None = None
        self.chains = Chains()
        self.created = 0
        #: Nothing else has come yet, and nothing is missing.
        self.only_created = True
        self._next_id = 0
        self._partial: dict[int, set[EngineHash]] = {}
        # By block, not by group: a sliding group may store a block whose parent only the global one holds.
        self._unnameable: dict[EngineHash, set[int]] = {}

    def see(self, event_id: int) -> None:
        expected, self._next_id = self._next_id, event_id + 1
        if event_id == expected:
            return
        self.only_created = False
        if self.lost is None:
            self.lost = EventsLost(expected, event_id, self.dp_rank)
        # Removals of these may be among the lost: without this they would pile up. A removal of one that
        # was left out is then passed on, and means nothing to its reader.
        self._partial.clear()
        self.chains.clear()

    def without_unnameable(self, stored: Stored, group_id: int, block_size: int) -> Stored:
        """With the leading blocks that tokens name; the others are remembered as left out."""
        nameable: list[StoredBlock] = []
        tainted = self._is_left_out(stored.parent_hash)
        for block in stored.blocks:
            if tainted or not block.nameable:
                tainted = True
                self.leave_out([block], group_id)
            elif len(block.token_ids) < block_size:
                tainted = True
                self._partial.setdefault(group_id, set()).add(block.hash)
            else:
                nameable.append(block)
        return Stored(stored.parent_hash, nameable, stored.cache_salt, stored.lora_name, stored.lora_id)

    def leave_out(self, blocks: list[StoredBlock], group_id: int) -> None:
        """Remember that these blocks of that group are left out."""
        for block in blocks:
            self._unnameable.setdefault(block.hash, set()).add(group_id)

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


def _parts_of_one_tier(blocks: list[StoredBlock]) -> list[list[StoredBlock]]:
    parts: list[list[StoredBlock]] = []
    for block in blocks:
        if parts and parts[-1][0].tier == block.tier:
            parts[-1].append(block)
        else:
            parts.append([block])
    return parts
