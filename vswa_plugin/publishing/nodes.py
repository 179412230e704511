"""Engine hash -> sequence hash and position: how an engine's own names become names a router knows.

The table depends on content only, so it outlives evictions, clearing and engine overflows: a block that
comes back under the same engine hash is still the same prefix.

A node is made below a parent that is there already and keeps it, and its position is one more than its
parent's. So no ring can be stored, whatever events say, and nothing here walks along parents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vswa_plugin.blocks.hashing import block_hash, chain, lookahead_name
from vswa_plugin.engine.contract import EngineBlock, EngineHash, Node

#: (token_ids, cache_salt, lora_name) -> block hash in that namespace.
BlockHasher = Callable[[Sequence[int], str | None, str | None], int]


def plain_hasher(token_ids: Sequence[int], cache_salt: str | None, lora_name: str | None) -> int:
    """Block hash of plain text. Salted and LoRA blocks need Dynamo's own function.

    :raises ValueError: for a salt or a LoRA.
    """
    if cache_salt is not None or lora_name is not None:
        raise ValueError("expected plain text, got a cache salt or LoRA; use Dynamo's hash function")
    return block_hash(token_ids)


class NodeTable:
    """Nodes of every block that the engine has announced.

    A block may be several hash units long, and the tokens after it may be a part of its name; what hangs on
    it is chained to the hash of its prefix without them.

    :param limit: how many nodes are kept; above it the oldest that are not resident are forgotten, so
        that memory follows what the engine can hold and not what it has ever seen.
    """

    def __init__(self, hasher: BlockHasher = plain_hasher, limit: int = 2_000_000) -> None:
        self.hasher = hasher
        self._limit = limit
        #: Size at which :meth:`trim` looks through the table: as much larger than after the last time, where
        #: all is resident, that this stays rare then too.
        self._trim_above = limit
        self._nodes: dict[EngineHash, Node] = {}
        #: Chained hashes of prefixes, where they are not their names: in layouts with a lookahead.
        self._chained: dict[EngineHash, int] = {}
        #: The reverse table, once it is needed; it stays valid from then on, because it too depends on
        #: content only.
        self._reverse: dict[int, EngineHash] | None = None
        self._unreversed: list[EngineHash] = []

    def __len__(self) -> int:
        return len(self._nodes)

    def get(self, engine_hash: EngineHash) -> Node | None:
        return self._nodes.get(engine_hash)

    def begin_reverse(self) -> None:
        """Begin the reverse table of :meth:`engine_hash_of`; :meth:`go_on_reverse` fills it."""
        if self._reverse is None:
            self._reverse = {}
            self._unreversed = list(self._nodes)

    def go_on_reverse(self, most: int) -> bool:
        """Take in ``most`` nodes more, the newest first; True when none is left."""
        waiting, reverse = self._unreversed, self._reverse
        if reverse is None or not waiting:
            return True
        for engine_hash in waiting[: -most - 1 : -1]:
            if (node := self._nodes.get(engine_hash)) is not None:
                reverse.setdefault(node.sequence_hash, engine_hash)
        del waiting[-most:]
        return not waiting

    def drop_reverse(self) -> None:
        """Drop the reverse table: engine hashes are not looked up any more."""
        self._reverse, self._unreversed = None, []

    def engine_hash_of(self, sequence_hash: int) -> EngineHash | None:
        """The engine's latest name of a block; None where there is none, or it is not known yet."""
        return None if self._reverse is None else self._reverse.get(sequence_hash)

    def add(
        self,
        parent: EngineHash | None,
        block: EngineBlock,
        cache_salt: str | None,
        lora_name: str | None,
        unit: int | None = None,
        lookahead: int = 0,
    ) -> Node | None:
        """The node of ``block``, made where it is new; None where it cannot be named.

        A block whose parent we never saw cannot be named, so it is not published: an under-estimate.

        :param unit: tokens of a hash unit; a block of no more is one. None: every block is one.
        :param lookahead: tokens after a block that are a part of its name.
        """
        existing = self._nodes.get(block.hash)
        if existing is not None:
            return existing
        before = None if parent is None else self._nodes.get(parent)
        if before is None and parent is not None:
            return None
        position, prefix = (-1, None) if before is None else (before.position, before.sequence_hash)
        if unit is None:
            named = chain(prefix, self.hasher(block.token_ids, cache_salt, lora_name))
            node = Node(named, position + 1, prefix)
        else:
            units = _units(block, unit, lookahead)
            if not units:
                return None
            if lookahead and parent is not None:
                prefix = self._chained.get(parent, prefix)
            for tokens in units:
                above, prefix = prefix, chain(prefix, self.hasher(tokens, cache_salt, lora_name))
            assert prefix is not None, "a block has one unit at least"
            node = Node(prefix, position + len(units), above)
            if lookahead:
                self._chained[block.hash] = prefix
                node = _with_lookahead(node, units[-1], block.next_token_ids)
        self._nodes[block.hash] = node
        if self._reverse is not None:
            self._reverse[node.sequence_hash] = block.hash
        return node

    def trim(self, resident: Callable[[EngineHash], bool]) -> int:
        """Forget the oldest nodes that are not ``resident`` while over the limit; returns how many.

        Cheap in the mean: the table is walked once for each eighth of the limit that it grows by, also where
        more than the limit is resident and nothing can be forgotten.
        """
        if len(self._nodes) <= self._trim_above:
            return 0
        # An eighth more than needed, so that this walk stays rare.
        spare = self._limit // 8
        wanted = len(self._nodes) - self._limit + spare
        dropped: list[EngineHash] = []
        for engine_hash in self._nodes:
            if len(dropped) == wanted:
                break
            if not resident(engine_hash):
                dropped.append(engine_hash)
        for engine_hash in dropped:
            sequence_hash = self._nodes.pop(engine_hash).sequence_hash
            self._chained.pop(engine_hash, None)
            if self._reverse is not None and self._reverse.get(sequence_hash) == engine_hash:
                del self._reverse[sequence_hash]
        self._trim_above = max(self._limit, len(self._nodes) + spare)
        return len(dropped)


def _units(block: EngineBlock, unit: int, lookahead: int) -> list[tuple[int, ...]]:
    """The tokens of the block, unit by unit; none where it is no whole number of them, or has no name."""
    tokens = block.token_ids
    if len(tokens) % unit or len(block.next_token_ids) != lookahead:
        return []
    return [tokens[at : at + unit] for at in range(0, len(tokens), unit)]


def _with_lookahead(node: Node, last: tuple[int, ...], ahead: tuple[int, ...]) -> Node:
    """``node`` of chained hashes under its names; ``last``: the tokens of its last unit."""
    name, parent = lookahead_name(node.sequence_hash, ahead), node.parent_hash
    if parent is not None:
        parent = lookahead_name(parent, (last + ahead)[: len(ahead)])
    return Node(name, node.position, parent)
