"""Choices for gateways that pin a request to its workers and keep the data path themselves."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import msgspec

from vswa_plugin.engine.contract import RequestDict
from vswa_plugin.errors import RequestError
from vswa_plugin.following.fleet import Fleet
from vswa_plugin.registry import Entry
from vswa_plugin.router.avoided import AvoidedWorkers
from vswa_plugin.router.decide import Decider, Decision, Hasher, PromptHashes
from vswa_plugin.router.faults import Faults
from vswa_plugin.router.http.answers import (
    ServedPrompt,
    endpoint_of,
    instance_answer,
    prompt_of,
    rank_answers,
)
from vswa_plugin.router.http.messages import (
    Chosen,
    Release,
    ReleaseAnswer,
    SelectAnswer,
    SelectionWish,
    SelectQuery,
)
from vswa_plugin.router.pools import Group, Groups, Model, Pool, not_used, set_ranks
from vswa_plugin.router.promises import Promises
from vswa_plugin.router.reservations import Reservation, Reservations
from vswa_plugin.selection import LoadBook, NoCandidate
from vswa_plugin.wire.events import id_text

#: What Dynamo's frontend takes for a pin, whatever its router mode: header -> fields of ``nvext``.
WORKER, RANK = "x-dynamo-worker-instance-id", "x-dynamo-dp-rank"
PREFILL_WORKER, PREFILL_RANK = "x-dynamo-prefill-instance-id", "x-dynamo-prefill-dp-rank"
NVEXT = {
    WORKER: ("backend_instance_id", "decode_worker_id"),
    RANK: ("dp_rank",),
    PREFILL_WORKER: ("prefill_worker_id",),
    PREFILL_RANK: ("prefill_dp_rank",),
}
#: Fields of a query with the meaning that they have in the ``routing`` of a request to Dynamo.
_ROUTING = (
    "cache_salt",
    "lora_name",
    "backend_instance_id",
    "dp_rank",
    "prefill_worker_id",
    "prefill_dp_rank",
    "decode_worker_id",
    "allowed_worker_ids",
    "routing_constraints",
)

_WORKER_IDS = ("backend_instance_id", "prefill_worker_id", "decode_worker_id")


class GatewayChoices:
    """The workers of all models, what is on them, and the reservations behind that.

    :param new_book: (model, block size) -> an empty load book.
    """

    def __init__(
        self,
        fleet: Fleet,
        decider: Decider,
        hasher: Hasher,
        promises: Promises,
        new_book: Callable[[str, int], LoadBook] = lambda _, block_size: LoadBook(block_size),
    ) -> None:
        self.reservations = Reservations()
        #: Workers that are chosen only where there is no other.
        self.avoided = AvoidedWorkers()
        self._fleet = fleet
        self._decider = decider
        self._hasher = hasher
        self._promises = promises
        self._new_book = new_book
        self._models: dict[str, Model] = {}
        self._groups = Groups(fleet.entries)
        self._known: dict[str, Group] = {}
        self._faults = Faults()

    def models(self) -> Mapping[str, Model]:
        """By name, with the workers that are in the registry now."""
        if (groups := self._groups.now()) is not self._known:
            self._known = groups
            self._update(groups)
        return self._models

    def groups(self) -> Mapping[str, Group]:
        """The workers behind :meth:`models`."""
        return self._groups.now()

    def pools(self) -> Iterator[Pool]:
        """Of all models."""
        return (pool for model in self.models().values() for pool in model.pools)

    def select(self, query: SelectQuery) -> SelectAnswer:
        """Choose, and reserve where that is wished for.

        :raises RequestError: a wish that cannot be read or met.
        """
        prompt = prompt_of(self._groups, self._hasher, query)
        selection_id = self.reservations.check(query.selection_id)
        hashed = PromptHashes(prompt.length, prompt.hashes, prompt.names, _reads_cache(query))
        model = self.models()[prompt.served.name]
        reservation = self.choose(model, _request_of(query), hashed, selection_id)
        expires_at = None
        if query.reserve:
            expires_at = time.time() + query.ttl_s
            self.reservations.add(reservation, query.ttl_s)
        else:
            reservation.end()
        return self._answer(reservation, prompt, expires_at, _reads_cache(query))

    def first_token(self, wish: SelectionWish) -> ReleaseAnswer:
        """Raises UnknownReservation."""
        reservation = self.reservations.first_token(wish.selection_id)
        return ReleaseAnswer(wish.selection_id, reservation.computes.cached_tokens)

    def release(self, wish: Release) -> ReleaseAnswer:
        """Raises UnknownReservation."""
        reservation = self.reservations.release(wish.selection_id)
        decision = reservation.computes
        self._promises.compare(decision, reservation.block_size, reservation.live, wish.cached_tokens)
        return ReleaseAnswer(wish.selection_id, decision.cached_tokens)

    def choose(
        self,
        model: Model,
        request: RequestDict,
        prompt: PromptHashes,
        selection_id: str,
        metadata: Mapping[str, str] | None = None,
    ) -> Reservation:
        """Choose as the front door does, but both workers at once: a request goes out with both pins.

        They count as load from now on; the reservation is not among :attr:`reservations` yet.

        :param request: what it says about its routing, as Dynamo's frontend would hand it over.
        :raises NoCandidate: no worker can serve it now.
        :raises InvalidRequest: what it says cannot be read, or pins it to an absent worker.
        """
        if (missing := model.missing()) is not None:
            raise NoCandidate(f"{missing}; see /workers")

        def one_of(pool: Pool) -> Decision:
            return self._decider.decide(
                pool,
                request,
                avoided=self.avoided.now(),
                prompt=prompt,
                request_id=selection_id,
                metadata=metadata,
            )

        apart = bool(model.prefill.ranks and model.decode.ranks)
        computes = generates = one_of(model.prefill if apart else model.pool)
        book, live = model.pool.book, self._fleet.subscriber.live(computes.rank)
        if apart:
            try:
                generates = one_of(model.decode)
            except RequestError:
                book.free(computes.key)
                raise
        return Reservation(selection_id, book, model.pool.block_size, computes, generates, live)

    def _answer(
        self, reservation: Reservation, prompt: ServedPrompt, expires_at: float | None, reads_cache: bool
    ) -> SelectAnswer:
        computes, generates = reservation.computes, reservation.generates
        apart = computes is not generates
        workers = {computes.rank.worker_id, generates.rank.worker_id}
        ranks = rank_answers(self._fleet, prompt, workers, reads_cache=reads_cache)

        def chosen(decision: Decision) -> Chosen:
            rank = decision.rank
            (entry,) = (each for each in prompt.served.entries if each.worker_id == rank.worker_id)
            overlap = instance_answer(entry, ranks, reservation.block_size)
            return Chosen(id_text(rank.worker_id), rank.dp_rank, endpoint_of(entry), overlap, decision.cost)

        whole = chosen(generates)
        pins = pins_of(reservation)
        return SelectAnswer(
            selection_id=reservation.selection_id,
            model_name=prompt.served.name,
            routing_group="default",
            worker_id=whole.worker_id,
            dp_rank=whole.dp_rank,
            endpoint=whole.endpoint,
            block_size=reservation.block_size,
            overlap=whole.overlap,
            cost=whole.cost,
            prefill=chosen(computes) if apart else None,
            cached_tokens=computes.cached_tokens,
            effective_prefill_tokens=computes.prompt_len - computes.cached_tokens,
            headers={name: str(number) for name, number in pins.items()},
            nvext={field: number for name, number in pins.items() for field in NVEXT[name]},
            reserved=expires_at is not None,
            expires_at=expires_at,
        )

    def _update(self, groups: Mapping[str, Group]) -> None:
        self._faults.report_all(not_used(self._fleet.entries.values(), groups.values()))
        for name, group in groups.items():
            naming = group.used[0].naming
            model = self._models.get(name)
            if model is None or model.pool.naming != naming:
                if model is not None:
                    self._set_workers(model, ())
                model = self._models[name] = Model(name, naming, self._new_book(name, naming.block_size))
            self._set_workers(model, group.used)
        for name in self._models.keys() - groups.keys():
            self._set_workers(self._models.pop(name), ())

    def _set_workers(self, model: Model, used: Collection[Entry]) -> None:
        before = {rank.worker_id for pool in model.pools for rank in pool.ranks}
        set_ranks(model, used)
        for worker_id in before - {entry.worker_id for entry in used}:
            model.pool.book.drop(worker_id)
            self._promises.drop(worker_id)
            self.avoided.forget(worker_id)


def pins_of(reservation: Reservation) -> dict[str, int]:
    """The headers by which Dynamo's frontend sends a request to the workers that were chosen for it."""
    computes, generates = reservation.computes.rank, reservation.generates.rank
    pins = {WORKER: generates.worker_id, RANK: generates.dp_rank}
    if reservation.computes is not reservation.generates:
        pins |= {PREFILL_WORKER: computes.worker_id, PREFILL_RANK: computes.dp_rank}
    return pins


def _reads_cache(query: SelectQuery) -> bool:
    return query.prompt_logprobs is None and not query.skip_reading_prefix_cache


def _request_of(query: SelectQuery) -> dict[str, Any]:
    """The query as a request of Dynamo's frontend, without tokens: they are hashed already."""
    given = {name: getattr(query, name) for name in (*_ROUTING, "router_config_override")}
    plain = {name: msgspec.to_builtins(value) for name, value in given.items() if value is not None}
    for name in _WORKER_IDS:
        if name in plain:
            plain[name] = int(plain[name])
    if "allowed_worker_ids" in plain:
        plain["allowed_worker_ids"] = [int(worker_id) for worker_id in plain["allowed_worker_ids"]]
    return {
        "router_config_override": plain.pop("router_config_override", None),
        "routing": plain,
        "agent_context": {"session_id": query.session_id},
    }
