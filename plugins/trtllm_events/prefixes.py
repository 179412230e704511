"""Blocks of manager V1 by the prefix that they end: one tree for all windows. Pure.

The widest window announces every block of a prompt behind its true predecessor, so that its names say what a
prefix holds. A sliding window may give another name to the same block, see :mod:`.unannounced`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import islice

from vswa_plugin.engine import EngineHash

from .fields import StoredBlock
from .hashing import names
from .searches import MAX_SEARCHED, Searches

#: Bytes of one token id.
_WIDTH = 4


class Prefix:
    """One block behind all blocks before it.

    :ivar name: its hash in the widest window.
    :ivar tokens: its token ids, four bytes each; empty where tokens do not say what it holds.
    :ivar depth: blocks before it, as far as they are known.
    :ivar holders: how many windows hold it.
    :ivar published: whether its tokens and those before it name it, and it is a whole block.
    :ivar is_stub: only its name is known, from an event about a block behind it.
    """

    __slots__ = ("children", "depth", "holders", "is_stub", "name", "parent", "published", "tokens")

    def __init__(self, name: EngineHash, parent: Prefix | None, tokens: bytes, *, published: bool) -> None:
        self.name = name
        self.parent = parent
        self.tokens = tokens
        self.published = published
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.holders = 0
        self.is_stub = False
        self.children: dict[Prefix, None] = {}

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) // _WIDTH

    def path(self) -> list[Prefix]:
        """All blocks from the first of the prompt to this one. It ends: no ring is ever closed."""
        path: list[Prefix] = []
        prefix: Prefix | None = self
        while prefix is not None:
            path.append(prefix)
            prefix = prefix.parent
        path.reverse()
        return path

    def shared_tokens(self, other: Prefix) -> int:
        """How many leading tokens both blocks have in common."""
        shorter = min(len(self.tokens), len(other.tokens))
        for at in range(0, shorter, _WIDTH):
            if self.tokens[at : at + _WIDTH] != other.tokens[at : at + _WIDTH]:
                return at // _WIDTH
        return shorter // _WIDTH


class Prefixes:
    """All prefixes that any window holds, and those before them. As large as what is held."""

    def __init__(self) -> None:
        self._by_name: dict[EngineHash, Prefix] = {}
        self._by_tokens: dict[bytes, dict[Prefix, None]] = {}
        self._first: dict[Prefix, None] = {}
        #: Of the event that is being read.
        self.searches = Searches()

    def __len__(self) -> int:
        return len(self._by_name)

    def clear(self) -> None:
        self._by_name.clear()
        self._by_tokens.clear()
        self._first.clear()

    def get(self, name: EngineHash | None) -> Prefix | None:
        """The prefix of that name in the widest window."""
        return None if name is None else self._by_name.get(name)

    def add(self, block: StoredBlock, parent: Prefix | None, *, published: bool) -> Prefix:
        """The prefix of a block of the widest window, which is made where it is new."""
        known = self._by_name.get(block.hash)
        if known is not None and not known.is_stub:
            return known
        prefix = self._insert(Prefix(block.hash, parent, packed(block.token_ids), published=published))
        if known is not None:
            self._replace(known, prefix)
        return prefix

    def stub(self, name: EngineHash) -> Prefix:
        """A prefix of which events were lost."""
        prefix = self._insert(Prefix(name, None, b"", published=True))
        prefix.is_stub = True
        return prefix

    def _insert(self, prefix: Prefix) -> Prefix:
        self._by_name[prefix.name] = prefix
        self._by_tokens.setdefault(prefix.tokens, {})[prefix] = None
        self.below(prefix.parent)[prefix] = None
        return prefix

    def _replace(self, stub: Prefix, prefix: Prefix) -> None:
        """What is behind ``stub`` is behind ``prefix``, unless that would close a ring."""
        if stub not in prefix.path():
            for child in stub.children:
                child.parent = prefix
            prefix.children.update(stub.children)
            stub.children.clear()
            self._forget(stub)

    def _forget(self, prefix: Prefix) -> None:
        if self._by_name.get(prefix.name) is prefix:
            del self._by_name[prefix.name]
        same = self._by_tokens[prefix.tokens]
        del same[prefix]
        if not same:
            del self._by_tokens[prefix.tokens]
        del self.below(prefix.parent)[prefix]

    def below(self, parent: Prefix | None) -> dict[Prefix, None]:
        """The blocks right behind ``parent``, oldest first; None: first blocks of prompts."""
        return self._first if parent is None else parent.children

    def with_tokens(self, tokens: bytes) -> Iterator[Prefix]:
        """Prefixes whose last block holds exactly these tokens, oldest first."""
        return islice(self._by_tokens.get(tokens, ()), MAX_SEARCHED)

    def parent_of(
        self, block: StoredBlock, supposed: Prefix | None, lora_id: int | None
    ) -> tuple[bool, Prefix | None]:
        """Whether the hash of a block of the widest window shows its parent, and that parent.

        An event goes on behind blocks that were there already, so the parent is ``supposed`` or below it.
        """

        def is_parent(candidate: Prefix | None) -> bool:
            name = None if candidate is None else candidate.name
            return names(block.hash, block.token_ids, name, lora_id)

        return self.searches.from_top(supposed, self.below, is_parent)

    def prune(self, prefix: Prefix | None) -> None:
        """Forget a prefix that no window holds and nothing hangs on, then its parent, and so on."""
        while prefix is not None and not prefix.holders and not prefix.children:
            self._forget(prefix)
            prefix = prefix.parent


def packed(token_ids: Sequence[int]) -> bytes:
    """Token ids in four bytes each: a tenth of what a tuple of them takes."""
    return array("I", token_ids).tobytes()
