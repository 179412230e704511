"""vLLM's KV events, one at a time, turned into the host's engine events. No I/O.

* vLLM may hold several copies of a block in one group and removes each of them: copies are counted, and a
  block is gone with its last copy.
* A sliding group's event may list fewer blocks than its tokens cover, and not say which ones. They are held
  back until the global group's event over the same tokens, next in the batch, says it; where none does,
  vLLM's hashes are computed.
* vLLM's cache groups stay apart, each a cache group of its own under its index: they share one pool of
  blocks, but each loses its own.
* Blocks whose tokens do not say all that they hold (multimodal, prompt embeddings) and copies outside the
  device are left out. That makes a prediction too low, never too high.
* vLLM's events carry no numbers, but its batches do: the receiver of the batches notices a loss and reports
  it with :meth:`VllmEventAdapter.lost`. Otherwise a lost removal would leave a copy that no event removes.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from vswa_plugin.blocks import CacheLayout
from vswa_plugin.engine import (
    BlocksRemoved,
    BlocksStored,
    EngineBlock,
    EngineEvent,
    EngineHash,
    EventsLost,
    GroupCreated,
    check_chain,
    ring_closed,
)
from vswa_plugin.errors import ProtocolError

from . import digests, fields
from .fields import Cleared, RawVllmEvent, Removed, Stored

#: Kept only where blocks must be named by computing; about 150 bytes each.
_MAX_DIGESTS = 500_000


class _Namespace(NamedTuple):
    """What keeps equal tokens apart."""

    cache_salt: str | None
    lora_name: str | None


class _Named(NamedTuple):
    """A block of which the place in its sequence is known."""

    parent_hash: EngineHash | None
    block: EngineBlock
    namespace: _Namespace


class VllmEventAdapter:
    """Adapter of one data-parallel rank. Not thread-safe.

    :param layout: the groups that the worker declared; an event that says another window corrects it.
    """

    def __init__(self, layout: CacheLayout) -> None:
        self._block_size = layout.block_size
        self._windows = {group.group_id: group.window_size for group in layout.groups}
        #: Copies on the device, by group.
        self._copies: dict[int, Counter[EngineHash]] = {group_id: Counter() for group_id in self._windows}
        #: Only blocks of which some group has a copy.
        self._named: dict[EngineHash, _Named] = {}
        #: How many of these hang on a block, named or not.
        self._below: dict[EngineHash | None, int] = {}
        #: An event with blocks that no event has named yet.
        self._open: Stored | None = None
        self._digests: OrderedDict[EngineHash, bytes] = OrderedDict()

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

    def _read(self, event: Stored | Removed | Cleared) -> list[EngineEvent]:
        events = self._settle(event)
        if isinstance(event, Cleared):
            return self._clear()
        if not fields.on_device(event):
            return events
        group_id = self._group_id(event)
        if isinstance(event, Removed):
            return events + self._remove(group_id, fields.hashes(event))
        listed = self._listed(group_id, event)
        return events + self._corrected(group_id, event) + self._store(group_id, event, listed)

    def lost(self, expected_id: int, got_id: int) -> list[EngineEvent]:
        """Batches are missing before the next event: nothing is counted any more, nothing known as held.

        A block that is stored again counts one copy from then on, though older ones may be left: it is taken
        for gone too early rather than too late.

        :param expected_id: number of the first missing batch.
        :param got_id: number of the next one.
        """
        self._forget_all()
        return [EventsLost(expected_id, got_id)]

    def _group_id(self, event: Stored | Removed) -> int:
        group_id = event.group_idx
        if group_id is None and len(self._windows) == 1:
            return next(iter(self._windows))
        if group_id is None or group_id not in self._windows:
            declared = " or ".join(f"{i} (window {w or 'global'})" for i, w in self._windows.items())
            name = f"Block{type(event).__name__}"
            raise ProtocolError(f"{name}: expected a group_idx of {declared}, got {group_id}")
        return group_id

    def _listed(self, group_id: int, event: Stored) -> list[EngineHash]:
        """The listed blocks, once the event's parts are seen to fit together."""
        listed, parent = fields.hashes(event), fields.parent(event)
        if event.block_size != self._block_size:
            raise ProtocolError(
                f"BlockStored, group {group_id}: expected blocks of {self._block_size} tokens, as the layout "
                f"states, got blocks of {event.block_size}: two block sizes are mixed, which is not supported"
            )
        # Refused before anything is counted, not in between.
        check_chain(parent, listed, f"BlockStored, group {group_id}")
        covered, rest = divmod(len(event.token_ids), event.block_size)
        if rest or len(listed) > covered:
            raise ProtocolError(
                f"BlockStored, group {group_id}: expected at most a hash for each {self._block_size} tokens, "
                f"got {len(listed)} for {len(event.token_ids)} tokens, block_size {event.block_size}"
            )
        if len(event.extra_keys or listed) != len(listed):
            raise ProtocolError(
                f"BlockStored, group {group_id}: expected extra_keys for each of {len(listed)} block_hashes, "
                f"got {len(event.extra_keys or ())}"
            )
        return listed

    def _store(self, group_id: int, event: Stored, listed: list[EngineHash]) -> list[EngineEvent]:
        covered = len(event.token_ids) // self._block_size
        self._copies[group_id].update(listed)
        new = self._name(event, listed) if len(listed) == covered else []
        events = list(self._stored(group_id, listed))
        for other in self._copies if new else ():
            if other != group_id:
                events += self._stored(other, new)
        if len(listed) < covered and self._unnamed(listed):
            self._open = event
        return events

    def _name(self, event: Stored, listed: list[EngineHash]) -> list[EngineHash]:
        """Note what consecutive blocks hold, as far as their tokens say it; the names that are new."""
        new: list[EngineHash] = []
        extra_keys = event.extra_keys or [None] * len(listed)
        parent = fields.parent(event)
        self._check_rings(parent, listed)
        for name, token_ids, keys in zip(listed, self._blocks(event), extra_keys, strict=True):
            namespace = self._namespace(event, parent, keys or [])
            if namespace is None:
                break
            if self._hang(name, parent, token_ids, namespace):
                new.append(name)
            parent = name
        return new

    def _hang(
        self, name: EngineHash, parent: EngineHash | None, token_ids: tuple[int, ...], namespace: _Namespace
    ) -> bool:
        """Whether the block is new; one that is named keeps what it is, and its parent is the latest."""
        known = self._named.get(name)
        if known is None:
            self._named[name] = _Named(parent, EngineBlock(name, token_ids), namespace)
        elif known.parent_hash != parent:
            self._unhang(known)
            self._named[name] = known._replace(parent_hash=parent)
        else:
            return False
        self._below[parent] = self._below.get(parent, 0) + 1
        return known is None

    def _unhang(self, named: _Named) -> None:
        parent = named.parent_hash
        left = self._below[parent] - 1
        if left:
            self._below[parent] = left
        else:
            del self._below[parent]

    def _check_rings(self, parent: EngineHash | None, names: list[EngineHash]) -> None:
        """Refuse a chain below ``parent`` that has a block of it among its own parents.

        So no ring is ever stored, and every walk up from a block ends. Only a block that something hangs on
        already can close one, as where a child came before its parent; then the walk is made once for all.
        """
        known, before = self._named, parent
        if self._below.keys().isdisjoint(names):
            return
        for name in names:
            if name not in known or known[name].parent_hash != before:
                break
            before = name
        else:
            return
        inside, above = set(names), parent
        while above is not None:
            if above in inside:
                raise ring_closed("BlockStored", above, parent)
            named = known.get(above)
            above = None if named is None else named.parent_hash

    def _namespace(self, event: Stored, parent: EngineHash | None, keys: list[object]) -> _Namespace | None:
        """Of one block; None where more than its tokens went into its hash."""
        if event.lora_id is not None or event.lora_name is not None:
            if event.lora_name is None:
                return None
            keys = keys[1:]
        if not keys:  # the salt is in the hash of the first block of a prefix only
            before = None if parent is None else self._named.get(parent)
            return _Namespace(before and before.namespace.cache_salt, event.lora_name)
        if parent is None and len(keys) == 1 and isinstance(keys[0], str):
            return _Namespace(keys[0], event.lora_name)
        return None

    def _blocks(self, event: Stored) -> list[tuple[int, ...]]:
        size = self._block_size
        return [tuple(event.token_ids[at : at + size]) for at in range(0, len(event.token_ids), size)]

    def _stored(self, group_id: int, names: Iterable[EngineHash]) -> Iterator[EngineEvent]:
        """For those of ``names`` that are named and that the group holds; a run is one event."""
        run: list[_Named] = []
        copies = self._copies[group_id]
        for name in names:
            named = self._named.get(name)
            if named is None or not copies[name]:
                continue
            if run and (named.parent_hash != run[-1].block.hash or named.namespace != run[-1].namespace):
                yield _stored(group_id, run)
                run = []
            run.append(named)
        if run:
            yield _stored(group_id, run)

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
            named = self._named.pop(name, None)
            if named is not None:
                self._unhang(named)

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
        self._below.clear()
        self._open = None

    def _corrected(self, group_id: int, event: Stored) -> list[EngineEvent]:
        """Where the event gives its group another window: that, and once more all that is resident."""
        says, window = fields.window(event)
        if not says or window == self._windows[group_id]:
            return []
        self._windows[group_id] = window
        events: list[EngineEvent] = [GroupCreated(group_id, window)]
        for each, copies in self._copies.items():
            events += self._stored(each, list(copies))
        return events

    # -- blocks that no event names ------------------------------------------------------------------

    def _settle(self, event: Stored | Removed | Cleared) -> list[EngineEvent]:
        """Compute what the open event's blocks are, unless ``event`` is about the same tokens."""
        before = self._open
        if before is None or (isinstance(event, Stored) and _same_tokens(before, event)):
            return []
        self._open = None
        unnamed = self._unnamed(fields.hashes(before))
        start = self._digest(fields.parent(before)) if unnamed else None
        if start is None:
            return []
        blocks = self._blocks(before)
        computed = digests.chained(start, blocks)
        names = [digests.published(digest, like=unnamed[0]) for digest in computed]
        places = [i for i, name in enumerate(names) if self._unnamed([name])]
        if not places:
            return []
        self._keep(names, computed)
        return self._name_computed(fields.parent(before), names[: places[-1] + 1], blocks)

    def _name_computed(
        self, parent: EngineHash | None, names: list[EngineHash], blocks: list[tuple[int, ...]]
    ) -> list[EngineEvent]:
        """A prefix is named through all of its blocks, so those that no group holds come and go at once."""
        plain = _Namespace(None, None)
        new: list[EngineHash] = []
        self._check_rings(parent, names)
        for name, token_ids in zip(names, blocks, strict=False):
            if self._hang(name, parent, token_ids, plain):
                new.append(name)
            parent = name
        group_id = next(iter(self._copies))
        absent = tuple(name for name in names if name not in self._copies[group_id])
        events: list[EngineEvent] = [_stored(group_id, [self._named[name] for name in names])]
        if absent:
            events.append(BlocksRemoved(group_id, absent))
        for other in list(self._copies)[1:]:
            events += self._stored(other, new)
        for name in new:
            self._forget(name)
        return events

    def _unnamed(self, names: Iterable[EngineHash]) -> list[EngineHash]:
        """Those that some group holds and nothing names."""
        held = self._copies.values()
        return [name for name in names if name not in self._named and any(name in each for each in held)]

    def _digest(self, name: EngineHash | None) -> bytes | None:
        """Digest of the prefix that ends with ``name``, if it is known or all of its blocks are.

        The walk up ends at the root or at a block that is not named: no ring is stored, see ``_check_rings``.
        """
        above: list[EngineHash] = []
        while name is not None and name not in self._digests:
            named = self._named.get(name)
            if named is None:
                return None
            above.append(name)
            name = named.parent_hash
        digest = digests.ROOT if name is None else self._digests[name]
        above.reverse()
        computed = digests.chained(digest, (self._named[each].block.token_ids for each in above))
        self._keep(above, computed)
        return computed[-1] if computed else digest

    def _keep(self, names: list[EngineHash], computed: list[bytes]) -> None:
        self._digests.update(zip(names, computed, strict=True))
        while len(self._digests) > _MAX_DIGESTS:
            self._digests.popitem(last=False)


def _stored(group_id: int, run: list[_Named]) -> BlocksStored:
    salt, lora = run[0].namespace
    blocks = tuple(named.block for named in run)
    return BlocksStored(group_id, run[0].parent_hash, blocks, cache_salt=salt, lora_name=lora)


def _same_tokens(one: Stored, other: Stored) -> bool:
    return one.parent_block_hash == other.parent_block_hash and one.token_ids == other.token_ids
