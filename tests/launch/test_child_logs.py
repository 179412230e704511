"""Logs of child processes: bounded while they are written, no line lost, and read from their end only."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.e2e_helpers import eventually
from vswa_plugin.launch import logs
from vswa_plugin.launch.cluster import Cluster, ClusterSettings
from vswa_plugin.launch.logs import ChildLog
from vswa_plugin.launch.processes import Child

KIB = 1 << 10
#: Writes numbered lines as fast as it can, each by one call.
_FAST = """
import os, sys
for number in range({lines}):
    os.write(1, b"line %09d %s\\n" % (number, b"x" * 80))
"""


@pytest.fixture(params=["collapse", "punch"])
def log(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ChildLog:
    """A log on a file system that can collapse ranges, or only punch holes."""
    if request.param == "punch":
        forbid(monkeypatch, logs._COLLAPSE)
    return ChildLog(tmp_path / "child.log")


def forbid(monkeypatch: pytest.MonkeyPatch, *modes: int) -> None:
    real = logs._fallocate

    def fallocate(file: int, mode: int, offset: int, length: int) -> bool:
        return mode not in modes and real(file, mode, offset, length)

    monkeypatch.setattr(logs, "_fallocate", fallocate)


def write(log: ChildLog, text: str) -> None:
    with log.begin_life() as file:
        file.write(text.encode())


def content(path: Path) -> bytes:
    """What a file holds behind the hole at its beginning."""
    data = path.read_bytes()
    with path.open("rb") as file:
        begin = logs._first_data(file.fileno())
    assert not data[:begin].strip(b"\0")
    return data[begin:]


def numbered(first: int, count: int) -> str:
    return "".join(f"line {number:06d}\n" for number in range(first, first + count))


def test_a_log_above_its_bound_becomes_the_older_one_and_no_byte_is_lost(log: ChildLog) -> None:
    write(log, numbered(0, 2_000))

    assert not log.rotate(24 * KIB)
    assert log.rotate(16 * KIB)
    assert content(log.older) + content(log.path) == numbered(0, 2_000).encode()
    assert 0 < len(content(log.path)) <= 4 * KIB, "all but the last, incomplete block of the file system"
    assert not log.rotate(16 * KIB)
    assert sorted(path.name for path in log.path.parent.iterdir()) == ["child.log", "child.log.1"]


def test_each_older_log_replaces_the_one_before_and_follows_it_without_a_gap(log: ChildLog) -> None:
    write(log, numbered(0, 2_000))
    log.rotate(16 * KIB)
    oldest = content(log.older)
    write(log, numbered(2_000, 2_000))

    assert log.rotate(16 * KIB)
    assert oldest + content(log.older) + content(log.path) == numbered(0, 4_000).encode()


def test_the_space_of_what_has_gone_is_free(log: ChildLog) -> None:
    write(log, "x" * 1024 * KIB)
    log.rotate(16 * KIB)

    assert log.path.stat().st_blocks * 512 <= 16 * KIB


def test_the_end_is_that_of_the_present_life_before_and_after_rotation(log: ChildLog) -> None:
    write(log, "an earlier life\n" * 2_000)
    write(log, "first\n" + "x" * 8 * KIB + "last\n")

    assert log.tail(100 * KIB).startswith("first\n")
    log.rotate(16 * KIB)
    assert log.tail(100 * KIB).endswith("xlast\n")
    assert "earlier" not in log.tail(100 * KIB)
    assert log.tail(5) == "last\n"
    write(log, "")
    assert log.tail() == ""


def test_a_hole_of_an_earlier_launcher_is_not_copied(log: ChildLog) -> None:
    write(log, "x" * 64 * KIB)
    log.rotate(16 * KIB)
    later = ChildLog(log.path)
    write(later, "y" * 32 * KIB)
    later.rotate(16 * KIB)

    assert content(later.older).strip(b"x").startswith(b"y")
    assert b"\0" not in later.older.read_bytes()


def test_where_a_file_cannot_be_shortened_it_is_said_once_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forbid(monkeypatch, logs._COLLAPSE, logs._PUNCH)
    log = ChildLog(tmp_path / "child.log")
    write(log, numbered(0, 2_000))

    assert [log.rotate(16 * KIB) for _ in range(3)] == [False] * 3
    assert log.path.read_text() == numbered(0, 2_000)
    assert [path.name for path in tmp_path.iterdir()] == ["child.log"]
    assert caplog.text.count("keep logs on ext4") == 1


def test_what_the_system_refuses_is_said_once_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = ChildLog(tmp_path / "child.log")
    write(log, numbered(0, 2_000))
    in_the_way = tmp_path / "child.log.1.part"
    in_the_way.mkdir()

    assert [log.rotate(16 * KIB) for _ in range(2)] == [False] * 2
    assert caplog.text.count("Is a directory") == 1
    in_the_way.rmdir()
    assert log.rotate(16 * KIB)


@pytest.mark.parametrize("mode", ["collapse", "punch"])
def test_no_line_of_a_child_that_writes_fast_is_lost(
    run: Run[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Every older log is kept here, so that all lines can be counted."""
    if mode == "punch":
        forbid(monkeypatch, logs._COLLAPSE)
    lines = 300_000
    kept: list[bytes] = []

    async def body() -> int:
        child = await Child.start("child", [sys.executable, "-c", _FAST.format(lines=lines)], tmp_path)
        ended = asyncio.create_task(child.wait())
        rotations = 0
        while not ended.done():
            if await asyncio.to_thread(child.bound_log, 1024 * KIB):
                rotations += 1
                kept.append(await asyncio.to_thread((tmp_path / "child.log.1").read_bytes))
        assert await ended == 0
        return rotations

    rotations = run(body())
    kept.append(content(tmp_path / "child.log"))
    said = [int(line.split()[1]) for line in b"".join(kept).splitlines()]

    assert said == list(range(lines))
    assert rotations > 3


def test_the_event_loop_goes_on_and_reads_logs_while_one_is_copied(
    run: Run[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copying, go_on = threading.Event(), threading.Event()
    real = logs._copy

    def copy(source: int, begin: int, end: int, target: Path) -> None:
        copying.set()
        assert go_on.wait(10), "the event loop stands still"
        real(source, begin, end, target)

    monkeypatch.setattr(logs, "_copy", copy)

    async def body() -> str:
        cluster = Cluster(ClusterSettings("m", "gemma", log_bytes=50_000), tmp_path)
        child = await Child.start("worker-0", [sys.executable, "-c", "print('x' * 100_000)"], tmp_path)
        await child.wait()
        cluster.workers.append(child)
        bounding = asyncio.create_task(cluster.bound_logs())
        try:
            await eventually(copying.is_set, "the log is copied")
            said = child.log_tail()
            go_on.set()
            await eventually(lambda: child.log_path.stat().st_size < 50_000, "it is bounded")
            return said
        finally:
            go_on.set()
            bounding.cancel()

    assert run(body()).endswith("xxx")


def test_a_cluster_bounds_the_logs_of_all_its_children(
    run: Run[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vswa_plugin.launch.cluster.LOG_INTERVAL_S", 0.01)
    kinds = ("_brokers", "routers", "workers")

    async def body() -> None:
        cluster = Cluster(ClusterSettings("m", "gemma", log_bytes=50_000), tmp_path)
        for kind in kinds:
            getattr(cluster, kind).append(await Child.start(kind, ["sleep", "60"], tmp_path))
            (tmp_path / f"{kind}.log").write_text("x" * 100_000)
        cluster.frontend = await Child.start("frontend", ["sleep", "60"], tmp_path)
        (tmp_path / "frontend.log").write_text("x" * 100_000)
        bounding = asyncio.create_task(cluster.bound_logs())
        try:
            names = (*kinds, "frontend")
            await eventually(
                lambda: all((tmp_path / f"{name}.log").stat().st_size < 50_000 for name in names),
                "all are bounded",
            )
        finally:
            bounding.cancel()
            await cluster.stop()

    run(body())
