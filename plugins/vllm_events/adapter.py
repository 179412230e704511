"""vLLM's KV events, one at a time, turned into the host's engine events. No I/O.

* vLLM may hold several copies of a block in one group and removes each of them: copies are counted, and a
  block is gone with its last copy.
* A group that keeps only some blocks may list fewer than its event's tokens cover, and not say which ones.
  Where no other event of the batch says it, vLLM's names are computed: see naming.py.
* vLLM's cache groups stay apart, each a cache group of its own under its index: they share one pool of
  blocks, but each loses its own.
* Blocks whose tokens do not say all that they hold (multimodal, prompt embeddings) and copies outside the
  device are left out. That makes a prediction too low, never too high.
* vLLM's events carry no numbers, but its batches do: the receiver of the batches notices a loss and reports
  it with :meth:`VllmEventAdapter.lost`. Otherwise a lost removal would leave a copy that no event removes.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from vswa_plugin.blocks import CacheGroup, CacheLayout
from vswa_plugin.engine import (
    BlocksRemoved,
    BlocksStored,
    EngineBlock,
    EngineEvent,
    EngineHash,
    EventsLost,
    GroupCreated,
    check_chain,
)
from vswa_plugin.errors import ProtocolError

from . import fields
from .fields import CHUNKED, FULL, KINDS, SLIDING, Cleared, RawVllmEvent, Removed, Stored
from .named import Named, NamedBlocks, Namespace
from .naming import Naming

logger = logging.getLogger(__name__)

#: Tokens of stored blocks that may wait to be named before all that wait are.
_MAX_OPEN_TOKENS = 1_000_000


class VllmEventAdapter:
    """Adapter of one data-parallel rank. Not thread-safe.

    :param layout: the groups that the worker declared; an event that says another window or kind corrects it.
    """

    def __init__(self, layout: CacheLayout) -> None:
        self._groups = {group.group_id: group for group in layout.groups}
        self._unit, self._lookahead = layout.hash_block_size, layout.lookahead
        self._has_dense_group = self._is_dense()
        #: Copies on the device, by group.
        self._copies: dict[int, Counter[EngineHash]] = {group_id: Counter() for group_id in self._groups}
        self._named = NamedBlocks()
        self._naming = Naming(self._named, layout)
        self._open_tokens = 0

    @property
    def wants_prompts(self) -> bool:
        """Whether events may leave out names that a prompt gives: no full group has the finest blocks."""
        return self._naming.computes and not self._has_dense_group

    def _is_dense(self) -> bool:
        return any(g.kind == FULL and g.block_size == self._unit for g in self._groups.values())

    def prompt(self, token_ids: Sequence[int], cache_salt: str | None, lora_name: str | None) -> None:
        """A request with this prompt goes to the engine."""
        salted = cache_salt is None or isinstance(cache_salt, str)  # else the engine refuses the request
        if self.wants_prompts and not lora_name and salted:
            self._naming.wait(token_ids, cache_salt or None)

    def prepare(self) -> bool:
        """Hash a piece of what :meth:`prompt` was given; True where nothing is left."""
        return self._naming.prepare()

    def feed(self, raw: RawVllmEvent) -> list[EngineEvent]:
        """Events that ``raw``, of either encoding, means, in order.

        :raises ProtocolError: a field is not as vLLM writes it, or a block is its own ancestor. What the
            event said is lost, and it may have been a removal: no copy is counted on.
        """
        try:
            return self._read(fields.parse(raw))
        except ProtocolError:
            self._forget_all()
            raise

    def settle(self) -> list[EngineEvent]:
        """Blocks that no event has named and whose names can be computed.

        :raises ProtocolError: a block is its own ancestor; no copy is counted on.
        """
        if not self._naming.due:
            return []
        self._open_tokens = 0
        try:
            return self._settle()
        except ProtocolError:
            self._forget_all()
            raise

    def _read(self, event: Stored | Removed | Cleared) -> list[EngineEvent]:
        if isinstance(event, Stored):
            return self._read_stored(event) if fields.on_device(event) else []
        events = self.settle()
        if isinstance(event, Cleared):
            return events + self._clear()
        if not fields.on_device(event):
            return events
        return events + self._remove(self._group(event).group_id, fields.hashes(event))

    def _read_stored(self, event: Stored) -> list[EngineEvent]:
        group = self._group(event)
        listed = self._listed(group, event)
        events: list[EngineEvent] = []
        if self._open_tokens > _MAX_OPEN_TOKENS:
            events += self.settle()
        return events + self._corrected(group, event) + self._store(group.group_id, event, listed)

    def lost(self, expected_id: int, got_id: int) -> list[EngineEvent]:
        """Batches are missing before the next event: nothing is counted any more, nothing known as held.

        A block that is stored again counts one copy from then on, though older ones may be left: it is taken
        for gone too early rather than too late.

        :param expected_id: number of the first missing batch.
        :param got_id: number of the next one.
        """
        self._forget_all()
        return [EventsLost(expected_id, got_id)]

    def _group(self, event: Stored | Removed) -> CacheGroup:
        group_id = event.group_idx
        if group_id is None and len(self._groups) == 1:
            return next(iter(self._groups.values()))
        if group_id is None or group_id not in self._groups:
            declared = " or ".join(f"{i} (window {g.label})" for i, g in self._groups.items())
            name = f"Block{type(event).__name__}"
            raise ProtocolError(f"{name}: expected a group_idx of {declared}, got {group_id}")
        return self._groups[group_id]

    def _listed(self, group: CacheGroup, event: Stored) -> list[EngineHash]:
        """The listed blocks, once the event's parts are seen to fit together."""
        listed, parent = fields.hashes(event), fields.parent(event)
        where = f"BlockStored, group {group.group_id}"
        covered, rest = divmod(len(event.token_ids), event.block_size)
        # In a group of larger blocks an entry may end inside a block: then all of the event is listed.
        entry = event.block_size == self._unit and not rest and len(listed) == covered
        if event.block_size != group.block_size and not entry:
            raise ProtocolError(
                f"{where}: expected blocks of {group.block_size} tokens, as the layout states, got blocks of "
                f"{event.block_size}: two block sizes are mixed in one group"
            )
        # Refused before anything is counted, not in between.
        check_chain(parent, listed, where)
        if rest or len(listed) > covered:
            raise ProtocolError(
                f"{where}: expected at most a hash for each {event.block_size} tokens, "
                f"got {len(listed)} for {len(event.token_ids)} tokens, block_size {event.block_size}"
            )
        if len(event.extra_keys or listed) != len(listed):
            raise ProtocolError(
                f"{where}: expected extra_keys for each of {len(listed)} block_hashes, "
                f"got {len(event.extra_keys or ())}"
            )
        self._check_lookahead(event, len(listed), where)
        return listed

    def _check_lookahead(self, event: Stored, listed: int, where: str) -> None:
        ahead = event.lookahead_token_ids or []
        if not self._lookahead and not ahead:
            return
        wrong = next((len(each) for each in ahead if len(each) != self._lookahead), None)
        if wrong is not None or len(ahead) != listed:
            got = f"{len(ahead)} lists of them" if wrong is None else f"{wrong} for a block"
            raise ProtocolError(
                f"{where}: expected lookahead_token_ids of {self._lookahead} tokens, as the layout states, "
                f"for each of {listed} block_hashes, got {got}"
            )

    def _store(self, group_id: int, event: Stored, listed: list[EngineHash]) -> list[EngineEvent]:
        self._copies[group_id].update(listed)
        odd = fields.odd(event)
        dense = len(listed) * event.block_size == len(event.token_ids)
        new = self._name(event, listed) if dense else []
        for name in listed if not odd and not dense else ():
            self._named.hold(name)
        if not odd and self._naming.open(event, dense=dense):
            self._open_tokens += len(event.token_ids)
        events = list(self._stored(group_id, self._ready(listed)))
        for other in self._copies if new else ():
            if other != group_id:
                events += self._stored(other, self._ready(new))
        return events

    def _ready(self, names: list[EngineHash]) -> list[EngineHash]:
        """Those of which the host may know the parent; the others wait until :meth:`settle`."""
        if self._has_dense_group or not self._naming.computes:
            return names
        return [name for name in names if self._named.sure(name)]

    def _name(self, event: Stored, listed: list[EngineHash]) -> list[EngineHash]:
        """Note what consecutive blocks hold, as far as their tokens say it; the names that are new."""
        new: list[EngineHash] = []
        extra_keys = event.extra_keys or [None] * len(listed)
        ahead = event.lookahead_token_ids or [[]] * len(listed)
        parent, size = fields.parent(event), event.block_size
        self._named.check_rings(parent, listed)
        for index, (name, keys) in enumerate(zip(listed, extra_keys, strict=True)):
            namespace = self._namespace(event, parent, keys or [])
            if namespace is None:
                break
            if not self._named.sure(name):
                tokens = tuple(event.token_ids[index * size : (index + 1) * size])
                if self._named.hang(EngineBlock(name, tokens, tuple(ahead[index])), parent, namespace):
                    new.append(name)
            parent = name
        return new

    def _namespace(self, event: Stored, parent: EngineHash | None, keys: list[object]) -> Namespace | None:
        """Of one block; None where more than its tokens went into its hash."""
        if event.lora_id is not None or event.lora_name is not None:
            if event.lora_name is None:
                return None
            keys = keys[1:]
        if not keys:  # the salt is in the hash of the first block of a prefix only
            before = None if parent is None else self._named.get(parent)
            return Namespace(before and before.namespace.cache_salt, event.lora_name)
        if parent is None and len(keys) == 1 and isinstance(keys[0], str):
            return Namespace(keys[0], event.lora_name)
        return None

    def _stored(self, group_id: int, names: Iterable[EngineHash]) -> Iterator[EngineEvent]:
        """For those of ``names`` that are named and that the group holds; a run is one event."""
        run: list[Named] = []
        copies = self._copies[group_id]
        for name in names:
            named = self._named.get(name)
            if named is None or not copies[name]:
                continue
            if run and not _follows(named, run[-1]):
                yield _event(group_id, run)
                run = []
            run.append(named)
        if run:
            yield _event(group_id, run)

    def _remove(self, group_id: int, names: list[EngineHash]) -> list[EngineEvent]:
        copies = self._copies[group_id]
        removed = []
        for name in names:
            copies[name] -= 1
            # Passed on even if never counted: after a loss the block may be resident all the same.
            if copies[name] <= 0:
                del copies[name]
                removed.append(name)
                self._forget(name)
        return [BlocksRemoved(group_id, tuple(removed))] if removed else []

    def _forget(self, name: EngineHash) -> None:
        if not any(name in copies for copies in self._copies.values()):
            self._named.forget(name)

    def _clear(self) -> list[EngineEvent]:
        events: list[EngineEvent] = [
            BlocksRemoved(group_id, tuple(copies)) for group_id, copies in self._copies.items() if copies
        ]
        self._forget_all()
        return events

    def _forget_all(self) -> None:
        for copies in self._copies.values():
            copies.clear()
        self._named.clear()
        self._naming.close()
        self._open_tokens = 0

    def _corrected(self, group: CacheGroup, event: Stored) -> list[EngineEvent]:
        """Where the event says something else of its group: that, and once more all that is resident."""
        stated = fields.kind(event)
        if stated is None or _same(group, *stated):
            return []
        kind, window = stated
        if kind == CHUNKED:
            kind = fields.CHUNKED_KIND  # without the size of its chunks it cannot be followed
        if kind not in KINDS:
            logger.warning(
                "cache group %d is of the kind %s, which is not known: it is taken to need all blocks, so "
                "that promises are too low rather than too high",
                group.group_id,
                kind,
            )
        usual = kind in (FULL, SLIDING) and group.kind in (FULL, SLIDING)
        self._groups[group.group_id] = msgspec.structs.replace(
            group, window_size=window, stated_kind=None if usual else kind, chunk_size=None
        )
        self._has_dense_group = self._is_dense()
        events: list[EngineEvent] = [GroupCreated(group.group_id, window, kind=None if usual else kind)]
        for each, copies in self._copies.items():
            events += self._stored(each, list(copies))
        return events

    # -- blocks that no event names ------------------------------------------------------------------

    def _settle(self) -> list[EngineEvent]:
        events: list[EngineEvent] = []
        doubtful = [] if self._has_dense_group else list(self._named.fresh)
        chains = self._naming.settle()
        for chain in chains:
            # What hangs on a block must come after it, in whichever group it is.
            events += self._chain(chain)
        for group_id in self._copies if doubtful else ():
            # The host may know their parents even so.
            events += self._stored(group_id, [name for name in doubtful if name in self._named.unsure])
        return events

    def _chain(self, chain: list[Named]) -> list[EngineEvent]:
        """Of consecutive blocks of which some group holds the last; the others may be held by none."""
        names = [named.block.hash for named in chain]
        holders = [group_id for group_id, copies in self._copies.items() if names[-1] in copies]
        first = holders[0]
        absent = tuple(name for name in names if name not in self._copies[first])
        events: list[EngineEvent] = [_event(first, chain)]
        if absent:
            events.append(BlocksRemoved(first, absent))
        for other in self._copies:
            if other != first:
                events += self._stored(other, names)
        for name in absent:
            self._forget(name)
        return events


def _event(group_id: int, run: list[Named]) -> BlocksStored:
    salt, lora = run[0].namespace
    blocks = tuple(named.block for named in run)
    return BlocksStored(group_id, run[0].parent_hash, blocks, cache_salt=salt, lora_name=lora)


def _follows(named: Named, before: Named) -> bool:
    return named.parent_hash == before.block.hash and named.namespace == before.namespace


def _same(group: CacheGroup, kind: str, window: int | None) -> bool:
    """Whether the layout states of the group what an event says."""
    if kind == group.kind:
        return kind != SLIDING or window == group.window_size
    if kind == CHUNKED:
        return group.kind == fields.CHUNKED_KIND
    return kind not in KINDS and group.kind not in KINDS  # by whatever name each of them calls it
