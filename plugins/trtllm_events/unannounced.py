"""What manager V1 since spring 2026 does without an event, inferred from its other events. Pure.

Its decision code was transcribed from the sources and run; these are the differences that were seen there:

* A sliding block behind a gap, where earlier blocks have slid out and were evicted, is named as if it hung on
  the nearest block before the gap. The widest window, whose events of the same sequence come before it or
  right after it, names the same tokens by their whole prefix: by that name a block is published.
* An evicted block is announced only where the window holds its predecessor, see :mod:`.held`.
* A block whose beginning is reused is taken over, see :mod:`.takeovers`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from vswa_plugin.engine import EngineHash, ring_closed

from .fields import Stored, StoredBlock
from .groups import Groups
from .hashing import block_key, names
from .held import Held
from .prefixes import Prefix, Prefixes, packed
from .searches import MAX_SEARCHED
from .takeovers import taken_over

_GLOBAL = 1 << 62
#: Blocks that wait for their prefix, and names that seem to be taken over; the oldest are forgotten.
_MAX_REMEMBERED = 4096


class Found(NamedTuple):
    """Blocks that a window holds, each behind the one before, the first one behind ``parent``."""

    group_id: int
    parent: EngineHash | None
    blocks: list[StoredBlock]
    stored: Stored


class Lost(NamedTuple):
    """Blocks that a window does not hold any more, by their published names."""

    group_id: int
    names: list[EngineHash]


class _Waiting(NamedTuple):
    """A block of a sliding window whose prefix the widest window has not announced yet.

    :param before: the name of its predecessor in that window; None: the window does not hold it.
    """

    group_id: int
    block: StoredBlock
    before: EngineHash | None
    stored: Stored


class Unannounced:
    """Follows the events of one rank of manager V1, all windows.

    :param groups: the windows, which events correct.
    """

    def __init__(self, groups: Groups, block_size: int) -> None:
        self._block_size = block_size
        self._groups = groups
        self._prefixes = Prefixes()
        self._held: dict[int, Held] = {}
        #: Tokens -> group -> name -> block that waits for the widest window to announce it.
        self._waiting: dict[bytes, dict[int, dict[EngineHash, _Waiting]]] = {}
        self._num_waiting = 0
        #: Windows that have announced blocks of a sequence ahead of the widest one, as they do at its end.
        self._ahead: set[int] = set()
        self._proven = False
        # Names of blocks that seem to have been taken over. The removal of one shows that this engine copies.
        self._taken: dict[tuple[int, EngineHash], None] = {}
        self._takes_whole = True
        #: Blocks that are new with the event of the widest window that is being read.
        self._computed: dict[Prefix, None] = {}
        #: The last block of the sequence that a window has released last.
        self._released: dict[int, Prefix] = {}

    def created(self, group_id: int, num_blocks: int) -> None:
        """The engine has that many blocks for a window, over all tiers."""
        self._of(group_id).capacity = num_blocks

    def clear(self) -> None:
        """Events were lost: what is held is not known any more."""
        self._prefixes.clear()
        self._forget_waiting()
        self._taken.clear()
        self._released.clear()
        for held in self._held.values():
            held.clear()

    def stored(self, group_id: int, stored: Stored, where: str, *, strict: bool) -> list[Found | Lost]:
        """What an event of stored blocks shows of all windows.

        :param where: the event, for errors.
        :param strict: take a hash that is not that of its tokens as unnamed even if none ever was, see
            :meth:`.chains.Chains.verified`.
        :raises ProtocolError: a block would be below itself; nothing is changed.
        """
        self._prefixes.searches.begin()
        self._computed.clear()
        changes: list[Found | Lost] = []
        widest = self._widest()
        # Of other windows, removals that have made room may not have come yet.
        complete = {group_id}
        if group_id == widest:
            self._check_rings(stored, where)
            complete |= self._ahead
            last = self._of_widest(group_id, stored, strict, changes)
            seen = list(self._held)
        else:
            last = self._of_sliding(group_id, stored, strict, changes)
            seen = [group_id]
        for each in filter(self._slides, seen):
            if last is not None:
                if self._of(each).unsettled:
                    self._lose(each, self._of(each).settle(set(last.path())), changes)
                self._release(each, last)
            if each in complete:
                self._lose(each, self._of(each).overflow(), changes)
        return changes

    def removed(self, group_id: int, block_hashes: Iterable[EngineHash]) -> list[Found | Lost]:
        """What left with the blocks that an event announces as removed."""
        held = self._of(group_id)
        silently = self._slides(group_id)
        lost: list[EngineHash] = []
        for name in block_hashes:
            if self._taken.pop((group_id, name), 0) is None:
                self._takes_whole = False
            if name in held:
                lost += [each.name for each in held.remove(name, silently=silently) if each.published]
            else:
                # It may be known from before a loss of events: to those who kept it this is its end.
                lost.append(name)
        return [Lost(group_id, lost)] if lost else []

    def published(self, group_id: int, block_hash: EngineHash) -> EngineHash | None:
        """The published name of a block of that window; None where it has none."""
        held = self._of(group_id)
        if block_hash not in held:
            return block_hash
        prefix = held.prefix_of(block_hash)
        return prefix.name if prefix is not None and prefix.published else None

    def _widest(self) -> int:
        # A global window is the widest, whatever the others are.
        windows = self._groups.windows
        return max(windows, key=lambda group_id: windows[group_id] or _GLOBAL)

    def _slides(self, group_id: int) -> bool:
        """Whether blocks leave the window from the first one on, so that later ones become orphans."""
        return self._groups.windows.get(group_id) is not None

    def _of(self, group_id: int) -> Held:
        held = self._held.get(group_id)
        if held is None:
            held = self._held[group_id] = Held(self._prefixes)
        return held

    def _check_rings(self, stored: Stored, where: str) -> None:
        known = (self._prefixes.get(block.hash) for block in stored.blocks)
        ancestors = {prefix for prefix in known if prefix is not None and prefix.children}
        above = self._prefixes.get(stored.parent_hash) if ancestors else None
        while above is not None:
            if above in ancestors:
                raise ring_closed(where, above.name, stored.parent_hash)
            above = above.parent

    def _of_widest(
        self, group_id: int, stored: Stored, strict: bool, changes: list[Found | Lost]
    ) -> Prefix | None:
        """Take in blocks of the widest window; the last one."""
        behind = parent = self._behind(stored)
        nameable = True
        for block in stored.blocks:
            nameable = nameable and block.nameable and (parent is None or parent.published)
            if nameable and not self._salted_first(stored, parent):
                shown, actual = self._prefixes.parent_of(block, parent, stored.lora_id)
                self._proven = self._proven or shown
                nameable = shown or not (strict or self._proven)
                parent = actual if shown else parent
            is_whole = len(block.token_ids) == self._block_size
            is_new = self._prefixes.get(block.hash) is None
            prefix = self._prefixes.add(block, parent, published=nameable and is_whole)
            if is_new:
                self._computed[prefix] = None
                self._take_over(prefix, changes)
            self._hold(group_id, block.hash, prefix, block, stored, changes)
            self._find_waiting(prefix, changes)
            parent = prefix
        # Sliding windows announce the blocks of a sequence right before the widest one does.
        self._forget_waiting()
        self._prefixes.prune(behind)
        return parent if stored.blocks else None

    def _of_sliding(
        self, group_id: int, stored: Stored, strict: bool, changes: list[Found | Lost]
    ) -> Prefix | None:
        """Take in blocks of a sliding window; the last one, None where it is not known yet."""
        held = self._of(group_id)
        self._proven = self._proven or _is_named_as_here(stored)
        if not (self._proven or strict):
            return self._believed(group_id, stored, changes)
        prefix = None
        before = stored.parent_hash
        for block in stored.blocks:
            waiting = _Waiting(group_id, block, before, stored)
            prefix = self._prefix_of(waiting, held)
            if prefix is not None:
                self._hold(group_id, block.hash, prefix, block, stored, changes)
            else:
                held.add(block.hash, None)
                if block.nameable:
                    self._wait(waiting)
            before = block.hash
        return prefix

    def _believed(self, group_id: int, stored: Stored, changes: list[Found | Lost]) -> Prefix | None:
        """Take in blocks of a sliding window of which no name was ever what we make of its tokens.

        So nothing shows that this engine names blocks behind a gap in another way.
        """
        parent = self._behind(stored)
        behind = parent
        for block in stored.blocks:
            known = self._prefixes.get(block.hash)
            if known is None or known.is_stub:
                nameable = block.nameable and (parent is None or parent.published)
                is_whole = len(block.token_ids) == self._block_size
                known = self._prefixes.add(block, parent, published=nameable and is_whole)
            self._hold(group_id, block.hash, known, block, stored, changes)
            parent = known
        self._prefixes.prune(behind)
        return parent if stored.blocks else None

    def _behind(self, stored: Stored) -> Prefix | None:
        """The block before the first one; a stub where it is not known."""
        parent = self._prefixes.get(stored.parent_hash)
        if parent is None and stored.parent_hash is not None and stored.blocks:
            parent = self._prefixes.stub(stored.parent_hash)
        return parent

    def _prefix_of(self, waiting: _Waiting, held: Held) -> Prefix | None:
        """The prefix of a sliding window's block, where the widest window has announced it."""
        block, lora_id = waiting.block, waiting.stored.lora_id
        tokens = packed(block.token_ids)
        prefix = self._prefixes.get(block.hash)
        if prefix is not None and prefix.tokens == tokens and self._fits(waiting, prefix, held):
            return prefix
        parent = self._predecessor(waiting, held)
        if parent is not None and block.nameable and not isinstance(parent.name, str):
            prefix = self._prefixes.get(block_key(block.token_ids, parent.name, lora_id))
            return prefix if prefix is not None and self._fits(waiting, prefix, held) else None
        if waiting.before is not None or not block.nameable:
            return None
        if names(block.hash, block.token_ids, None, lora_id):
            return None  # it may begin a prompt of its own, which the widest window will announce
        fitting: list[Prefix] = []
        for each in self._prefixes.with_tokens(tokens):
            if self._fits(waiting, each, held):
                fitting.append(each)
            if not self._prefixes.searches.left:
                return None  # there may be a second one
        return fitting[0] if len(fitting) == 1 else None

    def _predecessor(self, waiting: _Waiting, held: Held) -> Prefix | None:
        return held.prefix_of(waiting.before) or self._prefixes.get(waiting.before)

    def _fits(self, waiting: _Waiting, prefix: Prefix, held: Held) -> bool:
        """Whether a sliding block, which has the tokens of ``prefix``, is that prefix.

        An event gives a block's predecessor where the window holds it; else the name is that of the tokens
        behind the nearest block before the gap, or none.
        """
        block, before, lora_id = waiting.block, waiting.before, waiting.stored.lora_id
        if before is not None:
            parent = self._predecessor(waiting, held)
            named = block.hash == prefix.name or names(block.hash, block.token_ids, before, lora_id)
            return parent is not None and prefix.parent is parent and named
        if prefix.parent is None:
            return block.hash == prefix.name
        above = prefix.parent.parent
        for _ in range(MAX_SEARCHED):
            if not self._prefixes.searches.one_more():
                return False
            name = None if above is None else held.name_of(above) or above.name
            if names(block.hash, block.token_ids, name, lora_id):
                return True
            if above is None:
                return False
            above = above.parent
        return False

    def _wait(self, waiting: _Waiting) -> None:
        same = self._waiting.setdefault(packed(waiting.block.token_ids), {})
        blocks = same.setdefault(waiting.group_id, {})
        self._ahead.add(waiting.group_id)
        self._num_waiting += waiting.block.hash not in blocks
        blocks[waiting.block.hash] = waiting
        if self._num_waiting > _MAX_REMEMBERED:
            oldest = self._waiting.pop(next(iter(self._waiting)))
            self._num_waiting -= sum(map(len, oldest.values()))

    def _forget_waiting(self) -> None:
        self._waiting.clear()
        self._ahead.clear()
        self._num_waiting = 0

    def _find_waiting(self, prefix: Prefix, changes: list[Found | Lost]) -> None:
        """The widest window has announced ``prefix``: a sliding block of these tokens may be it."""
        for group_id, blocks in self._waiting.get(prefix.tokens, {}).items():
            held = self._of(group_id)
            for each in self._fitting(prefix, blocks, held):
                del blocks[each.block.hash]
                self._num_waiting -= 1
                if each.block.hash in held:
                    self._hold(group_id, each.block.hash, prefix, each.block, each.stored, changes)

    def _fitting(self, prefix: Prefix, blocks: dict[EngineHash, _Waiting], held: Held) -> list[_Waiting]:
        """Those of one group's waiting blocks that are ``prefix``, and those that are not held any more."""
        named = blocks.get(prefix.name)
        if named is not None and self._fits(named, prefix, held):
            return [named]  # a window holds a prefix once
        fitting: list[_Waiting] = []
        for each in blocks.values():
            if each.block.hash not in held or self._fits(each, prefix, held):
                fitting.append(each)
            if not self._prefixes.searches.left:
                break
        return fitting

    def _hold(
        self,
        group_id: int,
        name: EngineHash,
        prefix: Prefix,
        block: StoredBlock,
        stored: Stored,
        changes: list[Found | Lost],
    ) -> None:
        self._of(group_id).add(name, prefix)
        self._taken.pop((group_id, name), None)
        if not prefix.published:
            return
        last = next((each for each in reversed(changes) if each.group_id == group_id), None)
        published = StoredBlock(prefix.name, block.token_ids, block.tier, nameable=True)
        parent = prefix.parent.name if prefix.parent is not None else None
        if isinstance(last, Found) and last.blocks[-1].hash == parent:
            last.blocks.append(published)
        else:
            changes.append(Found(group_id, parent, [published], stored))

    def _take_over(self, prefix: Prefix, changes: list[Found | Lost]) -> None:
        """Drop the blocks that were taken over for a prompt that goes on differently with ``prefix``."""
        siblings = self._prefixes.below(prefix.parent)
        if len(siblings) < 2:
            return
        windows = {
            group_id: (window, self._of(group_id)) for group_id, window in self._groups.windows.items()
        }
        for group_id, sibling in taken_over(prefix, siblings, windows, self._block_size):
            held = self._of(group_id)
            if sibling.num_tokens == self._block_size:
                if not self._takes_whole:
                    continue
                self._note_taken(group_id, held.name_of(sibling))
            self._lose(group_id, held.drop(sibling), changes)

    def _note_taken(self, group_id: int, name: EngineHash | None) -> None:
        if name is not None:
            self._taken[group_id, name] = None
        if len(self._taken) > _MAX_REMEMBERED:
            del self._taken[next(iter(self._taken))]

    def _release(self, group_id: int, last: Prefix) -> None:
        """A sequence that ends with ``last`` has let go of its blocks of a sliding window.

        First come those that slid out, from the first on; at its end the others, the last one first. Where
        the sequence was released before, the order of what had slid out then stands.
        """
        window = self._groups.windows.get(group_id) or _GLOBAL
        before = self._released.get(group_id)
        released: list[Prefix] = []
        more: int | None = None
        prefix: Prefix | None = last
        while prefix is not None and more != 0:
            released.append(prefix)
            if prefix is before:
                more = window // self._block_size + 2
            elif more is not None:
                more -= 1
            prefix = prefix.parent
        self._released[group_id] = last
        released.reverse()
        tokens = last.depth * self._block_size + last.num_tokens
        slid_out = max(0, max(0, tokens - window) // self._block_size - released[0].depth)
        held = self._of(group_id)
        held.release(released[:slid_out], self._computed)
        held.release(released[slid_out:][::-1])

    def _lose(self, group_id: int, lost: list[Prefix], changes: list[Found | Lost]) -> None:
        published = [prefix.name for prefix in lost if prefix.published]
        if published:
            changes.append(Lost(group_id, published))

    @staticmethod
    def _salted_first(stored: Stored, parent: Prefix | None) -> bool:
        """The number that the engine makes of a salt, which is part of a first block's hash, is not known."""
        return parent is None and stored.cache_salt is not None


def _is_named_as_here(stored: Stored) -> bool:
    """Whether a block's name is what we make of its tokens behind the block before it."""
    before = stored.parent_hash
    for block in stored.blocks:
        if block.nameable and names(block.hash, block.token_ids, before, stored.lora_id):
            return True
        before = block.hash
    return False
