"""Plugins that adjust or take a router's choice, through the real host."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e_helpers import get
from tests.host_helpers import failing
from tests.host_helpers import plugin as plugin_of
from tests.router.test_decide import A, B, C, Setting
from vswa_plugin.hookspecs import hookimpl
from vswa_plugin.host.host import PluginHost
from vswa_plugin.program.life import Life
from vswa_plugin.registry.file import FileRegistry
from vswa_plugin.router.app import Router
from vswa_plugin.router.args import parse
from vswa_plugin.router.selector.app import Selector
from vswa_plugin.selection import RoutedRequest, Scored
from vswa_plugin.wire.events import Rank

EXAMPLE = Path(__file__).parents[2] / "plugins/examples/urgent_requests.py"


class Answers:
    def __init__(self, additions: Any = None, rank: Any = None) -> None:
        self.additions, self.rank = additions, rank

    @hookimpl
    def vswa_score(self, request: RoutedRequest, candidates: Sequence[Scored]) -> Mapping[Rank, float] | None:
        return self.additions  # type: ignore[no-any-return]

    @hookimpl
    def vswa_select_worker(self, request: RoutedRequest, candidates: Sequence[Scored]) -> Rank | None:
        return self.rank  # type: ignore[no-any-return]


def host_with(*plugins: Answers) -> PluginHost:
    host = PluginHost()
    for number, plugin in enumerate(plugins):
        host.register(plugin, f"p{number}", version="0", source="test")
    return host


def test_adjustments_are_summed_and_the_first_choice_wins() -> None:
    assert Setting(host_with(Answers({A: 1.0, B: 3.0}), Answers({A: 4.0, C: 4.0}))).decide().rank == B
    assert Setting(host_with(Answers(), Answers({B: -5.0}))).decide().rank == B
    assert Setting(host_with(Answers(), Answers(rank=C), Answers(rank=A))).decide().rank == C


def test_a_host_has_a_say_only_where_a_plugin_has() -> None:
    without, with_one = PluginHost(), host_with(Answers())

    assert without.selection_hooks() is None
    assert with_one.selection_hooks() is with_one


@pytest.mark.parametrize(
    "wrong",
    [Answers({A: math.nan}), Answers({Rank(9): 1.0}), Answers([1]), Answers(rank=Rank(9)), Answers(rank="A")],
)
def test_a_wrong_answer_costs_that_plugin_its_say_and_nothing_else(wrong: Answers) -> None:
    host = host_with(wrong, Answers({A: 1.0, B: 1.0}))

    assert Setting(host).decide().rank == C
    assert sum(host.failures().values()) == 1


def test_the_example_sends_urgent_requests_to_idle_workers_and_others_where_they_ask() -> None:
    host = PluginHost()
    host.load_local(str(EXAMPLE))
    setting = Setting(host)
    setting.holds(A, sliding=range(8), whole=range(8))

    assert setting.decide().rank == A
    assert setting.decide().rank == A
    assert setting.decide(metadata={"urgent": "1"}).rank != A
    assert setting.decide(metadata={"worker": "2"}).rank.worker_id == 2
    assert setting.decide(metadata={"worker": "ff"}).rank == A
    assert not host.failures()


# -- metrics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", [Router, Selector])
def test_a_page_has_the_metrics_and_failures_of_plugins_and_no_family_twice(
    program: type[Router | Selector], tmp_path: Path
) -> None:
    repeated = "# TYPE vswa_subscriber_messages_total counter\nvswa_subscriber_messages_total 7\n"
    host = PluginHost()
    host.register(plugin_of(vswa_metrics=lambda: "fine 1\n"), "a")
    host.register(plugin_of(vswa_metrics=lambda: repeated), "b")
    host.register(plugin_of(vswa_score=failing(ValueError())), "c")
    host.score(None, [])  # type: ignore[arg-type]  # which fails before it looks

    async def body() -> str:
        server = program(parse([], {}), host, FileRegistry(tmp_path), Life("test")).server
        port = await server.start("127.0.0.1", 0)
        try:
            return (await get(f"http://127.0.0.1:{port}/metrics"))[1]
        finally:
            await server.stop()

    families = {}
    for family in text_string_to_metric_families(asyncio.run(body())):
        assert family.name not in families
        families[family.name] = family
    failures = {
        (sample.labels["plugin"], sample.labels["hook"]): sample.value
        for sample in families["vswa_plugin_failures"].samples
    }

    assert [1] == [sample.value for sample in families["fine"].samples]
    assert "vswa_subscriber_messages" in families
    assert {("a", "vswa_metrics"): 0, ("b", "vswa_metrics"): 1, ("c", "vswa_score"): 1} == failures
