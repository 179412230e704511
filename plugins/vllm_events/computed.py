"""Names that vLLM gives to prefixes, computed from their tokens at every hash unit; a bounded number. Pure.

Each computed prefix has a serial. They lie in a ring: a new one takes the place of the oldest, and one whose
predecessor is gone ends no path any more. A prompt is hashed only once its names are needed, piece by piece,
and from where an earlier prompt with the same beginning ends.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple

from vswa_plugin.blocks import sequence_hashes_of_tokens
from vswa_plugin.engine import EngineHash

from . import digests

#: Prefixes that are kept, about 200 bytes each and four for each token of a unit.
MAX_PREFIXES = 400_000
#: Tokens of prompts that wait to be hashed, four bytes each.
MAX_WAITING_TOKENS = 4_000_000
#: Units between two marks, at which a prompt is seen to begin as an earlier one.
_MARK_UNITS = 16
_DIGEST_BYTES = 32


class Root(NamedTuple):
    """Where prompts begin; a salt keeps equal ones apart."""

    cache_salt: str | None


class Path(NamedTuple):
    """What lies between a known prefix and one below it.

    :ivar above: name of the known one; None: the root.
    :ivar serials: of all units between, the topmost first; the last one is the prefix itself.
    """

    above: EngineHash | None
    root: Root | None
    serials: list[int]


class Computed:
    """Prefixes in units of ``unit`` tokens, whose names cover ``lookahead`` tokens after them.

    :ivar whole: names are whole digests, as text.
    :ivar fresh: names that were computed since this list was cleared.
    """

    def __init__(self, unit: int, lookahead: int, limit: int = MAX_PREFIXES) -> None:
        self.whole = False
        self.fresh: list[EngineHash] = []
        self._unit, self._lookahead, self._limit = unit, lookahead, limit
        self._row = unit + lookahead
        self._serials: dict[EngineHash, int] = {}
        self._next = 0
        # By place in the ring.
        self._names: list[EngineHash] = []
        self._above: list[int | Root] = []
        #: Serial of the first unit of its prompt, which is gone before all others on the way.
        self._oldest: list[int] = []
        self._digests = bytearray()
        self._tokens = array("I")
        #: (salt, our own hash of a prompt's beginning) -> serial of the deepest prefix that lies in it.
        self._marks: dict[tuple[str | None, int], int] = {}
        self._waiting: deque[_Prompt] = deque()
        self._waiting_tokens = 0

    def find(self, name: EngineHash) -> int | None:
        """The serial of a prefix; None: it was not computed, or is gone."""
        return self._serials.get(name)

    def name(self, serial: int) -> EngineHash:
        return self._names[serial % self._limit]

    def tokens(self, serials: Sequence[int]) -> tuple[int, ...]:
        """Tokens of consecutive units."""
        row, unit = self._row, self._unit
        rows = (serial % self._limit * row for serial in serials)
        return tuple(token for at in rows for token in self._tokens[at : at + unit])

    def tokens_after(self, serial: int) -> tuple[int, ...]:
        """The tokens after a prefix that its name covers."""
        end = (serial % self._limit + 1) * self._row
        return tuple(self._tokens[end - self._lookahead : end])

    def path(self, serial: int, known: Callable[[EngineHash], bool]) -> Path | None:
        """From the nearest prefix above that is ``known``, or the root; None where a unit between is gone."""
        serials: list[int] = []
        above: int | Root = serial
        while not isinstance(above, Root):
            if above < self._next - self._limit:
                return None
            if serials and known(name := self.name(above)):
                return Path(name, None, serials[::-1])
            serials.append(above)
            above = self._above[above % self._limit]
        return Path(None, above, serials[::-1])

    def grow(self, above: int | Root, token_ids: Sequence[int]) -> list[int]:
        """Serials of the prefixes that end at each whole unit of ``token_ids``, below ``above``."""
        digest = digests.ROOT
        salt = None
        if isinstance(above, Root):
            salt = above.cache_salt
        else:
            at = above % self._limit * _DIGEST_BYTES
            digest = bytes(self._digests[at : at + _DIGEST_BYTES])
        serials: list[int] = []
        for index, each in enumerate(digests.chained(digest, token_ids, self._unit, self._lookahead, salt)):
            name = digests.published(each, whole=self.whole)
            serial = self._serials.get(name)
            if serial is None or self._above[serial % self._limit] != above:
                start = index * self._unit
                serial = self._add(name, above, each, token_ids[start : start + self._row])
            serials.append(serial)
            above = serial
        return serials

    def _add(self, name: EngineHash, above: int | Root, digest: bytes, row: Sequence[int]) -> int:
        serial = self._next
        place = serial % self._limit
        self._next += 1
        oldest = serial if isinstance(above, Root) else self._oldest[above % self._limit]
        if place == len(self._names):
            self._names.append(name)
            self._above.append(above)
            self._oldest.append(oldest)
            self._digests += digest
            self._tokens.extend(row)
        else:
            if self._serials.get(former := self._names[place]) == serial - self._limit:
                del self._serials[former]
            self._names[place], self._above[place], self._oldest[place] = name, above, oldest
            self._digests[place * _DIGEST_BYTES : (place + 1) * _DIGEST_BYTES] = digest
            self._tokens[place * self._row : (place + 1) * self._row] = array("I", row)
        self._serials[name] = serial
        self.fresh.append(name)
        return serial

    def _is_whole(self, serial: int) -> bool:
        """Whether it and all above it are still there."""
        gone = self._next - self._limit
        return serial >= gone and self._oldest[serial % self._limit] >= gone

    # -- prompts ---------------------------------------------------------------------------------------

    def wait(self, token_ids: Sequence[int], cache_salt: str | None) -> None:
        """Note a prompt; where too many wait, the oldest are given up."""
        try:
            tokens = array("I", token_ids)
        except (TypeError, ValueError, OverflowError):
            return  # no tokens: the engine refuses such a request
        if len(tokens) < self._row:
            return
        self._waiting.append(_Prompt(tokens, Root(cache_salt)))
        self._waiting_tokens += len(tokens)
        while self._waiting_tokens > MAX_WAITING_TOKENS:
            self._waiting_tokens -= len(self._waiting.popleft().tokens)

    def go_on(self, units: int) -> bool:
        """Hash up to about so many units of the prompts that wait; True where none waits any more."""
        while self._waiting and units > 0:
            prompt = self._waiting[0]
            if prompt.marks is None:
                self._begin(prompt)
            before = prompt.units
            done = self._hash(prompt, units)
            units -= prompt.units - before
            if done:
                self._waiting_tokens -= len(prompt.tokens)
                self._waiting.popleft()
        return not self._waiting

    def _begin(self, prompt: _Prompt) -> None:
        """Go on where the deepest mark that is known lies."""
        self._drop_marks()
        salt = prompt.root.cache_salt
        hashes = sequence_hashes_of_tokens(prompt.tokens, _MARK_UNITS * self._unit)
        prompt.marks = [(salt, each) for each in hashes]
        for index in range(len(prompt.marks) - 1, -1, -1):
            serial = self._marks.get(prompt.marks[index])
            if serial is not None and self._is_whole(serial):
                prompt.above, prompt.units = serial, (index + 1) * _MARK_UNITS - self._behind
                return

    @property
    def _behind(self) -> int:
        """Units before a mark whose names cover tokens after it."""
        return -(-self._lookahead // self._unit)

    def _hash(self, prompt: _Prompt, units: int) -> bool:
        """Hash the next units; True where the prompt has no more."""
        assert prompt.marks is not None, "it was begun"
        first, start = prompt.units, prompt.units * self._unit
        end = start + units * self._unit + self._lookahead
        serials = self.grow(prompt.above, prompt.tokens[start:end])
        prompt.units += len(serials)
        if serials:
            prompt.above = serials[-1]
        behind = self._behind
        marks = min((prompt.units + behind) // _MARK_UNITS, len(prompt.marks))
        for mark in range((first + behind) // _MARK_UNITS, marks):
            marked = (mark + 1) * _MARK_UNITS - behind - first
            if marked > 0:
                self._marks[prompt.marks[mark]] = serials[marked - 1]
        return len(serials) < units or (prompt.units + 1) * self._unit + self._lookahead > len(prompt.tokens)

    def _drop_marks(self) -> None:
        """Marks of what is gone go too, a few at a time: the oldest are first, but for those made again."""
        oldest = self._next - self._limit
        for key, serial in list(islice(self._marks.items(), 64)):
            if serial >= oldest:
                break
            del self._marks[key]


class _Prompt:
    """One that waits, or is being hashed.

    :ivar units: that are hashed; ``above`` is the last of them.
    :ivar marks: None: it was not begun.
    """

    __slots__ = ("above", "marks", "root", "tokens", "units")

    def __init__(self, tokens: array[int], root: Root) -> None:
        self.tokens = tokens
        self.root = root
        self.above: int | Root = root
        self.units = 0
        self.marks: list[tuple[str | None, int]] | None = None
