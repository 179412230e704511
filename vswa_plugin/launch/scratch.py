"""The temporary folder of a program that starts others, and what is left behind where that program is killed.

Whatever a program with such a folder starts, at whatever depth, has the folder's path in its environment
(:data:`SCRATCH_ENV`). So what outlives the program can be ended and removed by others, who need to know no
more than the folder. A process of its own waits for that (reaper.py): its standard input is a pipe that the
kernel closes as the program ends, in whichever way. Where both were killed, the next program that opens such
a folder does the same first, see :func:`sweep`.

The program holds flock(2) on a file in the folder for as long as it lives. A process id would not do: it is
given to others later, and means nothing in another container that shares the folder.

PR_SET_PDEATHSIG would reach children only, neither their own children nor files, is sent as soon as the
thread that has started them ends, and exists on Linux alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from vswa_plugin.program.disk import temporary_folder
from vswa_plugin.program.run import is_to_correct

logger = logging.getLogger(__name__)

#: In the environment of all that a program with a temporary folder has started: the path of that folder.
SCRATCH_ENV = "VSWA_SCRATCH"
#: In a folder whose owner has not cleaned up, and locked while that owner lives.
OWNER_FILE = ".owner"
#: What the owner says to its reaper when it has cleaned up.
CLEANED = b"cleaned"
_PREFIX = "vswa-"
_LOGS = (".log", ".log.1")
#: How long what is left behind may take to end after SIGTERM; a worker leaves its registry in less.
GRACE_S = 5.0
#: How often is looked whether what was ended has meanwhile started more.
_ROUNDS = 5
#: Endings that were requested, and that of which nobody reads on.
_NO_FAILURE = (KeyboardInterrupt, SystemExit, BrokenPipeError, asyncio.CancelledError)


class Scratch:
    """A temporary folder while it is open.

    :ivar path: of the folder.
    :ivar keep_logs: the logs of child processes in it stay when it is closed; all else goes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keep_logs = False

    def log_folder(self, log_dir: str | None) -> Path:
        """Where logs go: kept where the user asked, else thrown away with this folder."""
        folder = Path(log_dir or self.path)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def has_logs(self) -> bool:
        try:
            return any(each.stat().st_size for each in self.path.iterdir() if each.name.endswith(_LOGS))
        except FileNotFoundError:  # somebody has removed the folder
            return False


@contextmanager
def open_scratch(name: str) -> Iterator[Scratch]:
    """A temporary folder, which goes at the end together with all that was started meanwhile.

    An exception that is a failure keeps the logs in it, and gets a note that says where they are.

    :raises ConfigError: no temporary files can be written where they should go.
    """
    parent = temporary_folder()
    sweep(parent)
    scratch = Scratch(Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{name}-", dir=parent)).resolve())
    before = os.environ.get(SCRATCH_ENV)
    with _owned(scratch.path), _reaper(scratch.path) as has_cleaned:
        os.environ[SCRATCH_ENV] = str(scratch.path)
        try:
            yield scratch
        except BaseException as error:
            scratch.keep_logs |= not (isinstance(error, _NO_FAILURE) or is_to_correct(error))
            if scratch.keep_logs and scratch.has_logs():
                error.add_note(f"logs are kept in {scratch.path}")
            raise
        finally:
            _restore(before)
            clean(scratch.path, keep_logs=scratch.keep_logs)
            has_cleaned()


def _restore(before: str | None) -> None:
    if before is None:
        os.environ.pop(SCRATCH_ENV, None)
    else:
        os.environ[SCRATCH_ENV] = before


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Hold the lock that says that the owner of ``folder`` lives."""
    new = folder / f"{OWNER_FILE}.new"
    with new.open("wb") as lock:
        with contextlib.suppress(OSError):  # a file system without locks: then nobody else may take it either
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Under its name only once it is locked: nobody may think that the owner has gone already.
        new.rename(folder / OWNER_FILE)
        yield


@contextmanager
def _reaper(folder: Path) -> Iterator[Callable[[], None]]:
    """A process that cleans ``folder`` should this one be killed; and what says that this one has done so.

    That nothing is left cannot be seen by the folder: what empties /tmp of old files may have removed it.
    """
    environ = {name: value for name, value in os.environ.items() if name != SCRATCH_ENV}
    # What ends this program must not end its reaper. A process inherits what is blocked, from its first
    # instruction on; the session is for what a terminal sends to all that runs in it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        reaper = subprocess.Popen(
            [sys.executable, "-m", "vswa_plugin.launch.reaper", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environ,
            start_new_session=True,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert reaper.stdin is not None
    pipe = reaper.stdin

    def has_cleaned() -> None:
        with contextlib.suppress(OSError):  # the reaper has ended
            pipe.write(CLEANED)
            pipe.flush()

    try:
        yield has_cleaned
    finally:
        with contextlib.suppress(OSError):
            pipe.close()
        if code := reaper.wait():
            logger.warning(
                "expected a process that cleans up where this one is killed, but it had ended with %d", code
            )


def clean(folder: Path, *, keep_logs: bool = False) -> None:
    """End all that was started on behalf of ``folder``, then remove it, or all of it but the logs."""
    for _ in range(_ROUNDS):
        if not (left := _started_for(folder)):
            break
        end_processes(left)
    if not (keep_logs and Scratch(folder).has_logs()):
        shutil.rmtree(folder, ignore_errors=True)
        return
    for each in folder.iterdir():
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each, ignore_errors=True)
        elif not each.name.endswith(_LOGS):
            each.unlink(missing_ok=True)


def sweep(parent: Path) -> None:
    """Clean the temporary folders in ``parent`` whose owners were killed together with their reapers."""
    for owner in parent.glob(f"{_PREFIX}*/{OWNER_FILE}"):
        # OSError: another user's, gone meanwhile, or a file system without locks.
        with contextlib.suppress(OSError):
            if owner.stat().st_uid != os.geteuid():
                continue
            with owner.open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                clean(owner.parent.resolve())


def _started_for(folder: Path) -> list[psutil.Process]:
    """What runs and was started on behalf of ``folder``: also what has overwritten its environment since, as
    processes that set their title do, if it was started by one that has not.
    """
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has ended, or is another user's
            if process.environ().get(SCRATCH_ENV) == str(folder):
                found |= {process, *process.children(recursive=True)}
    return [process for process in found if process.pid != os.getpid()]


def end_group(leader: int) -> None:
    """End what is left of the process group of a leader that has just ended."""
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) == leader:
                left.append(process)
    end_processes(left)


def end_processes(processes: Collection[psutil.Process], grace_s: float = GRACE_S) -> None:
    """SIGTERM, and SIGKILL for what has not ended after ``grace_s``; returns when all have ended.

    Those that were started last end first, as workers need the brokers to leave; what they have started
    themselves is theirs to end. psutil never mistakes a process for another one with the same id.
    """
    deadline = time.monotonic() + grace_s
    ids = {process.pid for process in processes}
    roots = {}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
            if process.ppid() not in ids:
                roots[process] = process.create_time()
    for process in sorted(roots, key=roots.__getitem__, reverse=True):
        _signal((process,), signal.SIGTERM)
        wait_for_ends((process,), deadline)
    left = wait_for_ends(processes, 0)
    _signal(left, signal.SIGTERM)
    left = wait_for_ends(left, deadline)
    _signal(left, signal.SIGKILL)
    wait_for_ends(left, time.monotonic() + grace_s)


def wait_for_ends(processes: Collection[psutil.Process], deadline: float) -> list[psutil.Process]:
    """Which of ``processes`` have not ended when it is ``deadline``.

    psutil alone would also wait until they are collected, for which init may take seconds.
    """
    if not hasattr(os, "pidfd_open"):  # not Linux
        return psutil.wait_procs(processes, max(0.0, deadline - time.monotonic()))[1]
    with contextlib.ExitStack() as stack:
        poll, waiting = select.poll(), {}
        for process in processes:
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                descriptor = os.pidfd_open(process.pid)
                stack.callback(os.close, descriptor)
                if process.is_running():  # still the same
                    poll.register(descriptor, select.POLLIN)
                    waiting[descriptor] = process
        while waiting:
            ended = poll.poll(1000 * max(0.0, deadline - time.monotonic()))
            for descriptor, _ in ended:
                poll.unregister(descriptor)
                del waiting[descriptor]
            if not ended:
                break
        return list(waiting.values())


def _signal(processes: Collection[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it has ended
            process.send_signal(number)
