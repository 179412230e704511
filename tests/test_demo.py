"""``make demo`` as a user runs it, and a verdict that can fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vswa_plugin.commands.demo import Answer, Tally, _verdict
from vswa_plugin.events import Batch, Layout, Removed, Source, Stored
from vswa_plugin.layout import CacheGroup

SOURCE = Source("dynamo", "backend", 7)
LAYOUT = Layout((CacheGroup(0, 512, 32), CacheGroup(1, None, 32)), "trtllm_v2", "h", "gemma")


def test_the_demo_passes_and_shows_every_window(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vswa_plugin", "demo", "--log-dir", str(tmp_path), "--max-tokens", "4"],
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "demo passed" in done.stdout
    assert "FAIL" not in done.stdout
    for window in ("window 512", "window global"):
        assert done.stdout.count(window) == 2, "one line per worker"
    assert "would have promised a hit" in done.stdout
    assert {path.name for path in tmp_path.glob("*.log")} == {
        "etcd.log",
        "frontend.log",
        "nats-server.log",
        "worker-0.log",
        "worker-1.log",
    }


def good_answers() -> list[Answer]:
    return [Answer(200, "text", 1500, 1024) for _ in range(14)]


def good_tally() -> Tally:
    tally = Tally()
    events = (LAYOUT, Stored(0, 0, None, (1, 2)), Stored(1, 0, None, (1, 2)), Removed(0, (1,)))
    tally.add(SOURCE, Batch(1, 1, 0, 0, events))
    return tally


def test_the_verdict_holds_where_all_was_seen(capsys: pytest.CaptureFixture[str]) -> None:
    assert _verdict(good_answers(), good_tally(), {"worker-0": 0, "etcd": -15}, 1.0) == 0
    assert "demo passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answers", "tally", "codes"),
    [
        (good_answers()[1:], good_tally(), {}),
        ([*good_answers()[1:], Answer(503)], good_tally(), {}),
        ([Answer(200, "text", 1500, 0)] * 14, good_tally(), {}),
        ([Answer(200, "text", 900, 512)] * 14, good_tally(), {}),
        (good_answers(), Tally(), {}),
        (good_answers(), good_tally(), {"worker-1": 1}),
    ],
)
def test_the_verdict_fails_where_something_was_not_seen(
    answers: list[Answer], tally: Tally, codes: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _verdict(answers, tally, codes, 1.0) == 1
    assert "demo FAILED" in capsys.readouterr().out


def test_blocks_stored_again_for_a_window_that_global_still_holds_are_counted_as_overpromised() -> None:
    tally = good_tally()
    assert tally.recomputed == 0

    tally.add(SOURCE, Batch(1, 1, 4, 0, (Stored(0, 0, None, (1,)), Stored(0, 5, 9, (77,)))))

    assert tally.recomputed == 32
    assert tally.stored == {(7, "window 512"): 4, (7, "window global"): 2}
    assert tally.removed == {(7, "window 512"): 1}


def test_a_gap_in_the_ids_is_counted() -> None:
    tally = good_tally()
    tally.add(SOURCE, Batch(1, 1, 9, 0, ()))

    assert tally.gaps == 1
