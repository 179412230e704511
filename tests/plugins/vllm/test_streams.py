"""Byte streams recorded from a real vLLM, read as the plugin reads them: before a request, its hit is known.

tests/data/README.md says how they were made. One request ran at a time, so all that came before it is known.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from vswa_plugins.vllm.adapter import LiveEventAdapter, lost
from vswa_plugins.vllm.checks import LayoutCheck
from vswa_plugins.vllm.frames import Action, Ask, BatchOrder, Lost, answered, events_of, subscribed

from vswa_plugin.accuracy.replay import replay_with
from vswa_plugin.accuracy.trace import open_trace
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.host.loading import load_host
from vswa_plugin.index import WindowIndex
from vswa_plugin.publishing.residency import Residency, Restart
from vswa_plugin.wire.events import Rank, layout_event

DATA = Path(__file__).parents[2] / "data"
RANK = Rank(1, 0)
DENSE, LOST, LATE = (f"vllm-zmq-{name}.msgpack.xz" for name in ("dense", "sparse-lost", "late-restarted"))


class Answered(NamedTuple):
    """What was promised to one request, and what vLLM then reused; ``behind``: losses before it."""

    promised: int
    cached: int
    behind: int


class Reader:
    """A worker's receiver and a router's index, over one recorded stream."""

    def __init__(self, name: str) -> None:
        records = msgspec.msgpack.decode(lzma.decompress((DATA / name).read_bytes()))
        self._header, self._records = records[0][1], records[1:]
        groups = (
            CacheGroup(i, window, self._header["block_size"])
            for i, window in enumerate(self._header["windows"])
        )
        layout = CacheLayout(tuple(groups), "vllm", "m").check()
        self.order, self.losses = BatchOrder(), list[Lost]()
        self.wrong: list[str] = []
        self._adapter, self._check = LiveEventAdapter(layout), LayoutCheck(layout)
        self._residency, self.index = Residency(layout), WindowIndex()
        self.index.apply(RANK, layout_event(layout))
        self.restarts = 0
        self._answer: tuple[int, list[Any]] | None = None

    def requests(self, *, ask_at_once: bool = False) -> Iterator[Answered]:
        """All requests; an answer that stands first is asked for at once, as where a subscriber begins."""
        for record in self._records:
            match record:
                case ["request", tokens, cached]:
                    promised = self.index.score_tokens(tokens).get(RANK, 0)
                    yield Answered(promised, cached, self.restarts)
                case ["message", frames]:
                    self._do(self.order.came(subscribed(frames)))
                case ["answer", start, frames]:
                    self._answer = (start, frames)
                    if ask_at_once and start == 0:
                        self._do(self.order.ask())

    def _do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Ask):
                assert self._answer is not None and self._answer[0] == action.start
                for frames in self._answer[1][:-1]:
                    self._do(self.order.again(answered(frames)))
                self._do(self.order.answer_ended())
            elif isinstance(action, Lost):
                self.losses.append(action)
                self._take(lost(action.expected, action.got))
            else:
                for event in events_of(action.batch.payload, 0):
                    self.wrong += filter(None, [self._check.contradiction(event)])
                    self._take(event)

    def _take(self, raw: Any) -> None:
        for event in self._adapter.feed(raw):
            try:
                changes = self._residency.apply(event)
            except Restart:
                self.restarts += 1
                self.index.apply(RANK, layout_event(self._residency.layout))
                continue
            for change in changes:
                self.index.apply(RANK, change)
        self.index.check()


@pytest.mark.parametrize("name", [DENSE, LOST, LATE])
def test_the_groups_of_config_json_are_those_that_the_events_name(name: str) -> None:
    reader = Reader(name)
    list(reader.requests(ask_at_once=True))

    assert [] == reader.wrong


def test_with_dense_retention_every_promise_is_exact() -> None:
    reader = Reader(DENSE)
    answers = list(reader.requests())

    assert [each.cached for each in answers] == [each.promised for each in answers]
    assert 24 == len(answers) and 14 <= sum(each.cached > 0 for each in answers)
    assert [] == reader.losses


def test_what_is_lost_for_good_is_never_promised_and_comes_back() -> None:
    """vLLM kept the last three of the batches that nobody received."""
    reader = Reader(LOST)
    answers = list(reader.requests())
    before = [each for each in answers if not each.behind]
    after = [each for each in answers if each.behind]

    assert [Lost(25, 33)] == reader.losses
    assert 1 == reader.restarts
    assert [] == [each for each in after if each.promised > each.cached]
    assert [] == [each for each in before[:20] if each.promised != each.cached]
    assert 3 <= sum(0 < each.promised == each.cached for each in after), "what was stored since is promised"


def test_a_late_subscriber_and_a_hole_lose_nothing_and_a_new_engine_begins_with_nothing() -> None:
    reader = Reader(LATE)
    answers = list(reader.requests(ask_at_once=True))
    first, second = answers[:22], answers[22:]
    received = first[4:12] + first[17:]  # the others ran while nobody listened

    assert [] == [each for each in received if each.promised != each.cached]
    assert [] == [each for each in second[1:] if each.promised != each.cached]
    assert [Lost(28, 0)] == reader.losses
    assert 0 < sum(each.cached > 0 for each in received) and 0 < sum(each.cached > 0 for each in second)


def test_a_worker_on_a_gpu_breaks_no_promise_but_for_lag() -> None:
    """Recorded by a worker of ours with vLLM 0.33 on an H200; requests stand where they arrived."""
    with load_host(environ={}) as host:
        report = replay_with(host, open_trace(DATA / "vllm-0.33-h200-worker.jsonl.xz"))

    assert (151, [], 15) == (report.requests, report.mistakes, report.lagged)
    right = {score.scorer: score.exact_blocks for score in report.scores}
    assert (136, 111) == (right["exact"], right["global only"])
