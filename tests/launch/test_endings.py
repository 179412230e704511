"""Endings x programs: real brokers, frontend and workers. Nothing is left, and the next one starts.

What is common to all programs is tried in each way with ``vswa brokers``, which starts fastest.
"""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.launch_helpers import REAPER, STANDIN
from tests.signals import as_from_a_terminal
from vswa_plugin.launch.processes import free_port
from vswa_plugin.launch.scratch import end_processes, wait_for_ends

pytestmark = pytest.mark.timeout(180)  # some start a whole deployment twice
VSWA = str(Path(sys.executable).with_name("vswa"))
ROOT = Path(__file__).parents[2]
BROKERS = ("brokers", "--nats-port", "0", "--etcd-port", "0")
#: `vswa brokers` says this on standard error in any case.
_BROKERS_SAY = "embedded brokers, never for production"
#: Makes standard input the terminal of its session.
_ON_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
#: No file may grow beyond a MiB, as on a disk that is full: etcd wants 64 for its log of writes.
_SMALL_FILES = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
os.execv(sys.argv[1], sys.argv[1:])
"""


class Started:
    """A program of ours that has been started as from a shell, and everything that it has started."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.descendants: set[psutil.Process] = set()

    def said(self, name: str = "out") -> str:
        return (self.folder / name).read_text()

    def wait_until(self, text: str, timeout_s: float = 50.0) -> None:
        """Return once it has printed ``text``."""
        deadline = time.monotonic() + timeout_s
        while text not in self.said():
            assert self.process.poll() is None, self.said() + self.said("err")
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)  # nothing announces that a file has grown
        self.look()

    def look(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.descendants |= set(psutil.Process(self.process.pid).children(recursive=True))

    def kill_with_reaper(self) -> None:
        reapers = [each for each in self.descendants if REAPER in each.cmdline()]
        for each in reapers:
            each.kill()
        assert wait_for_ends(reapers, time.monotonic() + 10) == []
        self.process.kill()

    def ended(self, *, kept: bool = False) -> int:
        """The exit code; asserts that nothing runs, that no folder is left (``kept``: but logs), and that no
        more than a line was printed about it.
        """
        code = self.process.wait(50)
        left = wait_for_ends(self.descendants, time.monotonic() + 30)
        assert left == [], [each.cmdline() for each in left]
        folders = list((self.folder / "tmp").iterdir())
        files = [path.name for folder in folders for path in folder.iterdir()]
        assert bool(folders) == kept, folders
        assert not [name for name in files if not name.endswith(".log")], files
        said = [line for line in self.said("err").splitlines() if _BROKERS_SAY not in line]
        assert len(said) <= 1 or kept, said
        assert not [line for line in said if "Traceback" in line], said
        return code


@contextmanager
def started(folder: Path, *command: str, before: str = "", **streams: int) -> Iterator[Started]:
    """``before``: Python code that goes on with the command."""
    environ = {**os.environ, "TMPDIR": str(folder / "tmp")}
    (folder / "tmp").mkdir(exist_ok=True)
    line = [*([sys.executable, "-c", before] if before else []), VSWA, *command]
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err, as_from_a_terminal():
        # A group of its own is what a shell gives it, so that Ctrl-C can be sent to all of it.
        process = subprocess.Popen(
            line,
            env=environ,
            start_new_session=True,
            **{"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err, **streams},
        )
    it = Started(process, folder)
    try:
        yield it
    finally:
        it.look()
        process.kill()
        process.wait()
        end_processes(it.descendants)


def nobody_reads() -> int:
    """The writing end of a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def starts_again(folder: Path) -> None:
    with started(folder, *BROKERS) as again:
        again.wait_until("ETCD_ENDPOINTS")
        again.process.terminate()
        assert again.ended() == 0


# -- vswa brokers: every ending ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (lambda it: it.process.send_signal(signal.SIGTERM), 0),
        (lambda it: it.process.send_signal(signal.SIGHUP), 0),
        (lambda it: os.killpg(it.process.pid, signal.SIGINT), 0),
        (lambda it: it.process.send_signal(signal.SIGQUIT), -signal.SIGQUIT),
        (lambda it: os.killpg(it.process.pid, signal.SIGKILL), -signal.SIGKILL),
    ],
    ids=["SIGTERM", "SIGHUP", "Ctrl-C", "Ctrl-backslash", "kill -9"],
)
def test_brokers_that_a_signal_ends(tmp_path: Path, end: Callable[[Started], None], code: int) -> None:
    with started(tmp_path, *BROKERS) as it:
        it.wait_until("ETCD_ENDPOINTS")
        assert len(it.descendants) == 3
        end(it)

        assert it.ended() == code


def test_brokers_on_fixed_ports_that_are_killed_with_their_reaper_start_again_at_once(tmp_path: Path) -> None:
    ports = ("--nats-port", str(free_port()), "--etcd-port", str(free_port()))
    with started(tmp_path, "brokers", *ports, "--data-dir", str(tmp_path / "data")) as it:
        it.wait_until("ETCD_ENDPOINTS")
        it.kill_with_reaper()
        it.process.wait(10)
        assert len(wait_for_ends(it.descendants, 0)) == 2
        with started(tmp_path, "brokers", *ports, "--data-dir", str(tmp_path / "data")) as again:
            again.wait_until("ETCD_ENDPOINTS")
            assert wait_for_ends(it.descendants, 0) == []
            again.process.terminate()
            assert again.ended() == 0


def test_brokers_whose_terminal_is_closed(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    try:
        streams = {"stdin": theirs, "stderr": theirs}
        with started(tmp_path, *BROKERS, before=_ON_TERMINAL, **streams) as it:
            os.close(theirs)
            it.wait_until("ETCD_ENDPOINTS")
            os.close(ours)

            assert it.ended() == 0
    finally:
        for descriptor in (ours, theirs):
            with contextlib.suppress(OSError):
                os.close(descriptor)


@pytest.mark.parametrize(
    ("stream", "target", "code"),
    [
        ("stdout", nobody_reads, 141),
        ("stderr", nobody_reads, 141),
        ("stdout", lambda: os.open("/dev/full", os.O_WRONLY), 2),
        ("stderr", lambda: os.open("/dev/full", os.O_WRONLY), 2),
    ],
    ids=["nobody reads stdout", "nobody reads stderr", "stdout on a full disk", "stderr on a full disk"],
)
def test_brokers_that_cannot_say_where_they_are(
    tmp_path: Path, stream: str, target: Callable[[], int], code: int
) -> None:
    descriptor = target()
    try:
        with started(tmp_path, *BROKERS, **{stream: descriptor}) as it:
            assert it.ended(kept=False) == code
    finally:
        os.close(descriptor)


def test_brokers_without_standard_streams(tmp_path: Path) -> None:
    close = "import os, sys; [os.close(n) for n in (0, 1, 2)]; os.execv(sys.argv[1], sys.argv[1:])"
    with started(tmp_path, *BROKERS, before=close) as it:
        deadline = time.monotonic() + 30
        while not list(tmp_path.glob("tmp/vswa-*/etcd/member/snap/db")):  # all that shows that they run
            assert time.monotonic() < deadline and it.process.poll() is None
            time.sleep(0.02)
        it.look()
        it.process.terminate()

        assert it.ended() == 0


def test_a_disk_that_fills_up_keeps_the_logs_and_says_where(tmp_path: Path) -> None:
    with started(tmp_path, *BROKERS, before=_SMALL_FILES) as it:
        assert it.ended(kept=True) == 1
        (folder,) = (tmp_path / "tmp").iterdir()

    assert f"logs are kept in {folder}" in it.said("err").splitlines()[-1]
    assert (folder / "etcd.log").stat().st_size > 0
    assert "nats-server.log" in [path.name for path in folder.iterdir()]
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    starts_again(tmp_path)


# -- the whole deployments -----------------------------------------------------------------------------


def test_a_demo_whose_reader_has_seen_enough(tmp_path: Path) -> None:
    """``vswa demo | head -3``."""
    with started(tmp_path, "demo", stdout=subprocess.PIPE) as it:
        assert it.process.stdout is not None
        for _ in range(3):
            assert it.process.stdout.readline().startswith(b"[")
        it.look()
        assert [each for each in it.descendants if "nats-server" in each.name()]
        it.process.stdout.close()

        assert it.ended() == 141
        assert it.said("err") == ""


@pytest.mark.parametrize(
    ("reached", "end", "code"),
    [
        ("making a small", signal.SIGTERM, 143),
        ("starting worker-0", signal.SIGHUP, 129),
        ("frontend serves", signal.SIGINT, 130),
        (" 1. harbour", signal.SIGKILL, -signal.SIGKILL),
    ],
    ids=["SIGTERM", "SIGHUP", "Ctrl-C", "kill -9"],
)
def test_a_demo_that_a_signal_ends(tmp_path: Path, reached: str, end: signal.Signals, code: int) -> None:
    with started(tmp_path, "demo") as it:
        it.wait_until(reached)
        os.killpg(it.process.pid, end)

        assert it.ended() == code
        assert it.said("err") == ""


def test_a_served_model_whose_server_is_killed_is_served_again_at_once_on_the_same_port(
    tmp_path: Path,
) -> None:
    command = ("serve", "--http-port", str(free_port()), "--log-dir", str(tmp_path / "logs"))
    with started(tmp_path, *command) as it:
        it.wait_until("Ctrl-C stops")
        assert len(it.descendants) == 6
        it.process.kill()
        it.process.wait(10)
        with started(tmp_path, *command) as again:
            again.wait_until("Ctrl-C stops")
            assert wait_for_ends(it.descendants, 0) == []
            os.killpg(again.process.pid, signal.SIGHUP)

            assert again.ended() == 0


def test_a_launch_that_is_killed_with_its_reaper_starts_again_at_once(
    tmp_path: Path, model_dir: Path
) -> None:
    command = ("launch", "agg", "--engine", "standin", "--model-path", str(model_dir))
    command += ("--http-port", str(free_port()), "--", "--plugin", STANDIN)
    with started(tmp_path, *command) as it:
        it.wait_until("Ctrl-C stops")
        it.kill_with_reaper()
        it.process.wait(10)
        with started(tmp_path, *command) as again:
            again.wait_until("waiting until the frontend")
            assert wait_for_ends(it.descendants, 0) == []
            os.killpg(again.process.pid, signal.SIGINT)

            assert again.ended() == 0


# -- the tests themselves ------------------------------------------------------------------------------

_TEST_THAT_WAITS = """
import pathlib, threading

def test_that_waits(brokers):
    pathlib.Path({ready!r}).write_text(brokers.nats_server)
    threading.Event().wait()
"""


def test_tests_that_are_killed_leave_no_broker(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    (tmp_path / "tmp").mkdir()
    file = tmp_path / "test_waits.py"
    file.write_text(_TEST_THAT_WAITS.format(ready=str(ready)))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    command += [f"--rootdir={tmp_path}", f"--basetemp={tmp_path / 'base'}", str(file)]
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        environ = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
        tests = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=out, stderr=err)
    it = Started(tests, tmp_path)
    try:
        deadline = time.monotonic() + 40
        while not ready.exists():
            assert tests.poll() is None and time.monotonic() < deadline, it.said()
            time.sleep(0.02)
        it.look()
        assert {"etcd", "nats-server"} <= {each.name() for each in it.descendants}
    finally:
        tests.kill()

    assert it.ended() == -signal.SIGKILL
