"""TensorRT-LLM's KV event JSON, one object at a time, turned into the host's engine events. No I/O.

Blocks that cannot be named by their tokens alone are left out, and with them everything that hangs on
them and every later event about them: partial blocks, multimodal ones, those with extra token ids, and those
whose hash shows that a salt or a LoRA is in it that the event does not name. Leaving a block out makes a
prediction too low, never too high.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import islice

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
    check_chain,
)
from vswa_plugin.errors import ProtocolError, unknown_choice

from . import fields
from .chains import Chains, Run
from .fields import Stored, StoredBlock
from .groups import Groups
from .hashing import HASH_ALGO
from .unannounced import Found, Lost, Unannounced

logger = logging.getLogger(__name__)

#: A worker that serves LoRA adapters adds this key to the ``data`` of ``stored`` events.
LORA_SERVED = "lora_served"

#: Blocks that no tokens can name: so many are still known as that after a loss, about 300 bytes each.
MAX_UNNAMEABLE = 100_000

_CONTIGUOUS = "trtllm_v1_contiguous"
_V1_RULES = ("trtllm_v1", _CONTIGUOUS)


class TrtllmEventAdapter:
    """Adapter of one worker; keeps the events of each attention-DP rank apart. Not thread-safe.

    :param layout: the groups that the worker declared, which the engine's events may correct, and the rule:
        what manager V1's events leave out is recovered by :mod:`.unannounced` under ``trtllm_v1``, by
        :mod:`.chains` under ``trtllm_v1_contiguous``. Where LoRA is served the
        latter checks the hashes under every other rule too.
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

        Ids start at 0 and count up by one per rank. A skip, or an id that goes back as those of an engine
        that started again, is reported before the event is read any further; what was lost cannot be
        requested again.

        :raises ProtocolError: a field is not as TensorRT-LLM writes it, or a block is its own ancestor. The
            id is consumed, and what the event said is lost: it may have been a removal. A loss found in the
            same event is reported with the rank's next one.
        """
        event_id = fields.integer(raw, "event_id", "an event")
        rank = self._rank(raw)
        rank.see(event_id)
        announced = rank.announced
        try:
            events = self._read(raw, rank, f"event {event_id}")
        except ProtocolError:
            rank.lose_track()
            rank.announced = announced  # what it said of the groups did not reach the host
            raise
        lost, rank.lost = rank.lost, None
        return events if lost is None else [lost, *events]

    def _rank(self, raw: RawEvent) -> _Rank:
        dp_rank = 0
        if raw.get("attention_dp_rank") is not None:
            dp_rank = fields.integer(raw, "attention_dp_rank", "an event")
        if dp_rank not in self._ranks:
            unannounced = Unannounced(self._groups, self._block_size)
            self._ranks[dp_rank] = _Rank(dp_rank, self._declared, unannounced)
        return self._ranks[dp_rank]

    def _read(self, raw: RawEvent, rank: _Rank, where: str) -> list[EngineEvent]:
        data = fields.mapping(raw, "data", where)
        kind = fields.text(data, "type", f"{where}, data")
        readers = {"stored": self._stored, "removed": self._removed, "updated": self._updated}
        if kind != "created" and kind not in readers:
            raise ProtocolError(f"{where}: {unknown_choice('event type', kind, ('created', *readers))}")
        created = kind == "created"
        # Before anything is learnt from an event that may be refused.
        num_blocks = fields.created(data, where) if created else None
        if created:
            rank.created += 1
        elif rank.only_created:
            rank.only_created = False
            if rank.created:
                self._groups.close()
        group_id = self._groups.group_of(raw, where, created=created)
        if num_blocks is not None:
            rank.unannounced.created(group_id, num_blocks)
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
                rank.announced = {**rank.announced, other: window}
        for absent in rank.announced.keys() - windows.keys():
            rank.announced = {other: w for other, w in rank.announced.items() if other != absent}
            events.append(GroupCreated(absent, NO_SUCH_GROUP, rank.dp_rank))
        return events

    def _stored(self, raw: RawEvent, group_id: int, rank: _Rank, where: str) -> list[EngineEvent]:
        data = raw["data"]
        stored = fields.stored(data, self._block_size, where)
        check_chain(stored.parent_hash, [block.hash for block in stored.blocks], where)
        if self._infers(raw):
            strict = bool(data.get(LORA_SERVED))
            changes = rank.unannounced.stored(group_id, stored, where, strict=strict)
            return self._events_of(changes, rank)
        nameable = rank.without_unnameable(stored, group_id, self._block_size)
        runs = self._chained(raw, nameable, group_id, rank, where)
        return self._events_of([Found(group_id, run.parent_hash, run.blocks, stored) for run in runs], rank)

    def _events_of(self, changes: Sequence[Found | Lost], rank: _Rank) -> list[EngineEvent]:
        events: list[EngineEvent] = []
        for change in changes:
            if isinstance(change, Lost):
                events.append(BlocksRemoved(change.group_id, tuple(change.names), dp_rank=rank.dp_rank))
                continue
            parent = change.parent
            for part in _parts_of_one_tier(change.blocks):
                events.append(
                    BlocksStored(
                        change.group_id,
                        parent,
                        tuple(EngineBlock(block.hash, block.token_ids) for block in part),
                        tier=part[0].tier,
                        cache_salt=change.stored.cache_salt,
                        lora_name=change.stored.lora_name,
                        dp_rank=rank.dp_rank,
                    )
                )
                parent = part[-1].hash
        return events

    def _infers(self, raw: RawEvent) -> bool:
        """Whether the engine leaves out what :mod:`.unannounced` infers."""
        return self._rule == "trtllm_v1" and self._is_v1(raw)

    def _chained(self, raw: RawEvent, stored: Stored, group_id: int, rank: _Rank, where: str) -> list[Run]:
        """Blocks with their true parents. Manager V2 names them; V1 may leave blocks out between two."""
        strict = bool(raw["data"].get(LORA_SERVED))
        if not stored.blocks:
            return []
        if not (strict or self._is_v1(raw)):
            return [Run(stored.parent_hash, stored.blocks)]
        runs, named = rank.chains.verified(group_id, stored, strict=strict)
        rank.leave_out(stored.blocks[named:], group_id)
        if rank.lossy and self._rule == _CONTIGUOUS:
            runs = rank.chains.anchored(group_id, runs)
        for run in runs:
            rank.chains.store(group_id, run, where)
        return runs

    def _removed(self, raw: RawEvent, group_id: int, rank: _Rank, where: str) -> list[EngineEvent]:
        removed = fields.removed(raw["data"], where)
        if self._infers(raw):
            return self._events_of(rank.unannounced.removed(group_id, removed), rank)
        hashes: list[EngineHash] = []
        silent = self._rule == _CONTIGUOUS
        for block_hash in removed:
            if not rank.forget(block_hash, group_id):
                hashes += rank.chains.remove(group_id, block_hash, with_descendants=silent)
        return [BlocksRemoved(group_id, tuple(hashes), dp_rank=rank.dp_rank)] if hashes else []

    def _updated(self, raw: RawEvent, group_id: int, rank: _Rank, where: str) -> list[EngineEvent]:
        block_hash, tier = fields.updated(raw["data"], where)
        if self._infers(raw):
            name = rank.unannounced.published(group_id, block_hash)
            if tier is None or name is None:
                return []
            return [BlocksMoved(group_id, (name,), tier, dp_rank=rank.dp_rank)]
        if tier is None or rank.leaves_out(block_hash, group_id):
            return []
        return [BlocksMoved(group_id, (block_hash,), tier, dp_rank=rank.dp_rank)]

    def _is_v1(self, raw: RawEvent) -> bool:
        """Whether manager V1 named the event's blocks as :mod:`.hashing` does."""
        own_names = raw.get("hash_algo", HASH_ALGO) == HASH_ALGO
        return own_names and self._rule in _V1_RULES and raw.get("layer_group_id") is None

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

    def __init__(self, dp_rank: int, declared: Mapping[int, int | None], unannounced: Unannounced) -> None:
        self.dp_rank = dp_rank
        self.unannounced = unannounced
        #: Windows by group as the host knows them; a new one for each change.
        self.announced = dict(declared)
        #: A loss that is not reported yet.
        self.lost: EventsLost | None = None
        self.chains = Chains()
        #: Whether events were ever lost.
        self.lossy = False
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
        if self.lost is None:
            self.lost = EventsLost(expected, event_id, self.dp_rank)
        self.lose_track()

    def lose_track(self) -> None:
        """An event was lost: what is held is not known any more.

        Removals of partial blocks may be among the lost: without this they would pile up. A removal of one
        that was left out is then passed on, and means nothing to its reader. What no tokens can name stays
        known as that, up to a limit: beyond it, what hangs on the oldest is passed on, and is left out by its
        reader, which knows no such parent.
        """
        self.lossy = True
        self.only_created = False  # what is missing may have been one of those
        self._partial.clear()
        self.chains.clear()
        self.unannounced.clear()
        excess = len(self._unnameable) - MAX_UNNAMEABLE
        for oldest in list(islice(self._unnameable, max(0, excess))):
            del self._unnameable[oldest]

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
        """Remember that these blocks of that group are left out, but for what was believed and is held."""
        for block in blocks:
            if self.chains.holds(group_id, block.hash):
                continue  # its removal must be passed on
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
