"""Which blocks the names are that no event has given a place: computed from tokens, where they are needed.

Tokens come from the events of the batch and from prompts. A name that was computed wrongly equals none of the
engine's, so that nothing is ever named wrongly; but the engine may use another root or algorithm. The first
block of which an event gives both the tokens and the name shows it, and then nothing is computed any more.
Pure.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

from vswa_plugin.blocks import CacheLayout
from vswa_plugin.engine import EngineBlock, EngineHash

from . import fields
from .computed import Computed, Root
from .fields import FULL, Stored
from .named import Named, NamedBlocks, Namespace

logger = logging.getLogger(__name__)

#: Units of prompts that are hashed before the event loop gets a turn: some 2 ms of work.
PREPARED_AT_ONCE = 500
#: Tokens of stored ranges that are kept, some 40 bytes each: those of some hundreds of answers.
MAX_KEPT_TOKENS = 250_000


class Naming:
    """Names the blocks of ``named`` that are unsure.

    :ivar computes: False: the engine's names are computed in another way.
    """

    def __init__(self, named: NamedBlocks, layout: CacheLayout) -> None:
        self.computes = True
        self._named = named
        self._plain = layout.plain
        self._unit = layout.hash_block_size
        self._computed = Computed(layout.hash_block_size, layout.lookahead)
        #: Whether a computed name was seen to be one of the engine's.
        self._verified = False
        #: Stored events of the batch whose tokens may name blocks.
        self._open: list[Stored] = []
        #: The same of earlier batches that were not needed yet: the tokens of answers, above all.
        self._kept: deque[Stored] = deque()
        self._kept_tokens = 0
        self._keeps = not any(g.kind == FULL and g.block_size == self._unit for g in layout.groups)

    def wait(self, token_ids: Sequence[int], cache_salt: str | None) -> None:
        """Note a prompt."""
        self._computed.wait(token_ids, cache_salt)

    def prepare(self) -> bool:
        """Hash a piece of the prompts that wait."""
        return self._computed.go_on(PREPARED_AT_ONCE)

    def open(self, event: Stored, *, dense: bool) -> bool:
        """Keep ``event`` until :meth:`settle`, where it may be of use.

        :param dense: it names a block at each of its edges.
        """
        useful = not dense or event.block_size > self._unit or not (self._verified or self._plain)
        if not self.computes or event.lora_id is not None or event.lora_name is not None:
            return False
        unsure = self._named.unsure
        if useful or (unsure and any(name in unsure for name in fields.hashes(event))):
            self._open.append(event)
            return True
        return False

    def close(self) -> None:
        """What was opened is of no use any more."""
        self._open.clear()
        self._computed.fresh.clear()

    @property
    def due(self) -> bool:
        """Whether :meth:`settle` has anything to look at."""
        return bool(self._open or self._named.fresh or self._computed.fresh)

    def settle(self) -> list[list[Named]]:
        """Chains of consecutive blocks that are named now, each below what was named before it.

        :raises ProtocolError: a block would be its own ancestor.
        """
        opened, self._open = self._open, []
        chains: list[list[Named]] = []
        if self.computes and self._named.unsure:
            chains = self._name(opened)
        elif self.computes:
            if not self._verified and not self._plain:
                self._check(opened)
            self._keep(opened)
        self._named.fresh.clear()
        self._computed.fresh.clear()
        return chains

    def _check(self, opened: Sequence[Stored]) -> None:
        """Compute the names of one event that states them."""
        for event in opened:
            if self._stated(event) and self._compute(event):
                return

    def _name(self, opened: Sequence[Stored]) -> list[list[Named]]:
        self._computed.whole = isinstance(next(iter(self._named.unsure)), str)
        left = [event for event in opened if not self._compute(event)]
        if self._missing():
            self._computed.go_on(1 << 62)
            left = [event for event in left if not self._compute(event)]
        if left and self._missing():
            left = [*self._kept, *left]
            self._kept.clear()
            self._kept_tokens = 0
            for event in left:
                self._compute(event)
        if not self.computes:
            return []
        unsure = self._named.unsure
        names = {*self._named.fresh, *self._computed.fresh}
        serials = sorted(
            serial
            for name in (names if len(names) < len(unsure) else unsure)
            if name in unsure and (serial := self._computed.find(name)) is not None
        )
        self._verified = self._verified or bool(serials)
        return [chain for serial in serials if (chain := self._chain(serial))]

    def _keep(self, opened: Sequence[Stored]) -> None:
        for event in opened if self._keeps else ():
            if self._kept and _same_tokens(self._kept[-1], event):
                continue
            self._kept.append(event)
            self._kept_tokens += len(event.token_ids)
            while self._kept_tokens > MAX_KEPT_TOKENS:
                self._kept_tokens -= len(self._kept.popleft().token_ids)

    def _missing(self) -> bool:
        unsure, find = self._named.unsure, self._computed.find
        return any(name in unsure and find(name) is None for name in self._named.fresh)

    def _chain(self, serial: int) -> list[Named]:
        """Hang the prefix below the nearest block that the host knows."""
        computed = self._computed
        path = computed.path(serial, self._named.sure)
        if path is None:
            return []
        if path.root is not None:
            namespace = Namespace(path.root.cache_salt, None)
        else:
            assert path.above is not None, "a path begins at the root, or at a block"
            above = self._named.get(path.above)
            assert above is not None, "it is sure"
            namespace = above.namespace
        # In plain layouts blocks are one unit: there a prefix is named through all of its blocks.
        steps = [[each] for each in path.serials] if self._plain else [path.serials]
        names = [computed.name(step[-1]) for step in steps]
        self._named.check_rings(path.above, names)
        chain: list[Named] = []
        parent = path.above
        for name, step in zip(names, steps, strict=True):
            block = EngineBlock(name, computed.tokens(step), computed.tokens_after(step[-1]))
            self._named.hang(block, parent, namespace)
            chain.append(Named(parent, block, namespace))
            parent = name
        return chain

    # -- computing ---------------------------------------------------------------------------------------

    def _stated(self, event: Stored) -> bool:
        """Whether the event names a block at each of its edges, and its hashes cover nothing but tokens."""
        dense = len(event.block_hashes) * event.block_size == len(event.token_ids) > 0
        keys = event.extra_keys or []
        return dense and not any(keys)

    def _compute(self, event: Stored) -> bool:
        """Compute the prefixes in the tokens of ``event``; False where what is above them is not known."""
        if not self.computes:
            return False
        parent = fields.parent(event)
        above = self._above(event) if parent is None else self._serial_of(parent)
        if above is None:
            return False
        tokens = list(event.token_ids)
        stated = self._stated(event)
        if stated and event.lookahead_token_ids:
            tokens += event.lookahead_token_ids[-1]
        serials = self._computed.grow(above, tokens)
        if stated and not self._verified:
            stride = event.block_size // self._unit
            self._verify([self._computed.name(each) for each in serials[stride - 1 :: stride]], event)
        return True

    def _above(self, event: Stored) -> Root:
        """Where a prompt begins; an event that does not list its first block does not say its salt."""
        dense = len(event.block_hashes) * event.block_size == len(event.token_ids)
        keys = (event.extra_keys or [None])[0] if dense else None
        return Root(keys[0] if keys and len(keys) == 1 and isinstance(keys[0], str) else None)

    def _verify(self, names: list[EngineHash], event: Stored) -> None:
        if names == fields.hashes(event):
            self._verified = True
        else:
            self._give_up()

    def _give_up(self) -> None:
        self.computes = False
        self._computed = Computed(1, 0)
        self._kept.clear()
        logger.warning(
            "vLLM's block hashes are not those of sha256 with its default root, as PYTHONHASHSEED or "
            "prefix_caching_hash_algo can bring about: blocks that events do not name are left out, so that "
            "promises are too low rather than too high; unset them to have these too"
        )

    def _serial_of(self, name: EngineHash) -> int | Root | None:
        """Of the prefix that ends with ``name``, where it is known or all of its blocks are."""
        computed = self._computed
        above: list[Named] = []
        at: EngineHash | None = name
        while at is not None and computed.find(at) is None:
            named = self._named.get(at)
            if named is None or at in self._named.unsure or named.namespace.lora_name is not None:
                return None
            above.append(named)
            at = named.parent_hash
        serial: int | Root | None = Root(above[-1].namespace.cache_salt) if at is None else computed.find(at)
        for named in reversed(above):
            assert serial is not None, "the walk ended at the root, or at a serial"
            serials = computed.grow(serial, named.block.token_ids + named.block.next_token_ids)
            if not serials or computed.name(serials[-1]) != named.block.hash:
                if not self._verified and named.namespace.cache_salt is None:
                    self._give_up()
                return None
            serial = serials[-1]
        return serial


def _same_tokens(one: Stored, other: Stored) -> bool:
    return one.parent_block_hash == other.parent_block_hash and one.token_ids == other.token_ids
