"""Follows the workers in the registry: which models they serve, and how these are shown."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from vswa_plugin.dynamo.chat import chat_obstacle
from vswa_plugin.dynamo.client import FrontEndpoint, ModelCard, WorkerClient
from vswa_plugin.dynamo.names import EndpointName
from vswa_plugin.errors import ConfigError
from vswa_plugin.registry import Entry
from vswa_plugin.router.faults import Faults
from vswa_plugin.router.forward import Forwarder
from vswa_plugin.router.pools import Group, Groups, Model, not_used, set_ranks, slug_of
from vswa_plugin.selection import LoadBook
from vswa_plugin.tasks import Tasks
from vswa_plugin.wire.events import Rank

logger = logging.getLogger(__name__)

#: How often the registry's entries are looked at: a new worker is used within this time.
TICK_S = 0.2
#: How long what has failed waits for its next try: showing a model, reaching its workers.
RETRY_S = 5.0
#: How long Dynamo may take to make a client of an endpoint.
CLIENT_TIMEOUT_S = 10.0
#: How long a model that no worker serves is still shown: its requests are answered with 503, as is right
#: for workers that start again or that are replaced, and not with 404 as if it had never been there.
UNSERVED_S = 600.0
RUNTIME_HINT = "was etcd away for longer than the lease of Dynamo's runtime?"


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


def card_of(name: str, used: Sequence[Entry]) -> ModelCard:
    """How the model is shown: what all its workers can do."""
    # What comes before and after the text is the affair of the workers that generate it.
    first = min(used, key=lambda entry: entry.mode == "prefill")
    return ModelCard(
        name=name,
        model_path=first.model_path,
        block_size=first.block_size,
        context_length=min(entry.context_length for entry in used),
        total_kv_blocks=sum(entry.total_kv_blocks for entry in used),
        data_parallel_size=max(len(entry.epochs) for entry in used),
        tool_call_parser=first.tool_call_parser,
        reasoning_parser=first.reasoning_parser,
    )


def same_for_clients(one: ModelCard, other: ModelCard) -> bool:
    """Whether two cards differ at most in how much their workers can hold."""
    return (
        msgspec.structs.replace(
            one, total_kv_blocks=other.total_kv_blocks, data_parallel_size=other.data_parallel_size
        )
        == other
    )


def card_here(card: ModelCard) -> tuple[ModelCard, str | None]:
    """``card``, for completions alone where this machine has no chat template of the model; why not for chat.

    :raises ConfigError: it lacks what showing the model takes at all.
    """
    if not Path(card.model_path).exists():
        raise ConfigError(
            f"expected its config and tokenizer at {card.model_path} on this machine too, got nothing there"
        )
    obstacle = chat_obstacle(card.model_path)
    return msgspec.structs.replace(card, chat=obstacle is None), obstacle


def _report_new(model: str, entry: Entry) -> None:
    """Say that a worker has come, and where requests would not come to this router for it."""
    logger.info("model %r: worker %d joins, mode %s", model, entry.worker_id, entry.mode)
    if entry.visible:
        logger.warning(
            "worker %d shows %r itself: where a frontend sees it, requests bypass this router; "
            "start it with --register hidden",
            entry.worker_id,
            model,
        )


def _endpoint_of(entry: Entry) -> EndpointName:
    return EndpointName(entry.namespace, entry.component, entry.endpoint)


def _not_shown(model: Model) -> str:
    return f"model {model.name!r} cannot be shown"


def _retried(error: Exception) -> str:
    return f"{error or type(error).__name__}; tried again every {RETRY_S:.0f} s"


class Models:
    """All models, kept up to date with the registry.

    A fault of Dynamo, or in the entry of a worker, costs the model or the endpoint that it is about:
    it is logged once and tried again after :data:`RETRY_S`, while the others are followed as ever.

    :param entries: live workers by registry key, as a fleet keeps them.
    :param base: endpoint of the models; each has its name appended, but for ``only``.
    :param forwarder: serves the requests of all models; its ``models`` are kept here.
    :param only: no other model than this one.
    :param book: a new load book for a model, by its name and block size.
    :param silent: whether the heartbeats of a rank are missing.
    :param tasks: where its serving tasks are watched; one that ends unasked means that Dynamo's runtime did.
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
        tasks: Tasks | None = None,
    ) -> None:
        self._tasks = tasks if tasks is not None else Tasks()
        self._runtime = runtime
        self._entries = entries
        self._base = base
        self._only = only
        self._models = forwarder.models
        self._forwarder = forwarder
        self._book = book
        self._silent = silent
        #: Workers that left the registry with streams under way, which they finish unless they are dead.
        self._departed: dict[int, tuple[WorkerClient, tuple[Rank, ...]]] = {}
        self._grouped = Groups(entries)
        self._known: dict[str, Group] = {}
        self._clients: dict[EndpointName, WorkerClient] = {}
        self._endpoints: dict[EndpointName, FrontEndpoint] = {}
        self._groups: dict[str, Group] = {}
        #: Models whose workers are to be taken in, and endpoints that could not be called: when to try.
        self._due: dict[str, float] = {}
        self._unopened: dict[EndpointName, float] = {}
        self._refusals = Faults()
        self._faults = Faults()

    async def follow(self) -> None:
        """Keep up with the workers until cancelled."""
        while True:
            await self.update()
            await asyncio.sleep(TICK_S)

    async def update(self) -> None:
        """Take in what has changed among the workers, and show what can be shown."""
        if (groups := self._grouped.now()) is not self._known:
            self._known = groups
            self._groups = {name: group for name, group in groups.items() if self._only in (None, name)}
            self._refusals.report_all(not_used(self._entries.values(), self._groups.values()))
            self._due = dict.fromkeys((*self._groups, *(self._models.keys() - self._groups.keys())), 0.0)
        for name in [name for name, due in self._due.items() if self._now() >= due]:
            del self._due[name]
            what = f"workers of model {name!r} cannot be taken in"
            try:
                await self._take_in(name)
                self._faults.over(what)
            except Exception as error:  # whatever it is, it is about this model alone
                self._due[name] = self._now() + RETRY_S
                self._faults.report(what, _retried(error))
        self._give_up_the_silent()
        for model in self._models.values():
            if model.unserved_since is not None:
                if model.card is not None and self._now() >= model.unserved_since + UNSERVED_S:
                    await self._hide(model)
            elif self._now() >= model.retry_at and self._card_is_due(model):
                await self._show(model)

    async def hide(self) -> None:
        """Show no model any more; requests under way go on."""
        shown = [model for model in self._models.values() if model.card is not None]
        await asyncio.gather(*(self._hide(model) for model in shown))

    def endpoints(self) -> Iterable[FrontEndpoint]:
        return self._endpoints.values()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    async def _take_in(self, name: str) -> None:
        """Let the model's workers be those of its group that can be called; tried again where some cannot."""
        group = self._groups.get(name, Group())
        clients = await self._clients_of(group)
        used = tuple(entry for entry in group.used if entry.worker_id in clients)
        if len(used) < len(group.used):
            self._due[name] = self._now() + RETRY_S
        model = self._models.get(name)
        if used and (model is None or model.pool.naming != used[0].naming):
            if model is not None:  # all its workers were replaced at once
                await self._set_workers(model, (), {})
                await self._hide(model)
            naming = used[0].naming
            model = self._models[name] = Model(name, naming, self._book(name, naming.block_size))
        if model is not None:
            await self._set_workers(model, used, clients)

    async def _set_workers(
        self, model: Model, used: tuple[Entry, ...], clients: dict[int, WorkerClient]
    ) -> None:
        departed = model.clients.keys() - clients.keys()
        for entry in used:
            self._departed.pop(entry.worker_id, None)
            if entry.worker_id not in model.clients:
                _report_new(model.name, entry)
        for worker_id in departed:
            ranks = tuple(rank for pool in model.pools for rank in pool.ranks if rank.worker_id == worker_id)
            self._departed[worker_id] = model.clients[worker_id], ranks
        model.clients = clients
        set_ranks(model, used)
        for worker_id in departed:
            logger.info("model %r: worker %d leaves", model.name, worker_id)
            model.pool.book.drop(worker_id)
            self._forwarder.forget(worker_id)
        _report_phases(model)
        model.unserved_since = None if used else model.unserved_since or self._now()
        if not used:
            self._faults.over(_not_shown(model))

    def _give_up_the_silent(self) -> None:
        """End the streams of workers that hang or are cut off; one that drains still sends heartbeats."""
        for worker_id, (client, ranks) in list(self._departed.items()):
            if not client.busy(worker_id):
                del self._departed[worker_id]
            elif all(map(self._silent, ranks)):
                del self._departed[worker_id]
                reason = f"worker {worker_id} is not in the registry and sends no heartbeats"
                logger.warning("%s: its requests go on elsewhere", reason)
                client.give_up(worker_id, reason)

    async def _clients_of(self, group: Group) -> dict[int, WorkerClient]:
        """By worker id, of the workers whose endpoint can be called."""
        names = {entry.worker_id: _endpoint_of(entry) for entry in group.used}
        for name in dict.fromkeys(names.values()):
            if name not in self._clients and self._now() >= self._unopened.get(name, 0.0):
                await self._open(name)
        return {worker_id: self._clients[name] for worker_id, name in names.items() if name in self._clients}

    async def _open(self, name: EndpointName) -> None:
        what = f"workers at {name} cannot be called"
        try:
            async with asyncio.timeout(CLIENT_TIMEOUT_S):
                self._clients[name] = await WorkerClient.open(self._runtime, name)
            self._unopened.pop(name, None)
            self._faults.over(what)
        except Exception as error:  # Dynamo raises plain Exception
            self._unopened[name] = self._now() + RETRY_S
            self._faults.report(what, _retried(error))

    @staticmethod
    def _card_is_due(model: Model) -> bool:
        """Whether it has workers and no card, or one that was made before those of the other phase came."""
        return bool(model.clients) and (model.card is None or (model.provisional and model.missing() is None))

    async def _show(self, model: Model) -> None:
        what = _not_shown(model)
        try:
            of_group = self._groups[model.name].used
            used = tuple(entry for entry in of_group if entry.worker_id in model.clients)
            card, obstacle = card_here(card_of(model.name, used))
            model.provisional = model.missing() is not None
            if model.card is not None:
                if same_for_clients(model.card, card):
                    return
                await self._hide(model)
            model.endpoint = endpoint = model.endpoint or self._endpoint(model.name)
            await endpoint.show(card)
        except Exception as error:  # Dynamo raises plain Exception, and a path may be one that cannot be read
            model.retry_at = self._now() + RETRY_S
            self._faults.report(what, _retried(error))
            return
        self._faults.over(what)
        model.card = card
        logger.info(
            "model %r is shown on %s%s: %d workers, block size %d, context %d",
            model.name,
            endpoint.name,
            ", where its requests are answered with 503 until it can be served" if model.provisional else "",
            len(used),
            card.block_size,
            card.context_length,
        )
        if obstacle is not None:
            logger.warning("model %r is shown for completions alone, not for chat: %s", card.name, obstacle)

    async def _hide(self, model: Model) -> None:
        model.card = None
        endpoint, model.endpoint = model.endpoint, None
        if endpoint is None:
            return
        try:
            await endpoint.hide()
        except Exception as error:  # Dynamo raises plain Exception; its lease ends what is left
            logger.warning("model %r could not be hidden: %s", model.name, error)
            return
        logger.info("model %r is not shown any more", model.name)

    def _endpoint(self, model: str) -> FrontEndpoint:
        """An endpoint of this model alone, by its name alone: replicas of this router must agree on it."""
        name = self._base
        if model != self._only:
            name = EndpointName(name.namespace, name.component, f"{name.endpoint}-{slug_of(model)}")
        endpoint = self._endpoints.get(name)
        if endpoint is None:
            endpoint = self._endpoints[name] = FrontEndpoint(self._runtime, name)
            self._tasks.watch(endpoint.serve(partial(self._forwarder.forward, shown=model)), RUNTIME_HINT)
        return endpoint
