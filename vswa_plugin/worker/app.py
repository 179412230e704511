"""One worker: what is wired to what, and what it does in each part of its life."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence

import msgspec
from prometheus_client.core import Metric

from vswa_plugin import __version__
from vswa_plugin.dynamo.chat import chat_obstacle
from vswa_plugin.dynamo.kubernetes import on_kubernetes, reach_kubernetes
from vswa_plugin.dynamo.runtime import (
    ShownModel,
    WorkerEndpoint,
    connect,
    namespaced_block_hash,
    other_model,
)
from vswa_plugin.engine.contract import Engine, RawEvent
from vswa_plugin.errors import ConfigError, ConnectError
from vswa_plugin.hookspecs import WorkerContext
from vswa_plugin.host.host import PluginHost
from vswa_plugin.program.life import PLUGINS_END_S, Failed, Life, Program
from vswa_plugin.program.metrics import About, Page
from vswa_plugin.program.status import StatusServer, reachable_url
from vswa_plugin.publishing.nodes import NodeTable
from vswa_plugin.publishing.publisher import Publisher, PublisherOptions, check_batch_bytes
from vswa_plugin.publishing.residency import Residency
from vswa_plugin.registry import Entry, Registry, apart, last_epoch
from vswa_plugin.registry.opening import reach, reach_discovery
from vswa_plugin.wire.events import Rank, Source
from vswa_plugin.wire.subjects import subject
from vswa_plugin.wire.transport import Transport
from vswa_plugin.worker.args import WorkerArgs
from vswa_plugin.worker.handler import RequestHandler
from vswa_plugin.worker.liveness import WATCH_INTERVAL_S, Stall
from vswa_plugin.worker.metrics import engine_families, publisher_families, request_families

logger = logging.getLogger(__name__)

#: How long NATS and etcd may take to appear when a worker starts.
CONNECT_TIMEOUT_S = 30.0
RUNTIME_HINT = "was etcd away, or this process stopped, for longer than the lease of Dynamo's runtime?"
KUBERNETES_HINT = "Dynamo's lines above have the answer of the Kubernetes API, where that is the reason"


class Worker(Program):
    """One worker. ``engine`` is built and not started.

    :raises ConfigError: the engine has another number of ranks than was asked for.
    """

    def __init__(
        self, args: WorkerArgs, host: PluginHost, engine: Engine, registry: Registry, life: Life
    ) -> None:
        asked, ranks = args.settings.data_parallel_size, engine.info.data_parallel_size
        if asked not in (1, ranks):
            raise ConfigError(
                f"--data-parallel-size: expected what {args.settings.engine} can serve, {ranks}, got {asked}"
            )
        self._args = args
        self._host = host
        self._engine = engine
        self._registry = registry
        # Without echo: what comes in on our own subject is somebody else's.
        self._transport = Transport(args.nats_server, f"vswa worker {args.endpoint}", echo=False)
        self._life = life
        self.page = Page(self._about, self._families, host.metrics)
        self._server = StatusServer(life.status, self.page.render)
        self._publishers: dict[int, Publisher] = {}
        self._publishing: list[asyncio.Task[None]] = []
        self._told_epochs: dict[int, int] = {}
        self._endpoint: WorkerEndpoint | None = None
        self._handler: RequestHandler | None = None
        self._engine_started = False
        self._status_url: str | None = None
        self._chat_obstacle = self._find_chat_obstacle()

    @property
    def in_flight(self) -> int:
        return self._handler.in_flight if self._handler is not None else 0

    async def start(self) -> None:
        """Connect, start the engine, serve, and say so."""
        if self._args.status_port is not None:
            port = await self._server.start(self._args.status_host, self._args.status_port)
            self._status_url = reachable_url(self._args.status_host, port)
        await self._probe()
        endpoint = self._endpoint = WorkerEndpoint(connect(), self._args.endpoint)
        await reach_kubernetes(endpoint.raw, CONNECT_TIMEOUT_S, writes=True)
        self._host.worker_connected(self._context(endpoint))
        await self._start_engine(endpoint.worker_id)
        await self._go_live(endpoint, self._make_handler(endpoint.worker_id))

    def _find_chat_obstacle(self) -> str | None:
        """Looked for before anything is reached: whoever starts a worker shall not find out by a 404."""
        settings = self._args.settings
        obstacle = chat_obstacle(self._engine.info.model_dir or settings.model_path)
        if obstacle is not None and settings.mode != "prefill":
            logger.warning(
                "%r is served for completions alone (/v1/completions), not for chat: %s",
                settings.served_model_name,
                obstacle,
            )
        return obstacle

    def _make_handler(self, worker_id: int) -> RequestHandler:
        host = self._host
        self._handler = RequestHandler(
            self._engine,
            self._args.settings.served_model_name,
            worker_id,
            host.request_finished if host.implements("vswa_request_finished") else None,
            self._publishers,
            host.request_arrived if host.implements("vswa_request_arrived") else None,
        )
        return self._handler

    async def _probe(self) -> None:
        """Reach all brokers before Dynamo's runtime tries, which would block this loop for minutes."""
        logger.info("connecting to NATS at %s", self._args.nats_server)
        await self._transport.connect(CONNECT_TIMEOUT_S)
        logger.info("connecting to the registry, %s", self._registry)
        await reach(self._registry, CONNECT_TIMEOUT_S)
        await reach_discovery(CONNECT_TIMEOUT_S)

    async def _start_engine(self, worker_id: int) -> None:
        settings = self._args.settings
        options = check_batch_bytes(
            PublisherOptions(heartbeat_s=self._args.heartbeat_s), self._transport.max_payload
        )
        known = await self._registry.entries(self._args.endpoint.namespace)
        self._check_model(known)
        for rank in range(self._engine.info.data_parallel_size):
            before = apart(last_epoch(known, Rank(worker_id, rank)))
            self._publishers[rank] = self._publisher(worker_id, rank, options, before)
        began = time.monotonic()
        logger.info("starting %s with %s", settings.engine, settings.model_path)
        self._engine_started = True
        await asyncio.to_thread(self._engine.start, self._on_events)
        logger.info("%s started in %.1f s", settings.engine, time.monotonic() - began)
        for publisher in self._publishers.values():
            await self._serve_readers(publisher)
            publishing = self._life.tasks.start(publisher.run(), f"publish {publisher.source}")
            self._publishing.append(publishing)

    def _check_model(self, known: Iterable[Entry]) -> None:
        """Refuse, before the engine is loaded, an endpoint at which the frontend sees another model."""
        name, endpoint = self._args.settings.served_model_name, self._args.endpoint
        if not self._args.showing.visible:
            return  # a router of ours tells the workers of one endpoint apart
        for entry in known:
            there = (entry.namespace, entry.component, entry.endpoint) == msgspec.structs.astuple(endpoint)
            if entry.visible and there and entry.served_model_name != name:
                raise other_model(name, entry.served_model_name, endpoint)

    async def _serve_readers(self, publisher: Publisher) -> None:
        """Answer replay and snapshot requests, and notice a second publisher of the same rank."""

        async def foreign(_: str, payload: bytes) -> None:
            publisher.on_foreign(payload)

        await self._transport.serve(subject(publisher.source, "control"), publisher.answer)
        await self._transport.subscribe(subject(publisher.source, "events"), foreign)

    def _publisher(self, worker_id: int, rank: int, options: PublisherOptions, last: int) -> Publisher:
        layout = self._engine.info.layout
        source = Source(self._args.endpoint.namespace, self._args.endpoint.component, worker_id, rank)
        to_subject = subject(source, "events")

        async def send(payload: bytes) -> None:
            await self._transport.publish(to_subject, payload)

        return Publisher(
            source,
            self._host.event_adapter(self._engine.event_format, layout),
            Residency(layout, NodeTable(namespaced_block_hash)),
            send,
            self._host.kv_batch,
            options,
            last_epoch=last,
            ready=lambda: self._transport.ready,
            observe_stored=self._host.kv_stored if self._host.implements("vswa_kv_stored") else None,
            memory=self._engine.info.memory,
        )

    def _context(self, endpoint: WorkerEndpoint) -> WorkerContext:
        return WorkerContext(
            endpoint=endpoint.raw,
            worker_id=endpoint.worker_id,
            settings=self._args.settings,
            info=self._engine.info,
            rules=self._host.reuse_rules(),
            event_format=self._engine.event_format,
        )

    def _on_events(self, dp_rank: int, events: Sequence[RawEvent]) -> None:
        """The engine's sink: called from its thread."""
        if self._handler is not None:
            self._handler.alive()
        self._host.engine_events(dp_rank, events)
        self._publishers[dp_rank].offer(events)

    async def _go_live(self, endpoint: WorkerEndpoint, handler: RequestHandler) -> None:
        settings, info = self._args.settings, self._engine.info
        await reach_kubernetes(endpoint.raw, CONNECT_TIMEOUT_S, writes=True)
        hint = KUBERNETES_HINT if on_kubernetes() else RUNTIME_HINT
        self._life.tasks.watch(endpoint.serve(handler.handle), hint)
        entry = self._entry(endpoint.worker_id)
        await self._registry.join(entry)
        self._told_epochs = dict(entry.epochs)
        await self._show(endpoint)
        windows = ", ".join(group.label for group in info.layout.groups)
        logger.info(
            "worker %d serves %r (mode %s, windows %s, block size %d) on %s",
            endpoint.worker_id,
            settings.served_model_name,
            settings.mode,
            windows,
            info.layout.block_size,
            self._args.endpoint,
        )

    async def _tell_epochs(self) -> None:
        """Keep the registry's epochs true after a restart of a stream."""
        epochs = {rank: each.ledger.epoch for rank, each in self._publishers.items()}
        if epochs == self._told_epochs:
            return
        try:
            await self._registry.update(epochs=epochs)
        except ConnectError as error:
            logger.warning("the registry does not know of a new epoch yet: %s", error)
        else:
            self._told_epochs = epochs

    async def _show(self, endpoint: WorkerEndpoint) -> None:
        """Show the model to Dynamo's frontends, or leave that to a router."""
        args, info, showing = self._args, self._engine.info, self._args.showing
        if showing.visible:
            model = ShownModel(
                args.settings.served_model_name,
                info.model_dir or args.settings.model_path,
                args.settings.mode,
                self._chat_obstacle is None,
                args.taints,
                args.tool_call_parser,
                args.reasoning_parser,
            )
            await endpoint.register(model, info)
        logger.info(
            "the model is %s Dynamo's frontends (%s)",
            "shown to" if showing.visible else "hidden from",
            showing.reason,
        )

    def _entry(self, worker_id: int) -> Entry:
        settings, info = self._args.settings, self._engine.info
        layout = self._publishers[0].ledger.layout
        return Entry(
            namespace=self._args.endpoint.namespace,
            component=self._args.endpoint.component,
            endpoint=self._args.endpoint.endpoint,
            worker_id=worker_id,
            mode=settings.mode,
            engine=settings.engine,
            served_model_name=settings.served_model_name,
            model_path=info.model_dir or settings.model_path,
            context_length=info.context_length,
            block_size=layout.block_size,
            rule=layout.rule,
            hash_scheme=layout.hash_scheme,
            groups=layout.groups,
            epochs={rank: each.ledger.epoch for rank, each in self._publishers.items()},
            total_kv_blocks=info.total_kv_blocks,
            host=socket.gethostname(),
            pid=os.getpid(),
            tool_call_parser=self._args.tool_call_parser,
            reasoning_parser=self._args.reasoning_parser,
            taints=self._args.taints,
            visible=self._args.showing.visible,
            status_url=self._status_url,
            version=__version__,
            engine_version=info.engine_version,
            engine_reason=info.reason or "named by --engine or VSWA_ENGINE",
            resumption=layout.resumption,
            capacity=info.capacity,
        )

    async def serve(self) -> None:
        """Look after the engine, and keep the registry's epochs true.

        :raises Failed: the engine has failed or hangs.
        """
        stall = Stall(self._args.stall_timeout_s)
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            if (reason := self._engine.failure()) is not None:
                raise Failed(f"the engine has failed: {reason}")
            assert self._handler is not None, "it is there once the worker has started"
            if stall.seen(self.in_flight, self._handler.signs_of_life):
                raise Failed(
                    f"the engine hangs: no chunk and no event for {self._args.stall_timeout_s:g} s, with "
                    f"{self.in_flight} requests under way (--stall-timeout)"
                )
            await self._tell_epochs()

    async def leave(self) -> None:
        assert self._endpoint is not None
        await asyncio.gather(self._registry.leave(), self._endpoint.withdraw())

    async def drain(self) -> None:
        assert self._handler is not None
        await self._handler.drain(self._args.drain_timeout_s)

    async def give_up(self, reason: str) -> None:
        """Nobody shall send requests here any more, and those under way go on elsewhere."""
        await self.leave()
        assert self._handler is not None
        self._handler.abandon(reason)
        await self._handler.drain(1.0)

    async def end(self) -> None:
        await self._registry.close()
        if self._handler is not None and self._handler.in_flight:
            # What the engine ends itself would look to a client like a complete, shorter answer.
            self._handler.abandon("the worker has stopped before the request was done")
            await self._handler.drain(1.0)
        if self._engine_started:
            await asyncio.to_thread(self._engine.stop)
        for publisher in self._publishers.values():
            publisher.close()
        await asyncio.gather(*self._publishing, return_exceptions=True)
        await asyncio.to_thread(self._host.stopping, PLUGINS_END_S)
        await self._transport.close()
        if self._endpoint is not None:
            await self._endpoint.shutdown()
        await self._server.stop()

    def _about(self) -> About:
        return About("worker", self._args.settings.engine, self._engine.info.engine_version)

    def _families(self) -> Iterator[Metric]:
        settings, handler = self._args.settings, self._handler
        if handler is not None:
            model, mode = settings.served_model_name, settings.mode
            yield from request_families(handler.counts, handler.in_flight, model, mode)
        yield from publisher_families(self._publishers)
        yield from engine_families(self._engine)
