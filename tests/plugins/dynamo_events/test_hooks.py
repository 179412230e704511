"""The plugin through the host: switched on by the environment, fed by a publisher, over a loss of events."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import dynamo.llm
import pytest
import vswa_plugins.dynamo_events as plugin

from tests.dynamo_events_helpers import SIZE, announced, layout_of, name, nodes_of, tokens_of
from tests.host_helpers import failing
from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.blocks.reuse import RULES
from vswa_plugin.engine.contract import (
    BlocksStored,
    EngineBlock,
    EngineEvent,
    EngineInfo,
    EngineSettings,
    EventsLost,
    Node,
)
from vswa_plugin.engine.options import Section
from vswa_plugin.errors import ConfigError
from vswa_plugin.hookspecs import WorkerContext
from vswa_plugin.host.host import PluginHost
from vswa_plugin.host.loading import load_host
from vswa_plugin.publishing.healing import Claim
from vswa_plugin.publishing.publisher import Publisher, PublisherOptions
from vswa_plugin.publishing.residency import Residency
from vswa_plugin.testing.host import plugin as plugin_of
from vswa_plugin.testing.streams import DirectAdapter
from vswa_plugin.wire.events import Batch, Layout, Source

SOURCE = Source("ns", "backend", 7)
LAYOUT = layout_of(2, None)


def worker(layout: CacheLayout = LAYOUT, ranks: int = 1) -> WorkerContext:
    return WorkerContext(
        endpoint="the endpoint",
        worker_id=7,
        settings=EngineSettings("e", "agg", "/m", "m"),
        info=EngineInfo(layout, 8192, 8, 8192, 100, ranks),
        rules=RULES,
    )


class KvEventPublisher:
    """In place of Dynamo's: keeps how it was made, and what is published."""

    made: list[KvEventPublisher]

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.blocks: list[int] = []
        self.open = True
        KvEventPublisher.made.append(self)

    def publish_batch(self, events: Sequence[dict[str, Any]]) -> None:
        if not self.open:
            raise Exception("the publisher is closed")  # as Dynamo's does
        for event in events:
            for block in event["block_hashes"]:
                if event["type"] == "stored":
                    self.blocks.append(block % (1 << 64))
                else:
                    self.blocks.remove(block % (1 << 64))

    def shutdown(self) -> None:
        if not self.open:
            raise Exception("the publisher is closed")
        self.open = False


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[PluginHost]:
    KvEventPublisher.made = []
    monkeypatch.setattr(dynamo.llm, "KvEventPublisher", KvEventPublisher)
    with PluginHost() as host:
        host.register(plugin.DynamoEvents, "dynamo_events")
        yield host


def give(host: PluginHost, **options: Any) -> None:
    host.options({"dynamo_events": Section({"dynamo_events": options}, "FILE").section("dynamo_events")})


# -- switched on and off -----------------------------------------------------------------------------


def test_off_unless_asked_for(host: PluginHost) -> None:
    host.worker_connected(worker())
    host.kv_stored(SOURCE, *announced("a"))

    assert ([], "", {}) == (KvEventPublisher.made, host.metrics(), host.failures())


@pytest.mark.parametrize("mode", ["global", "boundary"])
def test_one_publisher_a_rank_on_the_workers_endpoint(host: PluginHost, mode: str) -> None:
    give(host, mode=mode)
    host.worker_connected(worker(ranks=2))

    expected = {"endpoint": "the endpoint", "kv_block_size": SIZE, "enable_local_indexer": True}
    assert [{**expected, "dp_rank": rank} for rank in (0, 1)] == [p.options for p in KvEventPublisher.made]
    assert 'vswa_dynamo_events_published_blocks{dp_rank="1"} 0.0' in host.metrics()
    assert {} == host.failures()


@pytest.mark.parametrize(
    ("environ", "mode"),
    [
        ({}, "off"),
        ({"VSWA_ROUTER": "exact"}, "off"),
        ({"VSWA_ROUTER": "stock"}, "boundary"),
        ({"VSWA_ROUTER": "stock", "VSWA_DYNAMO_EVENTS": ""}, "boundary"),
        ({"VSWA_ROUTER": "stock", "VSWA_DYNAMO_EVENTS": "global"}, "global"),
        ({"VSWA_ROUTER": "stock", "VSWA_DYNAMO_EVENTS": "off"}, "off"),
        ({"VSWA_DYNAMO_EVENTS": "global"}, "global"),
        ({"VSWA_DYNAMO_EVENTS": "global", "VSWA_PLUGIN_DYNAMO_EVENTS_MODE": "off"}, "off"),
    ],
)
def test_behind_dynamos_own_router_the_boundary_is_shown_unless_somebody_says_otherwise(
    environ: dict[str, str], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[str] = []
    monkeypatch.setattr(plugin, "connect", lambda mode, worker: modes.append(mode))
    with load_host(environ=environ) as host:
        host.worker_connected(worker())

    assert ([] if mode == "off" else [mode]) == modes


def test_off_without_quotes_is_false_in_yaml_and_means_off() -> None:
    assert "off" == plugin.mode_from(Section({"mode": False, "router": "stock"}, "FILE"))


def test_an_unknown_projection_and_a_rule_that_cannot_be_projected_end_the_start(host: PluginHost) -> None:
    wrong = "dynamo_events.mode: expected one of off, global, boundary, got 'boundry' (in FILE)"
    with pytest.raises(ConfigError, match=re.escape(wrong)):
        give(host, mode="boundry")
    give(host, mode="boundary")
    with pytest.raises(ConfigError, match="unknown reuse rule"):
        host.worker_connected(worker(layout_of(2, None, rule="chunked")))

    assert [] == KvEventPublisher.made


# -- the hooks -----------------------------------------------------------------------------------------


def test_at_the_end_the_publishers_of_all_ranks_are_shut_down_once(host: PluginHost) -> None:
    give(host, mode="boundary")
    host.worker_connected(worker(ranks=3))
    KvEventPublisher.made[1].shutdown()  # so that the plugin's own call of it fails
    host.stopping(10)
    host.kv_stored(SOURCE, *announced("a"))
    host.stopping(10)

    assert [False, False, False] == [each.open for each in KvEventPublisher.made]
    assert {("dynamo_events", "vswa_stopping"): 1} == host.failures()


def test_two_workers_in_one_process_have_publishers_of_their_own(host: PluginHost) -> None:
    give(host, mode="boundary")
    with PluginHost() as other:
        other.register(plugin.DynamoEvents, "dynamo_events")
        give(other, mode="boundary")
        for each in (host, other):
            each.worker_connected(worker())
        for each, events in ((host, stored("ab")), (other, stored("xyz"))):
            engine = Engine(each)
            engine.steps(lambda engine=engine, events=events: engine.offer(*events))  # type: ignore[misc]
        other.stopping(10)

        assert [{name("a"), name("ab")}, {name("x"), name("xy"), name("xyz")}] == [
            set(each.blocks) for each in KvEventPublisher.made
        ]
        assert [True, False] == [each.open for each in KvEventPublisher.made]
        assert [{}, {}] == [host.failures(), other.failures()]


def test_other_failures_at_the_start_cost_that_plugin_alone() -> None:
    seen: list[int] = []

    with PluginHost() as host:
        failing_ones = {hook: failing(ValueError()) for hook in ("vswa_worker_connected", "vswa_kv_stored")}
        host.register(plugin_of(**failing_ones), "a")
        host.register(plugin_of(vswa_worker_connected=lambda worker: seen.append(worker.worker_id)), "b")
        host.worker_connected(worker())
        host.kv_stored(SOURCE, *announced("a"))

        assert [7] == seen
        assert {("a", "vswa_worker_connected"): 1, ("a", "vswa_kv_stored"): 1} == host.failures()


class Engine:
    """A publisher with its residency, as the worker wires it to a host."""

    def __init__(self, host: PluginHost, layout: CacheLayout = LAYOUT) -> None:
        self.residency = Residency(layout)
        self.batches = 0

        def observe(source: Source, batch: Batch) -> None:
            host.kv_batch(source, batch)
            self.batches += 1

        async def send(_: bytes) -> None:
            return None

        self.publisher = Publisher(
            SOURCE,
            DirectAdapter(),
            self.residency,
            send,
            observe,
            PublisherOptions(heartbeat_s=60),
            observe_stored=host.kv_stored,
        )

    def steps(self, *steps: Callable[[], Any]) -> None:
        """One batch after another."""

        async def run() -> None:
            task = asyncio.create_task(self.publisher.run())
            for number, step in enumerate([lambda: None, *steps], 1):
                step()
                async with asyncio.timeout(5):
                    while self.batches < number:
                        await asyncio.sleep(0.001)
            self.publisher.close()
            await task

        asyncio.run(run())

    def offer(self, *events: EngineEvent) -> None:
        self.publisher.offer([{"event": event} for event in events])


def stored(path: str, *groups: int) -> list[EngineEvent]:
    """Engine hashes are the paths themselves."""
    blocks = tuple(EngineBlock(path[: n + 1], tuple(tokens_of(path[n]))) for n in range(len(path)))
    return [BlocksStored(group, None, blocks) for group in groups or (0, 1)]


def test_tokens_are_shown_before_the_batch_that_stores_them_with_the_names_of_the_leading_blocks() -> None:
    seen: list[Any] = []
    with PluginHost() as host:
        host.register(
            plugin_of(
                vswa_kv_stored=lambda stored, nodes: seen.append((stored, nodes)),
                vswa_kv_batch=lambda batch: seen.append(batch),
            ),
            "x",
        )
        engine = Engine(host)
        # Its second block has a name, but not by this event.
        unnamed = (EngineBlock("o", tuple(tokens_of("o"))), EngineBlock("ab", tuple(tokens_of("b"))))
        orphan = BlocksStored(1, "nobody knows it", unnamed)
        again = stored("abc", 1)
        engine.steps(lambda: engine.offer(*stored("ab", 1), orphan), lambda: engine.offer(*again))

    assert isinstance(seen[0].events[0], Layout)
    assert [(stored("ab", 1)[0], tuple(nodes_of("ab"))), (orphan, ())] == seen[1:3]
    assert [1, 1] == [len(batch.events) for batch in (seen[3], seen[5])]
    assert (again[0], tuple(nodes_of("abc"))) == seen[4]
    assert all(isinstance(node, Node) for _, nodes in (seen[1], seen[4]) for node in nodes)


def published() -> set[int]:
    [publisher] = KvEventPublisher.made
    assert len(publisher.blocks) == len(set(publisher.blocks)), "each block once"
    return set(publisher.blocks)


def test_over_a_loss_of_events_everything_is_removed_and_what_is_proven_comes_back(host: PluginHost) -> None:
    give(host, mode="boundary")
    host.worker_connected(worker())
    engine = Engine(host)
    found: list[set[int]] = []
    claim = Claim((*tokens_of("abcd"), 9), 4 * SIZE, mark=10)

    engine.steps(
        lambda: engine.offer(*stored("abcd"), *stored("xy")),
        lambda: (found.append(published()), engine.offer(EventsLost(3, 5))),
        lambda: (found.append(published()), engine.publisher.claim(claim)),
        lambda: (found.append(published()), engine.offer(*stored("abcde"))),
    )

    all_blocks = {name(path) for path in ("a", "ab", "abc", "abcd", "x", "xy")}
    proven = {name(path) for path in ("a", "ab", "abc", "abcd")}
    assert [all_blocks, set(), proven, proven | {name("abcde")}] == [*found, published()]
    assert {} == host.failures()


def test_the_last_batches_before_the_end_are_published_too(host: PluginHost) -> None:
    give(host, mode="boundary")
    host.worker_connected(worker())
    engine = Engine(host)

    async def run() -> None:
        task = asyncio.create_task(engine.publisher.run())
        engine.offer(*stored("ab"))
        engine.publisher.close()
        await task

    asyncio.run(run())
    assert {name("a"), name("ab")} == published()
