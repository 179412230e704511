"""The last choices of a router, each with its reason, for people who look at it. Pure; no tokens, no hashes.

A choice costs one entry at the end of a ring when it is made; what is shown of it is worked out on demand.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from typing import Protocol

import msgspec

from vswa_plugin.selection import LoadBook, Scored

#: How many choices are kept.
KEPT = 50


class Booked(Protocol):
    """What is known of a choice once it is booked: a :class:`~vswa_plugin.router.decide.Decision`."""

    @property
    def key(self) -> Hashable: ...


class Choice(msgspec.Struct):
    """One choice.

    :param at: Unix time.
    :param key: of the request in the load book ``book``.
    :param candidates: all ranks that could have served the request, with their costs.
    :param by_plugin: whether a plugin chose, whatever the costs.
    :param reused: tokens of the prompt that the engine reported as reused; None: no report.
    """

    at: float
    key: Hashable
    request_id: str
    model: str
    phase: str
    prompt_tokens: int
    block_size: int
    chosen: Scored
    candidates: Sequence[Scored]
    by_plugin: bool
    book: LoadBook
    reused: int | None = None

    @property
    def promised(self) -> int:
        """Tokens that the chosen rank was expected to reuse."""
        return self.chosen.candidate.cached_tokens

    @property
    def outcome(self) -> str:
        """``under way``, ``kept``, ``over`` (more was promised than reused), ``under`` or ``unreported``."""
        if self.reused is None:
            return "under way" if self.book.get(self.key) is not None else "unreported"
        error = self.error_blocks
        return "kept" if error == 0 else "over" if error > 0 else "under"

    @property
    def error_blocks(self) -> int:
        """Whole blocks promised minus whole blocks reused; 0 where nothing was reported."""
        if self.reused is None:
            return 0
        return self.promised // self.block_size - self.reused // self.block_size


class RecentChoices:
    """The last :data:`KEPT` choices. Event loop only."""

    def __init__(self) -> None:
        self._kept: deque[Choice] = deque(maxlen=KEPT)

    def __iter__(self) -> Iterator[Choice]:
        """The newest first."""
        return reversed(self._kept)

    def add(self, choice: Choice) -> None:
        self._kept.append(choice)

    def reported(self, booked: Booked, cached_tokens: int) -> None:
        """The engine has reported what it reused of the prompt of one choice, which may be forgotten."""
        for choice in reversed(self._kept):
            if choice.key == booked.key:
                choice.reused = cached_tokens
                return


def reason_of(choice: Choice) -> str:
    """Why this rank was chosen, in one sentence."""
    chosen, others = choice.chosen, [each for each in choice.candidates if each.rank != choice.chosen.rank]
    if choice.by_plugin:
        return "A plugin chose it."
    if not others:
        return "It is the only rank that may serve this request now."
    best = min(others, key=lambda each: each.cost)
    saved = best.cost - chosen.cost
    if saved < 0:
        return f"It was drawn by chance, at {-saved:.1f} blocks more than the cheapest (router_temperature)."
    if saved == 0 and _alike(chosen, best):
        return "Several ranks are equal: it was drawn among them."
    most = max(others, key=lambda each: (each.candidate.cached_tokens, -each.cost))
    mine, theirs = chosen.candidate.cached_tokens, most.candidate.cached_tokens
    cheaper = f"{saved:.1f} blocks cheaper than the next" if saved else "as cheap as the next"
    if mine > theirs:
        return f"It reuses {mine - theirs:,} tokens more than any other rank, and is {cheaper}."
    if mine == theirs:
        return f"Others reuse as much, but it has less to do: it is {cheaper}."
    return (
        f"Rank {most.rank} would reuse {theirs - mine:,} tokens more, but has more to do: this one is "
        f"{most.cost - chosen.cost:.1f} blocks cheaper."
    )


def _alike(one: Scored, other: Scored) -> bool:
    return one.candidate.cached_tokens == other.candidate.cached_tokens
