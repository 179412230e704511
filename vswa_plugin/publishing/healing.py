"""After an engine's own event buffer overflowed: what finished requests prove is resident again.

A request that reused N tokens proves that every group held the blocks its rule needs at N when it was
admitted. Such a block is published again unless a removal of it was seen since. A request that came before
the loss was noticed proves nothing: the removal may be among what was lost. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from vswa_plugin.blocks.hashing import sequence_hashes
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.blocks.reuse import RULES
from vswa_plugin.engine.contract import EngineHash
from vswa_plugin.publishing.residency import Residency
from vswa_plugin.wire.events import Event, Stored

#: Rules whose engines drop all below a removed block without an event. Which blocks these are is known only
#: of blocks that events announced, so that a request proves nothing: they come back as they are stored again.
_DROP_IN_SILENCE = ("trtllm_v1_contiguous",)
#: Rules whose engines may hold a block of a sliding window under another name than its prefix has, which only
#: the lost event said, and will name it by that when it goes: there a request proves the global groups alone.
_NAME_OTHERWISE = ("trtllm_v1",)
#: Removals that are remembered; above it healing ends, since a claim could no longer be checked.
MAX_REMOVALS = 1_000_000
#: Nodes of the table that are turned round before the event loop gets a turn: some 5 ms of work.
PREPARED_AT_ONCE = 20_000


class Claim(msgspec.Struct, frozen=True):
    """A finished request. It goes through the inbox, behind the engine's events of its last step.

    :param mark: :attr:`Healing.events` when the request arrived.
    """

    token_ids: tuple[int, ...]
    cached_tokens: int
    mark: int
    cache_salt: str | None = None
    lora_name: str | None = None


class Healing:
    """Watches one rank's residency from a restart on. Before the first restart it costs nothing."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self.active = False
        #: Engine events and restarts seen: the clock by which claims, removals and restarts are ordered.
        self.events = 0
        self._restarted_at = 0
        self.blocks_healed = 0
        self._removed_at: dict[tuple[int, EngineHash], int] = {}

    def restarted(self) -> None:
        """Nothing is resident as far as we know, and the engine holds more."""
        self.active = self._residency.layout.plain
        if not self.active:
            return
        # A request that came before has an earlier mark, even if no event of the engine was read between.
        self.events += 1
        self._restarted_at = self.events
        self._removed_at.clear()
        self._residency.nodes.begin_reverse()

    def prepare(self) -> bool:
        """Build a piece of the table from sequence hash to engine hash; True when it is complete.

        A claim that comes before that proves less.
        """
        return self._residency.nodes.go_on_reverse(PREPARED_AT_ONCE)

    def saw_removed(self, group_id: int, hashes: Sequence[EngineHash]) -> None:
        """The engine removed blocks, known to us or not."""
        for engine_hash in hashes:
            self._removed_at[group_id, engine_hash] = self.events
        if len(self._removed_at) > MAX_REMOVALS:
            self.active = False
            self._removed_at.clear()
            self._residency.nodes.drop_reverse()

    def changes(self, claim: Claim) -> list[Event]:
        """Stored events for the blocks that ``claim`` proves and that are not known to be resident."""
        layout = self._residency.layout
        rule = RULES.get(layout.rule)
        size = layout.block_size
        blocks = claim.cached_tokens // size
        if not self.active or claim.mark < self._restarted_at or rule is None or not blocks:
            return []
        tokens = claim.token_ids
        named = sequence_hashes(
            self._residency.nodes.hasher(tokens[at : at + size], claim.cache_salt, claim.lora_name)
            for at in range(0, blocks * size, size)
        )
        changes: list[Event] = []
        deepest = -(-claim.cached_tokens // size)
        for group in _provable(layout):
            first = rule.first_needed(group, deepest, len(tokens))
            for position in range(first, blocks):
                changes += self._prove(group.group_id, named[position], claim.mark)
        return changes

    def _prove(self, group_id: int, sequence_hash: int, mark: int) -> list[Event]:
        engine_hash = self._residency.nodes.engine_hash_of(sequence_hash)
        if engine_hash is None or self._removed_at.get((group_id, engine_hash), -1) >= mark:
            return []  # a later removal could not be recognised, or has been seen already
        node = self._residency.readmit(group_id, engine_hash)
        if node is None:
            return []
        self.blocks_healed += 1
        return [Stored(group_id, node.position, node.parent_hash, (node.sequence_hash,))]


def _provable(layout: CacheLayout) -> Sequence[CacheGroup]:
    """The groups of which a request proves blocks under names by which the engine will remove them."""
    if layout.rule in _DROP_IN_SILENCE or not layout.plain:
        return ()  # elsewhere groups name blocks by positions, and take in some that no request shows
    if layout.rule in _NAME_OTHERWISE:
        return [group for group in layout.groups if group.window_size is None]
    return layout.groups
