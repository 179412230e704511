"""A program's temporary folder, and what it has started: gone with it, in whichever way it ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.signals import as_from_a_terminal
from vswa_plugin.errors import ConfigError, ConnectError
from vswa_plugin.launch import scratch
from vswa_plugin.launch.scratch import (
    OWNER_FILE,
    SCRATCH_ENV,
    clean,
    end_processes,
    open_scratch,
    sweep,
    wait_for_ends,
)

#: A child; its own child; one in a session of its own; one without our variable, below a parent that has it.
_TREE = """
sleep 600 &
setsid sleep 600 &
env -i sleep 600 &
echo started
wait
"""
_OWNER = f"""
import subprocess, sys
from vswa_plugin.launch.scratch import open_scratch
with open_scratch("owner") as scratch:
    child = subprocess.Popen(["sh", "-c", '''{_TREE}'''], stdout=subprocess.PIPE, start_new_session=True)
    child.stdout.readline()
    print(scratch.path, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made here."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


@contextmanager
def owner() -> Iterator[tuple[subprocess.Popen[str], Path, list[psutil.Process]]]:
    """A program with a folder; the path, and all that it has started, the reaper first."""
    command = [sys.executable, "-c", _OWNER]
    with as_from_a_terminal():
        started_program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with started_program as program:
        assert program.stdout is not None
        folder = Path(program.stdout.readline().strip())
        started = psutil.Process(program.pid).children(recursive=True)
        try:
            yield (
                program,
                folder,
                sorted(started, key=lambda each: "launch.reaper" not in str(each.cmdline())),
            )
        finally:
            program.kill()
            end_processes(started, 1)


def left_of(processes: list[psutil.Process], wait_s: float = 30.0) -> list[psutil.Process]:
    return wait_for_ends(processes, time.monotonic() + wait_s)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP])
def test_what_a_killed_program_has_started_ends_at_every_depth_and_its_folder_goes(
    number: signal.Signals,
) -> None:
    with owner() as (program, folder, started):
        assert len(started) == 5
        assert folder.is_dir()
        program.send_signal(number)
        program.wait(10)

        assert left_of(started) == []
        assert not folder.exists()


def test_what_a_killed_program_has_started_ends_though_its_folder_was_removed_meanwhile() -> None:
    with owner() as (program, folder, started):
        shutil.rmtree(folder)
        program.kill()
        program.wait(10)

        assert left_of(started) == []


def test_a_program_whose_folder_was_removed_meanwhile_ends_all_that_it_has_started() -> None:
    with owner() as (program, folder, started):
        shutil.rmtree(folder)
        program.communicate("")

        assert program.returncode == 0
        assert left_of(started, 0) == []


def test_a_failure_is_passed_on_though_the_folder_was_removed_meanwhile() -> None:
    with pytest.raises(ConnectError, match="no broker"), open_scratch("x") as opened:
        shutil.rmtree(opened.path)
        raise ConnectError("no broker")


def test_where_the_reaper_was_killed_too_the_next_folder_cleans_the_last() -> None:
    with owner() as (program, folder, (reaper, *started)):
        reaper.kill()
        program.kill()
        program.wait(10)
        assert left_of(started, 0) == started
        with open_scratch("next"):
            assert left_of(started, 0) == []
            assert not folder.exists()


def test_the_reaper_outlives_what_ends_all_in_a_terminal_or_a_container() -> None:
    with owner() as (program, folder, started):
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            started[0].send_signal(number)
        program.kill()
        program.wait(10)

        assert left_of(started) == []
        assert not folder.exists()


def test_a_program_that_ends_leaves_neither_processes_nor_its_folder() -> None:
    with owner() as (program, folder, started):
        program.communicate("")

        assert program.returncode == 0
        assert left_of(started, 0) == []
        assert not folder.exists()


def test_the_folder_of_a_program_that_lives_stays_and_so_does_what_is_not_ours(folders: Path) -> None:
    (folders / "vswa-of-somebody").mkdir()
    with owner() as (_, folder, started):
        sweep(Path(os.environ["TMPDIR"]))

        assert folder.is_dir()
        assert left_of(started, 0) == started
    assert (folders / "vswa-of-somebody").is_dir()


def test_the_variable_names_the_folder_while_it_is_open_and_folders_nest() -> None:
    before = os.environ.get(SCRATCH_ENV)
    with open_scratch("outer") as outer:
        with open_scratch("inner") as inner:
            assert os.environ[SCRATCH_ENV] == str(inner.path)
        assert os.environ[SCRATCH_ENV] == str(outer.path)
        assert not inner.path.exists()
    assert os.environ.get(SCRATCH_ENV) == before


def filled(folder: Path) -> None:
    (folder / "etcd-data" / "member").mkdir(parents=True)
    for name in ("worker-0.log", "worker-0.log.1", "worker-0.termination"):
        (folder / name).write_text("what happened")


def test_a_failure_keeps_the_logs_and_says_where() -> None:
    with pytest.raises(ConnectError) as raised, open_scratch("x") as opened:
        filled(opened.path)
        raise ConnectError("NATS is away")

    assert raised.value.__notes__ == [f"logs are kept in {opened.path}"]
    assert sorted(each.name for each in opened.path.iterdir()) == ["worker-0.log", "worker-0.log.1"]
    sweep(Path(os.environ["TMPDIR"]))
    assert opened.path.is_dir()


def test_a_failure_without_logs_keeps_nothing_and_says_nothing() -> None:
    with pytest.raises(ConnectError) as raised, open_scratch("x") as opened:
        (opened.path / "empty.log").touch()
        raise ConnectError("NATS is away")

    assert not hasattr(raised.value, "__notes__")
    assert not opened.path.exists()


@pytest.mark.parametrize("ending", [ConfigError("a port"), KeyboardInterrupt(), BrokenPipeError(), None])
def test_an_ending_that_is_no_failure_keeps_no_logs(ending: BaseException | None) -> None:
    try:
        with open_scratch("x") as opened:
            filled(opened.path)
            if ending is not None:
                raise ending
    except BaseException as error:
        assert error is ending

    assert not opened.path.exists()


def test_a_reaper_that_has_ended_before_its_time_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with open_scratch("x") as opened:
        (reaper,) = [each for each in psutil.Process().children() if str(opened.path) in each.cmdline()]
        reaper.kill()
        left_of([reaper])

    assert (
        "expected a process that cleans up where this one is killed, but it had ended with -9" in caplog.text
    )


def test_a_process_that_ignores_sigterm_is_killed() -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as stubborn:
        assert stubborn.stdout is not None
        stubborn.stdout.readline()
        end_processes([psutil.Process(stubborn.pid)], 0.05)

        assert stubborn.wait(10) == -signal.SIGKILL


def test_what_was_started_last_ends_first(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = """
import signal, sys, time
def end(*_):
    with open(sys.argv[1], "a") as log:
        log.write(sys.argv[2])
    sys.exit()
signal.signal(signal.SIGTERM, end)
print(flush=True)
time.sleep(600)
"""
    started = []
    for name in "abc":
        command = [sys.executable, "-c", code, str(log), name]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        assert started[-1].stdout is not None
        started[-1].stdout.readline()
    end_processes([psutil.Process(each.pid) for each in started])
    for each in started:
        each.communicate()

    assert log.read_text() == "cba"


def test_what_is_started_while_it_is_cleaned_ends_too(folders: Path) -> None:
    """As by a program that starts its child again."""
    with owner() as (program, folder, (reaper, *started)):
        reaper.kill()
        program.kill()
        again = "trap '' TERM; while :; do sleep 600; done"
        env = {**os.environ, SCRATCH_ENV: str(folder)}
        with subprocess.Popen(["sh", "-c", again], env=env) as loop:
            clean(folder)

            assert loop.wait(10) == -signal.SIGKILL
        assert scratch._started_for(folder) == left_of(started, 0) == []


def test_a_folder_is_not_taken_for_one_without_an_owner_before_its_lock_is_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    locked = scratch.fcntl.flock

    def flock(file: int, mode: int) -> None:
        assert not list(Path(os.environ["TMPDIR"]).glob(f"*/{OWNER_FILE}"))
        locked(file, mode)

    monkeypatch.setattr(scratch.fcntl, "flock", flock)
    with open_scratch("x") as opened:
        assert (opened.path / OWNER_FILE).exists()
