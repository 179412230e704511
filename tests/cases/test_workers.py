"""A plugin that raises, an event that cannot be read or a long log costs what it must, and ends nothing."""

from __future__ import annotations

import asyncio
import random
import sys
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.cases.follower_helpers import Steps, outcome
from tests.conftest import Run
from tests.e2e_helpers import get
from tests.host_helpers import clock as clock
from tests.host_helpers import failing
from tests.host_helpers import host as host
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout, Naming
from vswa_plugin.dynamo.client import namespaced_sequence_hashes
from vswa_plugin.engine.contract import BlocksStored, EngineBlock, EventAdapter
from vswa_plugin.errors import ProtocolError
from vswa_plugin.host.host import PluginHost
from vswa_plugin.index import WindowIndex
from vswa_plugin.launch.processes import Child
from vswa_plugin.program.life import Life
from vswa_plugin.publishing.nodes import NodeTable
from vswa_plugin.publishing.publisher import Publisher, PublisherOptions
from vswa_plugin.publishing.residency import Residency
from vswa_plugin.registry.file import FileRegistry
from vswa_plugin.router.app import Router
from vswa_plugin.router.args import parse as parse_router
from vswa_plugin.router.decide import Decider
from vswa_plugin.router.pools import Pool
from vswa_plugin.selection import LoadBook, Weights
from vswa_plugin.testing.engine import StandinEngine
from vswa_plugin.testing.host import plugin
from vswa_plugin.wire.events import Batch, Rank, Source, Stored, decode
from vswa_plugin.worker.app import Worker
from vswa_plugin.worker.args import parse

GROUPS = (CacheGroup(0, None, 32),)
LAYOUT = CacheLayout(GROUPS, "trtllm_v2", "m")
PLUGIN = "third_party"


class Publishing:
    """A publisher that runs, with a broker made of a list."""

    def __init__(self, adapter: EventAdapter, nodes: NodeTable | None = None) -> None:
        self.batches: list[Batch] = []
        self.publisher = Publisher(
            Source("ns", "backend", 1),
            adapter,
            Residency(LAYOUT, nodes),
            self._send,
            lambda *_: None,
            PublisherOptions(heartbeat_s=60),
        )
        self._sent = asyncio.Event()
        self._taken = 0
        self._running: asyncio.Task[None]

    async def _send(self, payload: bytes) -> None:
        self.batches.append(decode(payload))
        self._sent.set()

    async def __aenter__(self) -> Publishing:
        self._running = asyncio.create_task(self.publisher.run())
        await self._until(lambda: bool(self.batches))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.publisher.close()
        await asyncio.wait([self._running])
        self._running.exception()  # asked for, so that asyncio does not log it

    async def takes(self, *raw: Mapping[str, Any]) -> bool:
        """Offer these events and a new block behind them; whether that block was published."""
        self._taken += 1
        block = EngineBlock(1_000_000 + self._taken, (self._taken,) * 32)
        before = self._stored()
        self.publisher.offer([*raw, {"event": BlocksStored(0, None, (block,))}])
        await self._until(lambda: self._stored() > before)
        return self._stored() > before

    def _stored(self) -> int:
        return sum(isinstance(event, Stored) for batch in self.batches for event in batch.events)

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Also returns where the publisher has ended."""
        while not condition() and not self._running.done():
            self._sent.clear()
            sent = asyncio.create_task(self._sent.wait())
            done, _ = await asyncio.wait([sent, self._running], timeout=5, return_when="FIRST_COMPLETED")
            sent.cancel()
            assert done, "neither published anything nor ended within 5 s"


# -- engine events that cannot be read ---------------------------------------------------------------


class Unreadable:
    """Takes engine events as they are; any other cannot be read."""

    def feed(self, raw: Mapping[str, Any]) -> list[Any]:
        if "event" not in raw:
            raise ProtocolError("not an event")
        return [raw["event"]]


def table(nodes: int) -> NodeTable:
    made = NodeTable()
    for number in range(nodes):
        made.add(number - 1 if number else None, EngineBlock(number, (number,)), None, None)
    return made


@pytest.mark.parametrize(("passes", "events"), [(1, 200), (20, 1)], ids=["at once", "one after another"])
def test_engine_events_that_cannot_be_read_turn_the_node_table_round_once_at_most(
    passes: int, events: int
) -> None:
    async def steps(nodes: int) -> int:
        async with Publishing(Unreadable(), table(nodes)) as publishing:
            with Steps() as taken:
                for _ in range(passes):
                    assert await publishing.takes(*[{"odd": 1}] * events)
        return taken.count

    few, many = 10, 2_000

    assert asyncio.run(steps(many)) - asyncio.run(steps(few)) <= 4 * many


def test_engine_events_that_cannot_be_read_are_counted_and_begin_one_epoch_where_they_come_together() -> None:
    async def body() -> tuple[bool, int, int]:
        async with Publishing(Unreadable()) as publishing:
            published = await publishing.takes(*[{"odd": 1}] * 200)
            stats = publishing.publisher.ledger.stats
            return published, stats.rejected_events, stats.restarts

    assert (True, 200, 1) == asyncio.run(body())


# -- an event adapter of a plugin --------------------------------------------------------------------

ODD_ANSWERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "raises": lambda raw: [raw["missing"]],
    "gives nothing": lambda raw: None,
    "gives no event": lambda raw: ["text"],
}


async def _after_an_odd_answer(host: PluginHost, odd: str) -> bool:
    """Whether the publisher goes on when the plugin's adapter has met an event that it is not made for."""

    def feed(raw: Mapping[str, Any]) -> Any:
        return [raw["event"]] if "event" in raw else ODD_ANSWERS[odd](raw)

    adapter = SimpleNamespace(feed=feed)
    host.register(plugin(vswa_event_adapter=lambda event_format, layout: adapter), PLUGIN)
    async with Publishing(host.event_adapter("x", LAYOUT)) as publishing:
        assert await publishing.takes()
        return await publishing.takes({"evnt": 1})


@pytest.mark.parametrize("odd", ODD_ANSWERS)
def test_a_publisher_goes_on_when_the_adapter_of_a_plugin_fails(host: PluginHost, odd: str) -> None:
    assert asyncio.run(_after_an_odd_answer(host, odd))


@pytest.mark.parametrize("odd", ODD_ANSWERS)
def test_a_failure_of_the_adapter_of_a_plugin_is_counted_and_logged_under_its_name(
    host: PluginHost, odd: str, caplog: pytest.LogCaptureFixture
) -> None:
    asyncio.run(_after_an_odd_answer(host, odd))

    assert {PLUGIN} == {name for name, _ in host.failures()}
    assert any(PLUGIN in each for each in caplog.messages)


# -- a reuse rule of a plugin ------------------------------------------------------------------------


class FailsOnLongPrompts:
    """A reuse rule, one method of which raises for more than 1,000 tokens."""

    name = "mine"
    provenance = "read"

    def __init__(self, method: str) -> None:
        self._method = method

    def _at(self, method: str, prompt_len: int) -> None:
        if method == self._method and prompt_len > 1_000:
            raise ZeroDivisionError("a fault of the plugin")

    def boundaries(self, layout: CacheLayout, prompt_len: int) -> int:
        self._at("boundaries", prompt_len)
        return prompt_len // 32

    def tokens(self, layout: CacheLayout, boundary: int, prompt_len: int) -> int:
        self._at("tokens", prompt_len)
        return boundary * 32

    def first_needed(self, group: CacheGroup, boundary: int, prompt_len: int) -> int:
        self._at("first_needed", prompt_len)
        return 0

    def needs(self, layout: CacheLayout, prompt_len: int) -> None:
        self._at("needs", prompt_len)


PLUGINS_RANK, OTHER_RANK = Rank(1), Rank(2)
LONG, SHORT = list(range(2_000)), list(range(100))
METHODS = ["boundaries", "tokens", "first_needed", "needs"]


def _decided(host: PluginHost, method: str, tokens: list[int], *ranks: Rank) -> object:
    """Chosen rank and promised tokens. The plugin's rank holds all of the prompt, the other ten blocks."""
    rule = FailsOnLongPrompts(method)
    host.register(plugin(vswa_reuse_rules=lambda: {rule.name: rule}), PLUGIN)
    index = WindowIndex(rules=host.reuse_rules())
    hashes = tuple(namespaced_sequence_hashes(tokens, 32))
    for rank, layout, held in (
        (PLUGINS_RANK, CacheLayout(GROUPS, rule.name, "m"), hashes),
        (OTHER_RANK, LAYOUT, hashes[:10]),
    ):
        index.join(rank, layout)
        index.apply(rank, Stored(0, 0, None, held))
    decider = Decider(index, Weights(), namespaced_sequence_hashes, None, random.Random(1))
    pool = Pool("m", Naming(32, 32), LoadBook(32), ranks)

    def decide() -> tuple[Rank, int]:
        decision = decider.decide(pool, {"token_ids": tokens})
        return decision.rank, decision.cached_tokens

    return outcome(decide)


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_with_the_reuse_rule_of_a_plugin_is_scored_by_it(host: PluginHost, method: str) -> None:
    assert (PLUGINS_RANK, 96) == _decided(host, method, SHORT, PLUGINS_RANK, OTHER_RANK)
    assert {} == host.failures()


@pytest.mark.parametrize("method", METHODS)
def test_where_the_reuse_rule_of_a_plugin_raises_other_ranks_are_scored_and_chosen(
    host: PluginHost, method: str
) -> None:
    assert (OTHER_RANK, 320) == _decided(host, method, LONG, PLUGINS_RANK, OTHER_RANK)


@pytest.mark.parametrize("method", METHODS)
def test_where_the_reuse_rule_of_the_only_rank_raises_the_request_goes_there_with_no_promise(
    host: PluginHost, method: str
) -> None:
    assert (PLUGINS_RANK, 0) == _decided(host, method, LONG, PLUGINS_RANK)


@pytest.mark.parametrize("method", METHODS)
def test_what_the_reuse_rule_of_a_plugin_raises_is_counted_under_its_name(
    host: PluginHost, method: str
) -> None:
    _decided(host, method, LONG, PLUGINS_RANK, OTHER_RANK)

    assert {PLUGIN} == {name for name, _ in host.failures()}


# -- metrics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '# TYPE vswa_engine_running gauge\nvswa_engine_running{name="mine"} 1\n',
        '# TYPE vswa_publisher_batches counter\nvswa_publisher_batches_total{dp_rank="mine"} 1\n',
        '# TYPE vswa_resident_blocks gauge\nvswa_resident_blocks{window="mine"} 1\n',
    ],
    ids=["gauge", "counter", "labels"],
)
def test_a_plugin_metric_with_the_name_of_one_of_the_workers_own_is_left_out_and_counted(
    host: PluginHost, text: str, tmp_path: Path
) -> None:
    host.register(plugin(vswa_metrics=lambda: text), PLUGIN)
    host.register(plugin(vswa_metrics=lambda: "fine 1\n"), "z_other")
    args = parse(["--model-path", str(tmp_path), "--engine", "standin"])
    worker = Worker(args, host, StandinEngine(args.settings), FileRegistry(tmp_path), Life("test"))
    page = asyncio.run(worker.page.render())
    families = [family.name for family in text_string_to_metric_families(page)]

    assert (1, 1) == (families.count(text.split()[2]), families.count("fine"))
    assert "mine" not in page
    assert {(PLUGIN, "vswa_metrics"): 1} == host.failures()


def test_a_router_shows_the_failures_and_the_metrics_of_its_plugins(host: PluginHost, tmp_path: Path) -> None:
    score = failing(RuntimeError("a fault of the plugin"))
    host.register(plugin(vswa_score=score, vswa_metrics=lambda: "mine 7\n"), PLUGIN)

    async def body() -> tuple[int, str]:
        router = Router(parse_router([], {}), host, FileRegistry(tmp_path), Life("test"))
        router.decider.decide(Pool("m", Naming(32, 32), LoadBook(32), (Rank(1),)), {"token_ids": SHORT})
        port = await router.server.start("127.0.0.1", 0)
        try:
            return await get(f"http://127.0.0.1:{port}/metrics")
        finally:
            await router.server.stop()

    status, page = asyncio.run(body())
    samples = [each for family in text_string_to_metric_families(page) for each in family.samples]
    failures = [each for each in samples if each.name == "vswa_plugin_failures_total"]

    assert (200, {(PLUGIN, "vswa_score"): 1}) == (status, host.failures())
    assert [7] == [each.value for each in samples if each.name == "mine"]
    assert {"vswa_metrics": 0, "vswa_score": 1} == {each.labels["hook"]: each.value for each in failures}


# -- the log of a child process ----------------------------------------------------------------------

_LONG_LOG = """
import sys
for _ in range(200):
    sys.stdout.write(("x" * 119 + "\\n") * 1000)
print("vswa worker: failed: the end")
sys.exit(1)
"""


@pytest.mark.parametrize("read", [Child.last_words, Child.log_tail], ids=["last words", "tail"])
def test_the_end_of_a_long_log_is_read_without_the_rest(
    read: Callable[[Child], str], run: Run[Any], tmp_path: Path
) -> None:
    async def body() -> tuple[str, int]:
        child = await Child.start("child", [sys.executable, "-c", _LONG_LOG], tmp_path)
        await child.wait()
        tracemalloc.start()
        try:
            return read(child), tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    said, peak = run(body())
    size = (tmp_path / "child.log").stat().st_size

    assert said.endswith("the end")
    assert peak < size / 4
