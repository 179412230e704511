"""Choices for gateways that pin a request to a worker and keep the data path themselves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vswa_plugin.events import Rank
from vswa_plugin.fleet import Fleet
from vswa_plugin.registry import Entry
from vswa_plugin.router.accuracy import Accuracy, Outcome
from vswa_plugin.router.decide import Decider, Decision, Hasher, Pool
from vswa_plugin.router.http.answers import (
    Prompt,
    endpoint_of,
    instance_answer,
    prompt_of,
    rank_answers,
)
from vswa_plugin.router.http.messages import (
    Release,
    ReleaseAnswer,
    SelectAnswer,
    SelectionWish,
    SelectQuery,
)
from vswa_plugin.router.models import grouped
from vswa_plugin.router.reservations import Reservation, Reservations
from vswa_plugin.selection import LoadBook, NoCandidate

#: Dynamo's frontend sends a request with these where they say, whatever its router mode.
WORKER_HEADER, RANK_HEADER = "x-dynamo-worker-instance-id", "x-dynamo-dp-rank"


class Selection:
    """Aggregated workers of all models, what is on them, and the reservations behind that.

    :param new_book: (model, block size) -> an empty load book.
    """

    def __init__(
        self,
        fleet: Fleet,
        decider: Decider,
        hasher: Hasher,
        accuracy: Accuracy,
        new_book: Callable[[str, int], LoadBook] = lambda _, block_size: LoadBook(block_size),
    ) -> None:
        self.reservations = Reservations()
        self._fleet = fleet
        self._decider = decider
        self._hasher = hasher
        self._accuracy = accuracy
        self._new_book = new_book
        self._pools: dict[str, Pool] = {}
        self._seen: dict[str, Entry] = {}

    def pools(self) -> Mapping[str, Pool]:
        """By model, with the workers that are in the registry now."""
        if self._fleet.entries != self._seen:
            self._seen = dict(self._fleet.entries)
            self._update()
        return self._pools

    def select(self, query: SelectQuery) -> SelectAnswer:
        """Choose, and reserve where that is wished for.

        :raises RequestError: a wish that cannot be read or met.
        """
        prompt = prompt_of(self._fleet, self._hasher, query)
        selection_id = self.reservations.check(query.selection_id)
        pool = self.pools().get(prompt.served.name)
        if pool is None:
            raise NoCandidate(
                f"expected a worker in mode agg for {prompt.served.name!r}, got none; see /workers"
            )
        decision = self._decider.decide(pool, _request_of(query), request_id=selection_id)
        expires_at = None
        if query.reserve:
            expires_at = time.time() + query.ttl_s
            made = Reservation(selection_id, pool, decision, self._live(decision.rank))
            self.reservations.add(made, query.ttl_s)
        else:
            pool.book.free(decision.key)
        return self._answer(selection_id, prompt, decision, expires_at)

    def first_token(self, wish: SelectionWish) -> ReleaseAnswer:
        """Raises UnknownReservation."""
        reservation = self.reservations.first_token(wish.selection_id)
        return ReleaseAnswer(wish.selection_id, reservation.decision.cached_tokens)

    def release(self, wish: Release) -> ReleaseAnswer:
        """Raises UnknownReservation."""
        reservation = self.reservations.release(wish.selection_id)
        decision = reservation.decision
        if wish.cached_tokens is None:
            self._accuracy.unreported(decision.rank)
        else:
            self._accuracy.record(
                Outcome(
                    decision.rank,
                    reservation.pool.block_size,
                    decision.cached_tokens,
                    wish.cached_tokens,
                    reservation.live,
                    decision.busy,
                    decision.in_flight,
                )
            )
        return ReleaseAnswer(wish.selection_id, decision.cached_tokens)

    def _answer(
        self, selection_id: str, prompt: Prompt, decision: Decision, expires_at: float | None
    ) -> SelectAnswer:
        rank = decision.rank
        (entry,) = (each for each in prompt.served.entries if each.worker_id == rank.worker_id)
        return SelectAnswer(
            selection_id=selection_id,
            model_name=prompt.served.name,
            routing_group="default",
            worker_id=rank.worker_id,
            dp_rank=rank.dp_rank,
            endpoint=endpoint_of(entry),
            block_size=prompt.served.block_size,
            overlap=instance_answer(entry, rank_answers(self._fleet, prompt), prompt.served.block_size),
            cached_tokens=decision.cached_tokens,
            effective_prefill_tokens=decision.prompt_len - decision.cached_tokens,
            cost=decision.cost,
            headers={WORKER_HEADER: str(rank.worker_id), RANK_HEADER: str(rank.dp_rank)},
            reserved=expires_at is not None,
            expires_at=expires_at,
        )

    def _live(self, rank: Rank) -> bool:
        view = self._fleet.subscriber.view(rank)
        return view is not None and view.state(asyncio.get_running_loop().time()) == "live"

    def _update(self) -> None:
        groups = grouped(entry for entry in self._seen.values() if entry.mode == "agg")
        for name, group in groups.items():
            size = group.used[0].block_size
            pool = self._pools.get(name)
            if pool is None or pool.block_size != size:
                pool = self._pools[name] = Pool(name, size, self._new_book(name, size))
            self._set_ranks(pool, group.used)
        for name in self._pools.keys() - groups.keys():
            self._set_ranks(self._pools.pop(name), ())

    def _set_ranks(self, pool: Pool, entries: Sequence[Entry]) -> None:
        gone = {rank.worker_id for rank in pool.ranks} - {entry.worker_id for entry in entries}
        pool.ranks = tuple(
            Rank(entry.worker_id, dp_rank) for entry in entries for dp_rank in sorted(entry.epochs)
        )
        for worker_id in gone:
            pool.book.drop(worker_id)
            self._accuracy.drop(worker_id)


def _request_of(query: SelectQuery) -> Any:
    """As Dynamo's frontend would put it."""
    routing = {
        "cache_salt": query.cache_salt,
        "lora_name": query.lora_name,
        "dp_rank": query.dp_rank,
        "allowed_worker_ids": query.allowed_worker_ids,
        "routing_constraints": query.routing_constraints,
    }
    return {
        "token_ids": query.token_ids,
        "routing": {name: value for name, value in routing.items() if value is not None},
        "router_config_override": query.router_config_override,
    }
