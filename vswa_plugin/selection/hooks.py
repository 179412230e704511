"""Where plugins adjust or replace the choice: the contract is in hookspecs/routing.py. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol

import msgspec

from vswa_plugin.selection.book import Booked
from vswa_plugin.selection.cost import Scored
from vswa_plugin.wire.events import Event, Rank


class RoutedRequest(msgspec.Struct, frozen=True):
    """What plugins get of a request that is being routed; no token ids.

    :param prompt_tokens: length of the prompt.
    :param sequence_hashes: of its full blocks: two prompts share as many blocks as these agree.
    :param metadata: what the client sent in ``x-dynamo-meta-*`` headers.
    :param phase: what the rank is chosen for: ``agg`` (both phases), ``prefill``, or ``decode``, for which a
        request is routed once more when its prompt is computed.
    :param session_id: of the conversation that the client says the request belongs to; None: it says nothing.
    """

    request_id: str
    model: str
    prompt_tokens: int
    block_size: int
    sequence_hashes: Sequence[int]
    lora_name: str | None = None
    metadata: Mapping[str, str] = {}
    phase: str = "agg"
    session_id: str | None = None


class SelectionHooks(Protocol):
    """The plugins' part in one choice, already checked and isolated: neither method raises."""

    def score(self, request: RoutedRequest, candidates: Sequence[Scored]) -> Mapping[Rank, float]:
        """Blocks to add to the cost of some candidates; finite."""

    def select_worker(self, request: RoutedRequest, candidates: Sequence[Scored]) -> Rank | None:
        """One of the candidates, or None: the cheapest, as without plugins."""

    def choice_terms(
        self, request: RoutedRequest, candidates: Sequence[Scored]
    ) -> Mapping[Rank, Mapping[str, float]]:
        """What the costs consist of, by name, for people; empty where no plugin says it."""


class Chooser(Protocol):
    """A way to choose ranks that follows what the ranks hold and what becomes of requests.

    What plugins offer to ``vswa accuracy route``; the methods are those of the hooks of the same names.
    """

    def score(self, request: RoutedRequest, candidates: Sequence[Scored]) -> Mapping[Rank, float]:
        """Blocks to add to the cost of some candidates; finite."""

    def select_worker(self, request: RoutedRequest, candidates: Sequence[Scored]) -> Rank | None:
        """One of the candidates, or None: the cheapest."""

    def load_changed(self, model: str, key: Hashable, step: str, request: Booked) -> None:
        """A request was given to a rank (``sent``), has its ``first_token``, or has ``ended``."""

    def rank_changed(self, rank: Rank, event: Event | None) -> None:
        """One event of a rank, in order; a layout is the first one, None the last: the rank has gone."""


class NoHooks:
    """No plugin takes part in choices."""

    def score(self, request: RoutedRequest, candidates: Sequence[Scored]) -> Mapping[Rank, float]:
        return {}

    def select_worker(self, request: RoutedRequest, candidates: Sequence[Scored]) -> Rank | None:
        return None

    def choice_terms(
        self, request: RoutedRequest, candidates: Sequence[Scored]
    ) -> Mapping[Rank, Mapping[str, float]]:
        return {}
