"""How often a stock Dynamo router is right about recorded TensorRT-LLM V2 managers, by projection."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from vswa_plugins.dynamo_events.grid import MODES
from vswa_plugins.dynamo_events.projection import Projection
from vswa_plugins.trtllm_events import TrtllmEventAdapter

from tests.dynamo_events_helpers import DynamoTree, told
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.contract import BlocksStored
from vswa_plugin.publishing.residency import Residency, Restart
from vswa_plugin.wire.events import layout_event

DATA = Path(__file__).parents[2] / "data"
LAYOUT = CacheLayout((CacheGroup(0, 512, 32), CacheGroup(1, None, 32)), "trtllm_v2", "m")


class Worker:
    """The worker's side of one rank, down to what Dynamo's tree says, for one projection."""

    def __init__(self, mode: str) -> None:
        self._adapter, self._residency = TrtllmEventAdapter(LAYOUT), Residency(LAYOUT)
        self._projection, self._dynamo = Projection(mode, LAYOUT), DynamoTree(32)

    def take(self, raw: dict[str, object]) -> None:
        for event in self._adapter.feed(raw):
            try:
                changes = self._residency.apply(event)
            except Restart:
                changes = [layout_event(self._residency.layout)]
            if isinstance(event, BlocksStored):
                nodes = [self._residency.nodes.get(block.hash) for block in event.blocks]
                self._projection.learn(event, [node for node in nodes if node is not None])
            for change in changes:
                self._projection.apply(change)
        self._dynamo.take(told(self._projection))

    def blocks_promised(self, token_ids: list[int]) -> int:
        """As an engine would count them: at least one token is computed."""
        return min(self._dynamo.match(token_ids) * 32, len(token_ids) - 1) // 32

    def check(self) -> None:
        self._projection.check()


def errors(trace: str) -> tuple[int, dict[str, list[int]]]:
    """Requests, and by projection how many blocks too many were promised where it was wrong."""
    with gzip.open(DATA / f"trtllm-v2-{trace}.jsonl.gz", "rt") as lines:
        _, *records = map(json.loads, lines)
    workers = {mode: Worker(mode) for mode in MODES}
    wrong: dict[str, list[int]] = {mode: [] for mode in MODES}
    requests = 0
    for record in records:
        requests += record["type"] == "request"
        for mode, worker in workers.items():
            if record["type"] == "event":
                worker.take(record["event"])
                continue
            error = worker.blocks_promised(record["token_ids"]) - record["cached_tokens"] // 32
            if error:
                wrong[mode].append(error)
    for worker in workers.values():
        worker.check()
    return requests, wrong


@pytest.mark.parametrize(
    ("trace", "requests", "wrong", "blocks_too_many"),
    [
        ("gemma3-1b", 150, {"global": 52, "boundary": 9}, {"global": 804, "boundary": 131}),
        ("host-tier", 100, {"global": 18, "boundary": 6}, {"global": 290, "boundary": 100}),
    ],
)
def test_the_boundary_projection_more_than_halves_the_error_of_the_global_group(
    trace: str, requests: int, wrong: dict[str, int], blocks_too_many: dict[str, int]
) -> None:
    seen, found = errors(trace)

    assert requests == seen
    assert wrong == {mode: len(each) for mode, each in found.items()}
    assert blocks_too_many == {mode: sum(each) for mode, each in found.items()}
    assert all(error > 0 for each in found.values() for error in each), "never too few"
    assert 2 * wrong["boundary"] < wrong["global"]
