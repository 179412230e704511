"""How late messages come, whatever the clocks of the two machines say."""

from __future__ import annotations

import math

import pytest

from vswa_plugin.blocks.layout import CacheGroup
from vswa_plugin.following.lag import Lag
from vswa_plugin.following.view import View, ViewOptions
from vswa_plugin.wire.events import Batch, Layout, Source

#: The publisher's clock is an hour behind.
BEHIND_S = -3600.0
LAYOUT = Layout((CacheGroup(0, 512, 32),), "trtllm_v2", "h", "m")


def ns(seconds: float) -> int:
    return round((10_000 + BEHIND_S + seconds) * 1e9)


def lag_of(*messages: tuple[float, float]) -> float:
    """After messages that were published and have arrived at these seconds."""
    lag = Lag()
    for published, arrived in messages:
        lag.heard(ns(published), arrived)
    return lag.seconds


def test_clocks_that_differ_are_no_lag() -> None:
    assert 0.0 == lag_of((0, 0), (1, 1), (2, 2))


def test_a_message_that_comes_later_after_the_one_before_than_it_was_published_lags() -> None:
    assert pytest.approx(2.0, abs=0.1) == lag_of((0, 0), (1, 3))


def test_lag_ends_when_messages_catch_up() -> None:
    assert pytest.approx(0.0, abs=0.1) == lag_of((0, 0), (1, 7), (2, 7.1), (7.2, 7.2))


@pytest.mark.parametrize("step", [-7200.0, -3.0, 5.0, 7200.0])
def test_a_publishers_clock_that_is_set_is_no_lag(step: float) -> None:
    assert pytest.approx(0.0, abs=0.1) == lag_of((0, 0), (1, 1), (2 + step, 2), (3 + step, 3))


def test_a_publisher_that_was_frozen_does_not_lag() -> None:
    assert pytest.approx(0.0, abs=0.1) == lag_of((0, 0), (1, 1), (61, 61), (62, 62))


def test_what_a_clock_that_was_set_back_a_little_leaves_wears_off() -> None:
    set_back = ((0.0, 0.0), *((second - 0.5, float(second)) for second in range(1, 120)))

    assert pytest.approx(0.5, abs=0.1) == lag_of(*set_back[:2])
    assert 0.0 == lag_of(*set_back)


def view_of(max_lag_s: float, delay: float) -> View:
    """A view whose second message came so late."""
    view = View(Source("n", "c", 1), ViewOptions(max_lag_s=max_lag_s))
    view.layout = LAYOUT.cache_layout
    view.reader.on_batch(Batch(1, 5, 0, 0, (LAYOUT,)), 0.0)
    view.note_lag(5, ns(0), 0.0)
    view.note_lag(5, ns(1), 1.0 + delay)
    return view


def test_a_view_that_lags_more_than_its_bound_is_neither_live_nor_scored() -> None:
    view = view_of(5.0, 6.0)

    assert (False, "stale") == (view.scored(7.0), view.state)
    assert "its messages arrive 5.9 s late" == view.reason


@pytest.mark.parametrize("bound", [5.0, math.inf])
def test_a_view_that_lags_less_than_its_bound_is_live(bound: float) -> None:
    view = view_of(bound, 4.0)

    assert (True, "live") == (view.scored(5.0), view.state)


def test_another_epoch_begins_without_lag() -> None:
    view = view_of(5.0, 6.0)
    view.note_lag(6, ns(2), 8.0)

    assert view.scored(8.0)
