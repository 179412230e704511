"""The names that vLLM gives to prefixes, as its events publish them. Pure.

Written apart from the plugin that reads such events, so that one checks the other.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Sequence
from functools import lru_cache

_PROTOCOL = 5
_ROOT = hashlib.sha256(pickle.dumps("vllm-none-hash", _PROTOCOL)).digest()


class Names:
    """Names of the prefixes of one growing sequence that end at multiples of ``unit`` tokens.

    :param lookahead: so many tokens after a prefix are part of its name, which exists only once they do.
    :ivar published: the names so far, 64 bits each; the first one ends at ``unit`` tokens.
    """

    def __init__(self, unit: int, lookahead: int) -> None:
        self.published: list[int] = []
        self._unit = unit
        self._lookahead = lookahead
        self._digest = _ROOT

    def extend(self, tokens: Sequence[int]) -> None:
        """Add what the sequence, which is now ``tokens``, has got."""
        unit, ahead = self._unit, self._lookahead
        start = len(self.published) * unit
        for end in range(start + unit, len(tokens) - ahead + 1, unit):
            after = (None, *tokens[end : end + ahead]) if ahead else None
            content = (self._digest, tuple(tokens[end - unit : end]), after)
            self._digest = hashlib.sha256(pickle.dumps(content, _PROTOCOL)).digest()
            self.published.append(int.from_bytes(self._digest[-8:], "big"))

    def copy(self) -> Names:
        """One that grows by itself."""
        other = Names(self._unit, self._lookahead)
        other.published, other._digest = list(self.published), self._digest
        return other


@lru_cache(maxsize=4)  # every rank of a simulation is given the same prompt, one after the other
def names_of(prompt: tuple[int, ...], unit: int, lookahead: int) -> Names:
    """Those of a prompt; whoever extends them takes a copy."""
    names = Names(unit, lookahead)
    names.extend(prompt)
    return names
