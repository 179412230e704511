"""Follows the workers in the registry: which models there are, who serves them, and how they are shown."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from vswa_plugin.dynamo.client import FrontEndpoint, ModelCard, WorkerClient
from vswa_plugin.dynamo.names import EndpointName
from vswa_plugin.engine.contract import MODES
from vswa_plugin.registry import Entry
from vswa_plugin.router.forward import Forwarder
from vswa_plugin.router.pools import Group, Model, grouped, set_ranks, slug_of
from vswa_plugin.selection import LoadBook
from vswa_plugin.wire.events import Rank

logger = logging.getLogger(__name__)

#: How often the registry's entries are looked at: a new worker is used within this time.
TICK_S = 0.2
#: How long a model that could not be shown waits for its next try.
RETRY_S = 5.0


def _report_phases(model: Model) -> None:
    """Say where workers wait for others, or are not used because of others."""
    if model.clients and (missing := model.missing()) is not None:
        logger.info("model %r cannot be served: %s", model.name, missing)
    elif model.pool.ranks and model.prefill.ranks and model.decode.ranks:
        logger.warning(
            "model %r has workers of all modes: its prefill and decode workers serve, its %d aggregated "
            "ranks only while one of these kinds is away",
            model.name,
            len(model.pool.ranks),
        )


def card_of(name: str, group: Group) -> ModelCard:
    """How the model is shown: what all its workers can do."""
    first = group.used[0]
    return ModelCard(
        name=name,
        model_path=first.model_path,
        block_size=first.block_size,
        context_length=min(entry.context_length for entry in group.used),
        total_kv_blocks=sum(entry.total_kv_blocks for entry in group.used),
        data_parallel_size=max(len(entry.epochs) for entry in group.used),
        tool_call_parser=first.tool_call_parser,
        reasoning_parser=first.reasoning_parser,
    )


def _not_here(card: ModelCard) -> str | None:
    """What of a model this machine lacks for showing it."""
    if Path(card.model_path).exists():
        return None
    return f"expected its config and tokenizer at {card.model_path} on this machine too, got nothing there"


class Models:
    """All models, kept as the registry says.

    :param entries: live workers by registry key, as a fleet keeps them.
    :param base: endpoint of the models; each has its name appended, but for ``only``.
    :param forwarder: serves the requests of all models, and is told who serves which.
    :param only: no other model than this one.
    :param book: a new load book for a model, by its name and block size.
    :param silent: whether nothing is heard of a rank any more.
    """

    def __init__(
        self,
        runtime: Any,
        entries: Mapping[str, Entry],
        base: EndpointName,
        forwarder: Forwarder,
        only: str | None = None,
        book: Callable[[str, int], LoadBook] = lambda _, block_size: LoadBook(block_size),
        silent: Callable[[Rank], bool] = lambda _: False,
    ) -> None:
        #: The serving tasks; one that ends unasked means that Dynamo's runtime did.
        self.serving: list[asyncio.Task[None]] = []
        self._runtime = runtime
        self._entries = entries
        self._base = base
        self._only = only
        self._models = forwarder.models
        self._forwarder = forwarder
        self._book = book
        self._silent = silent
        #: Workers that left the registry with streams under way, which they finish unless they are dead.
        self._left: dict[int, tuple[WorkerClient, tuple[Rank, ...]]] = {}
        self._seen: dict[str, Entry] = {}
        self._clients: dict[EndpointName, WorkerClient] = {}
        self._endpoints: dict[EndpointName, FrontEndpoint] = {}
        self._refused: dict[str, str] = {}

    async def follow(self) -> None:
        """Keep up with the workers until cancelled."""
        while True:
            await self.update()
            await asyncio.sleep(TICK_S)

    async def update(self) -> None:
        """Take in what has changed among the workers, and show what can be shown."""
        if self._entries != self._seen:
            self._seen = dict(self._entries)
            groups = self._groups()
            self._report(groups.values())
            for name, group in groups.items():
                await self._set_workers(name, group)
            for name in self._models.keys() - groups.keys():
                await self._set_workers(name, Group(()))
        self._give_up_the_silent()
        now = asyncio.get_running_loop().time()
        for model in self._models.values():
            if model.card is None and now >= model.retry_at and model.missing() is None:
                await self._show(model)

    async def hide(self) -> None:
        """Show no model any more; requests under way go on."""
        shown = [model for model in self._models.values() if model.card is not None]
        await asyncio.gather(*(self._hide(model) for model in shown))

    def endpoints(self) -> Iterable[FrontEndpoint]:
        return self._endpoints.values()

    def _groups(self) -> dict[str, Group]:
        groups = grouped(self._seen.values(), MODES)
        return {name: group for name, group in groups.items() if self._only in (None, name)}

    async def _set_workers(self, name: str, group: Group) -> None:
        model = self._models.get(name)
        if group.used and (model is None or model.pool.block_size != group.used[0].block_size):
            if model is not None:  # all its workers were replaced at once
                await self._set_workers(name, Group(()))
            size = group.used[0].block_size
            model = self._models[name] = Model(name, size, self._book(name, size))
        if model is None:
            return
        clients = {entry.worker_id: await self._client(entry) for entry in group.used}
        gone = model.clients.keys() - clients.keys()
        for entry in group.used:
            self._left.pop(entry.worker_id, None)
            if entry.worker_id not in model.clients:
                logger.info("model %r: worker %x joins, mode %s", name, entry.worker_id, entry.mode)
                if entry.visible:
                    logger.warning(
                        "worker %x shows %r itself: where a frontend sees it, requests bypass this router; "
                        "start it with --register hidden",
                        entry.worker_id,
                        name,
                    )
        for worker_id in gone:
            ranks = tuple(rank for pool in model.pools for rank in pool.ranks if rank.worker_id == worker_id)
            self._left[worker_id] = model.clients[worker_id], ranks
        model.clients = clients
        set_ranks(model, group)
        for worker_id in gone:
            logger.info("model %r: worker %x leaves", name, worker_id)
            model.pool.book.drop(worker_id)
            self._forwarder.forget(worker_id)
        _report_phases(model)
        if model.card is not None and model.missing() is not None:
            await self._hide(model)

    def _give_up_the_silent(self) -> None:
        """End the streams of workers that hang or are cut off; one that drains is still heard of."""
        for worker_id, (client, ranks) in list(self._left.items()):
            if not client.busy(worker_id):
                del self._left[worker_id]
            elif all(map(self._silent, ranks)):
                del self._left[worker_id]
                reason = f"worker {worker_id:x} is in no registry and nothing is heard of it"
                logger.warning("%s: its requests go on elsewhere", reason)
                client.give_up(worker_id, reason)

    async def _client(self, entry: Entry) -> WorkerClient:
        name = EndpointName(entry.namespace, entry.component, entry.endpoint)
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = await WorkerClient.open(self._runtime, name)
        return client

    async def _show(self, model: Model) -> None:
        group = self._groups()[model.name]
        card = card_of(model.name, group)
        if (missing := _not_here(card)) is not None:
            self._later(model, missing)
            return
        model.endpoint = endpoint = model.endpoint or self._endpoint(model.name)
        try:
            await endpoint.show(card)
        except Exception as error:  # Dynamo raises plain Exception
            self._later(model, str(error))
            return
        model.card = card
        logger.info(
            "model %r is shown on %s: %d workers, block size %d, context %d",
            model.name,
            endpoint.name,
            len(group.used),
            card.block_size,
            card.context_length,
        )

    def _later(self, model: Model, reason: str) -> None:
        model.retry_at = asyncio.get_running_loop().time() + RETRY_S
        logger.error("model %r cannot be shown, next try in %.0f s: %s", model.name, RETRY_S, reason)

    async def _hide(self, model: Model) -> None:
        model.card = None
        endpoint, model.endpoint = model.endpoint, None
        if endpoint is not None:
            await endpoint.hide()
            logger.info("model %r is not shown any more", model.name)

    def _endpoint(self, model: str) -> FrontEndpoint:
        """An endpoint of this model alone, by its name alone: replicas of this router must agree on it."""
        name = self._base
        if model != self._only:
            name = EndpointName(name.namespace, name.component, f"{name.endpoint}-{slug_of(model)}")
        endpoint = self._endpoints.get(name)
        if endpoint is None:
            endpoint = self._endpoints[name] = FrontEndpoint(self._runtime, name)
            self.serving.append(endpoint.serve(self._forwarder.forward))
        return endpoint

    def _report(self, groups: Iterable[Group]) -> None:
        """Say once of each worker that is not used why it is not."""
        reasons = {entry.key: reason for group in groups for entry, reason in group.refused}
        for key, reason in reasons.items():
            if self._refused.get(key) != reason:
                logger.error("worker %s is not used: %s", key.rpartition("/")[2].lstrip("0"), reason)
        self._refused = reasons
