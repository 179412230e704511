"""The boundary projection as a scorer: what a stock Dynamo router promises on recorded traces."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import vswa_plugins.trtllm_events
import vswa_plugins.vllm_events
from vswa_plugins.dynamo_events import DynamoEvents
from vswa_plugins.dynamo_events.scorer import BoundaryProjection

from tests.accuracy_helpers import DATA
from vswa_plugin.accuracy.replay import replay_with
from vswa_plugin.accuracy.report import Report
from vswa_plugin.accuracy.scorers import Exact
from vswa_plugin.accuracy.trace import open_trace
from vswa_plugin.blocks.reuse import RULES
from vswa_plugin.engine.predicted import Scorer
from vswa_plugin.hookspecs import hookimpl
from vswa_plugin.host.host import PluginHost


def replayed(trace: str, *extra: object) -> tuple[Report, PluginHost]:
    with PluginHost() as host:
        for each in (vswa_plugins.trtllm_events, vswa_plugins.vllm_events, DynamoEvents, *extra):
            host.register(each, getattr(each, "__name__", "extra").rpartition(".")[2])
        return replay_with(host, open_trace(DATA / f"{trace}.jsonl.gz")), host


@pytest.mark.parametrize(
    ("trace", "exact", "over"),
    [
        ("trtllm-v2-gemma3-1b", 141, 9),
        ("trtllm-v2-host-tier", 94, 6),
        ("vllm-0.33-gptoss", 135, 65),
        ("vllm-0.33-gemma3-1b-dense", 117, 3),
    ],
)
def test_a_stock_router_is_told_more_than_the_global_group_and_never_too_little(
    trace: str, exact: int, over: int
) -> None:
    report, host = replayed(trace)
    score = report.score(BoundaryProjection.name)

    assert (exact, over, 0) == (score.exact_blocks, score.over, score.under)
    assert report.score("global only").exact_blocks < exact < report.score().exact_blocks
    assert {} == host.failures()


def scorers(give: list[Scorer]) -> object:
    return SimpleNamespace(vswa_accuracy_scorers=hookimpl(lambda: give, specname="vswa_accuracy_scorers"))


def test_a_scorer_whose_name_is_taken_is_left_out() -> None:
    report, host = replayed("trtllm-v2-gemma3-1b-head", scorers([Exact()]))

    assert {("extra", "vswa_accuracy_scorers"): 1} == host.failures()
    assert BoundaryProjection.name == report.scores[-1].scorer


def test_a_rule_that_cannot_be_projected_has_no_such_scorer() -> None:
    layout = open_trace(DATA / "trtllm-v2-gemma3-1b-head.jsonl.gz").layout("unknown")

    assert DynamoEvents().vswa_accuracy_scorers(layout, RULES) is None
