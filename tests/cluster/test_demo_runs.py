"""``make demo`` as a user runs it: real brokers, a real frontend, real workers."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest


def demo(log_dir: Path, *options: str) -> str:
    """What a demo prints that must pass."""
    command = [sys.executable, "-m", "vswa_plugin", "demo", "--log-dir", str(log_dir), "--max-tokens", "4"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=55, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "demo passed" in done.stdout
    assert "FAIL" not in done.stdout
    return done.stdout


def logs(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.log")}


def readme_sample() -> list[str]:
    """The lines of the demo that README.md shows."""
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    _, _, rest = readme.partition("<!-- sample: make demo TOPOLOGY=agg_router -->\n")
    lines = takewhile(lambda line: not line or line.startswith("    "), rest.splitlines())
    return [line for line in lines if line]


def shape(line: str) -> str:
    """A line without its numbers and names: what differs from run to run."""
    words = re.sub(r"worker [AB]\b", "worker", re.sub(r"\d+", "0", line))
    return " ".join(re.sub(r"^ *0\. \w+( 0)?", "0. document", words).split())


def test_the_demo_passes_and_shows_every_window(tmp_path: Path) -> None:
    said = demo(tmp_path)

    for window in ("window 512", "window global"):
        assert said.count(window) == 2, "one line per worker"
    assert "would have promised a hit" in said
    assert logs(tmp_path) == {"etcd", "frontend", "nats-server", "worker-0", "worker-1"}


def test_the_disaggregated_demo_passes_and_shows_what_each_request_moved(tmp_path: Path) -> None:
    said = demo(tmp_path, "--topology", "disagg")

    assert said.count("moved to the decode worker, window 512: ") == 14
    assert "would have promised a hit" in said
    assert logs(tmp_path) == {"etcd", "frontend", "nats-server", "prefill-0", "decode-0"}


@pytest.mark.parametrize(("topology", "router"), [("agg_router", "exact"), ("disagg_router", "stock")])
def test_the_demo_of_a_router_shows_what_was_promised_and_what_was_kept(
    tmp_path: Path, topology: str, router: str
) -> None:
    said = demo(tmp_path, "--topology", topology, "--router", router)

    assert said.count("  promised ") == 20 + 1, "one line per request, and the heading"
    assert "promises were kept, in whole blocks" in said
    assert ("router-0" in logs(tmp_path)) is (router == "exact")
    if router == "exact":
        assert "20 of 20 promises were kept" in said
        printed = set(map(shape, said.splitlines()))
        assert [] == [line for line in readme_sample() if shape(line) not in printed], "README.md shows these"
        assert "a router that counts the global layers alone would have promised" in said
