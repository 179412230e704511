"""Promises by forecast: what a rank will have cached when a request's turn comes."""

from __future__ import annotations

import random

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout, Naming
from vswa_plugin.blocks.memory import Memory, Pool
from vswa_plugin.dynamo.client import namespaced_sequence_hashes
from vswa_plugin.forecast import Forecasts
from vswa_plugin.forecast.fleet import MOST_WAITING
from vswa_plugin.index import WindowIndex
from vswa_plugin.router.decide import Decider, Decision
from vswa_plugin.router.pools import Pool as RouterPool
from vswa_plugin.router.promises import Outcome, Promises
from vswa_plugin.selection import LoadBook, Weights
from vswa_plugin.wire.events import Event, Rank, Stored, layout_event

LAYOUT = CacheLayout((CacheGroup(0, 32, 16), CacheGroup(1, None, 16)), "vllm", "m")
A = Rank(1)
PROMPT = list(range(130))
OTHER = list(range(5_000, 5_130))
HASHES = tuple(namespaced_sequence_hashes(PROMPT, 16))


class Setting:
    """One rank, whose pool has room for ``blocks``."""

    def __init__(self, blocks: int | None = 100, *, forecast: bool = True) -> None:
        self.index = WindowIndex()
        self.forecasts = Forecasts()
        self.apply(layout_event(LAYOUT, memory=Memory((Pool((0, 1), blocks),), "vllm")))
        self.pool = RouterPool("m", Naming(16, 16), LoadBook(16), (A,))
        self.decider = Decider(
            self.index,
            Weights(),
            namespaced_sequence_hashes,
            rng=random.Random(3),
            forecasts=self.forecasts if forecast else None,
        )

    def apply(self, event: Event) -> None:
        self.index.apply(A, event)
        self.forecasts.apply(A, event)

    def holds(self, hashes: tuple[int, ...]) -> None:
        for group in (0, 1):
            self.apply(Stored(group, 0, None, hashes))

    def decide(self, tokens: list[int]) -> Decision:
        return self.decider.decide(self.pool, {"model": "m", "token_ids": tokens, "routing": None})


def test_a_prompt_behind_its_twin_is_promised_what_the_twin_will_have_stored() -> None:
    setting = Setting()

    assert [0, 128] == [setting.decide(PROMPT).cached_tokens for _ in range(2)]


def test_without_forecasts_it_is_promised_what_is_there() -> None:
    setting = Setting(forecast=False)

    assert [0, 0] == [setting.decide(PROMPT).cached_tokens for _ in range(2)]


def test_what_those_before_it_evict_is_not_promised() -> None:
    setting = Setting(blocks=20)
    setting.holds(HASHES)
    alone = setting.decider.decide(setting.pool, {"model": "m", "token_ids": PROMPT, "routing": None})
    setting.pool.book.free(alone.key)
    setting.decide(OTHER)

    assert (128, 0) == (alone.cached_tokens, setting.decide(PROMPT).cached_tokens)


def test_a_request_that_has_ended_is_not_waited_for_and_holds_nothing() -> None:
    setting = Setting(blocks=20)
    first = setting.decide(OTHER)
    setting.pool.book.free(first.key)
    setting.holds(HASHES)

    assert 128 == setting.decide(PROMPT).cached_tokens


def test_a_rank_whose_view_is_not_believed_is_promised_nothing() -> None:
    setting = Setting()
    setting.holds(HASHES)
    setting.decide(OTHER)
    setting.index.set_scored(A, False)
    setting.forecasts.set_scored(A, False)

    assert 0 == setting.decide(PROMPT).cached_tokens


def test_a_new_epoch_keeps_what_is_queued_and_forgets_what_was_held() -> None:
    setting = Setting()
    setting.holds(tuple(namespaced_sequence_hashes(OTHER, 16)))
    setting.decide(PROMPT)
    setting.index.drop(A)
    setting.apply(layout_event(LAYOUT))

    assert (0, 128) == (setting.decide(OTHER).cached_tokens, setting.decide(PROMPT).cached_tokens)


def test_a_rank_that_is_gone_is_not_forecast() -> None:
    setting = Setting()
    setting.decide(PROMPT)
    setting.forecasts.drop(A)

    assert setting.forecasts.get(A) is None
    assert 0 == setting.decide(PROMPT).cached_tokens


def test_errors_are_counted_by_what_has_caused_them() -> None:
    promises = Promises()
    for predicted, actual, live, busy in (
        (64, 64, True, True),
        (64, 0, True, True),
        (0, 32, True, True),
        (16, 0, False, True),
        (0, 16, True, False),
    ):
        promises.record(Outcome(A, 16, predicted, actual, live, busy, model="m"))

    assert {"eviction": 64, "queueing": 32, "lag": 16, "other": 16} == {
        cause: tokens for (_, cause), tokens in promises.causes.items()
    }


def test_behind_a_queue_that_is_too_long_to_compute_a_prompt_is_promised_what_is_there() -> None:
    setting = Setting(blocks=100_000)
    first = setting.decide(PROMPT).cached_tokens
    for number in range(MOST_WAITING // 8):
        setting.decide([100_000 + 200 * number + token for token in range(130)])

    assert [0, 0] == [first, setting.decide(PROMPT).cached_tokens]
