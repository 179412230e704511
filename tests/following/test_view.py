"""When a rank may be scored: staleness, silence, and whose fault a pause was."""

from __future__ import annotations

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.following.view import Attention, View, ViewOptions
from vswa_plugin.wire.events import Batch, Layout, Source, Unknown

LAYOUT = CacheLayout((CacheGroup(0, 512, 32),), "trtllm_v2", "m")
EVENT = Layout(LAYOUT.groups, "trtllm_v2", "h", "m")


def live_view() -> View:
    view = View(Source("ns", "backend", 1), ViewOptions(), attention=Attention(1.0))
    view.layout = LAYOUT
    view.reader.on_batch(Batch(1, 5, 0, 0, (EVENT,)), 0.0)
    view.stale_since = None
    return view


def ticks(view: View, start: float, seconds: float, connected: bool = True, step: float = 0.25) -> float:
    now = start
    while now < start + seconds:
        now += step
        view._attention.tick(now, connected)
    return now


def test_a_rank_that_was_never_heard_of_is_not_scored() -> None:
    view = View(Source("ns", "backend", 1), ViewOptions())

    assert not view.scored(0.0)
    assert view.state == "waiting"


def test_a_live_rank_is_scored() -> None:
    assert live_view().scored(0.0)
    assert live_view().state == "live"


def test_a_stale_rank_is_scored_as_last_seen_for_ten_seconds() -> None:
    view = live_view()
    view.stale_since = 100.0

    assert view.scored(109.9)
    assert not view.scored(110.1)
    assert view.state == "stale"


def test_missing_heartbeats_score_0_within_three() -> None:
    view = live_view()
    view._attention.tick(0.0, connected=True)
    now = ticks(view, 0.0, 2.0)
    assert view.scored(now)

    now = ticks(view, now, 1.0)
    assert not view.scored(now)
    assert view.state == "silent"
    view.heard()
    assert view.scored(now)


def test_heartbeats_that_are_missing_while_our_own_broker_is_away_do_not_count() -> None:
    view = live_view()
    ticks(view, 0.0, 60.0, connected=False)

    assert not view.silent


def test_a_view_is_not_live_while_our_own_broker_is_away_and_not_scored_after_the_grace() -> None:
    view = live_view()
    view._attention.tick(0.0, connected=True)
    now = ticks(view, 0.0, 9.0, connected=False)
    assert ("stale", "the broker is away", True) == (view.state, view.reason, view.scored(now))

    now = ticks(view, now, 2.0, connected=False)
    assert not view.scored(now)


def test_a_view_is_live_again_once_its_rank_is_heard_over_the_new_connection() -> None:
    view = live_view()
    view._attention.tick(0.0, connected=True)
    now = ticks(view, 0.0, 20.0, connected=False)
    now = ticks(view, now, 1.0)
    assert ("stale", "not heard since contact was lost", False) == (
        view.state,
        view.reason,
        view.scored(now),
    )

    view.heard()
    assert ("live", "", True) == (view.state, view.reason, view.scored(now))


def test_a_view_that_was_heard_between_two_losses_of_contact_has_the_grace_of_the_second() -> None:
    view = live_view()
    view._attention.tick(0.0, connected=True)
    now = ticks(view, 0.0, 8.0, connected=False)
    now = ticks(view, now, 1.0)
    view.heard()
    now = ticks(view, now, 8.0, connected=False)

    assert view.scored(now)
    assert not view.scored(now + 3.0)


def test_a_view_that_is_made_while_the_broker_is_away_is_not_live_before_it_is_back() -> None:
    attention = Attention(1.0)
    attention.tick(0.0, connected=False)
    view = View(Source("ns", "backend", 1), ViewOptions(), attention=attention)
    view.layout = LAYOUT
    assert "stale" == view.state

    attention.tick(0.25, connected=True)
    view.heard()
    assert "live" == view.state


def test_what_is_read_late_while_the_broker_is_away_is_no_contact() -> None:
    view = live_view()
    view._attention.tick(0.0, connected=True)
    now = ticks(view, 0.0, 5.0, connected=False)
    view.heard()
    now = ticks(view, now, 6.0, connected=False)

    assert not view.scored(now)


def test_a_loop_that_did_not_run_for_long_makes_a_view_stale_until_its_rank_is_heard() -> None:
    view = live_view()
    view._attention.tick(0.0, connected=True)
    view._attention.tick(300.0, connected=True)
    assert "stale" == view.state

    view.heard()
    assert "live" == view.state


def test_a_rank_is_silent_in_the_end_though_our_loop_is_slow_at_every_turn() -> None:
    view = live_view()
    view._attention.tick(0.0, connected=True)
    ticks(view, 0.0, 30.0, step=1.5)

    assert view.silent


def test_a_loop_that_did_not_run_does_not_blame_the_rank() -> None:
    view = live_view()
    view._attention.tick(0.0, connected=True)
    view._attention.tick(300.0, connected=True)

    assert view.scored(300.0)


def test_only_an_unregistered_rank_is_forgotten_and_only_after_long() -> None:
    view = live_view()
    view._attention.tick(0.0, connected=True)
    now = ticks(view, 0.0, 59.0)
    assert not view.forgotten
    now = ticks(view, now, 2.0)
    assert view.forgotten
    view.registered = True
    assert not view.forgotten


def test_an_epoch_with_an_event_of_a_later_version_is_not_scored() -> None:
    view = live_view()
    view.reader.on_batch(Batch(1, 5, 1, 0, (Unknown("grown"),)), 0.0)

    assert not view.scored(0.0)
    assert view.state == "unreadable"
