"""What all of our programs share: one log format, and one way from an error to a line and an exit code.

:data:`EXIT_CODES` is the convention; docs/cli.md has it for users.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import select
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import NoReturn

from vswa_plugin.errors import ConfigError, InvariantError, VswaError

logger = logging.getLogger(__name__)

LEVELS = ("debug", "info", "warning", "error")

DONE, FAILED, USER_ERROR, INTERRUPTED, NO_READER = 0, 1, 2, 130, 141
#: Exit code -> when a program or command of ours ends with it.
EXIT_CODES: Mapping[int, str] = {
    DONE: "done, or stopped by a signal as asked",
    FAILED: "something failed: a broker is away, a process died, a request or a check failed",
    USER_ERROR: "something to correct: an option, a setting, a file, a port in use",
    INTERRUPTED: "Ctrl-C, where no program of ours handles it",
    NO_READER: "the reader of the output has gone, as `head` does when it has its lines",
}
#: The system's reasons that a user can correct: a path, a permission, a full disk, an address.
_USER_ERRNOS = frozenset(
    {
        errno.EACCES,
        errno.EADDRINUSE,
        errno.EADDRNOTAVAIL,
        errno.EEXIST,
        errno.EISDIR,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOSPC,
        errno.ENOTDIR,
        errno.ENOTEMPTY,
        errno.EPERM,
        errno.EROFS,
    }
)
#: Set to 1, it adds the traceback to the line of each error; the log level debug does the same.
TRACEBACK_ENV = "VSWA_TRACEBACK"
#: Names a file for the reason why a program ends, as terminationMessagePath does in Kubernetes, where this
#: may be /dev/termination-log: whoever runs the program need not search its log.
TERMINATION_ENV = "VSWA_TERMINATION_LOG"
#: No more is written there; Kubernetes reads no more.
MESSAGE_BYTES = 4096


class CommandLineRefused(SystemExit):
    """argparse has refused the command line and has printed why; exit code 2.

    :ivar message: what it printed, without the program's name and usage.
    """

    def __init__(self, message: str) -> None:
        super().__init__(USER_ERROR)
        self.message = message


class Parser(argparse.ArgumentParser):
    """An argparse parser whose refusals :func:`run_program` can record."""

    def error(self, message: str) -> NoReturn:
        try:
            super().error(message)
        except SystemExit as refused:
            raise CommandLineRefused(message) from refused


def exit_codes_help() -> str:
    """:data:`EXIT_CODES` for the end of a ``--help``."""
    return "exit codes:\n" + "".join(f"  {code:<4} {when}\n" for code, when in EXIT_CODES.items())


def record_end(reason: str) -> None:
    """Write why this program ends to the file that VSWA_TERMINATION_LOG names, if it names one. Never raises.

    The file is written in place: in a container it is mounted there.
    """
    path = os.environ.get(TERMINATION_ENV)
    if not path:
        return
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(reason.encode("utf-8", "replace")[:MESSAGE_BYTES].decode("utf-8", "ignore"))
    except OSError as error:
        logger.warning("%s: expected a file that can be written, got %s: %s", TERMINATION_ENV, path, error)


def set_up_logging(level: str) -> None:
    """Log ``level`` (one of :data:`LEVELS`) and above to standard error."""
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname).1s %(name)s: %(message)s", force=True
    )
    # nats-py reports each reconnect attempt there; transport.py says it once.
    logging.getLogger("nats").setLevel(logging.CRITICAL)


def run_program(name: str, body: Callable[[], int]) -> int:
    """Run ``body`` and return its exit code, or that of :data:`EXIT_CODES` for what it raises.

    An error that was foreseen is one line, with its traceback where :data:`TRACEBACK_ENV` or the log level
    asks for it. A bug of ours keeps its traceback, which is what a report needs, and Python ends with 1. Why
    the program ends is recorded in either case, see :func:`record_end`.
    """
    try:
        return _flushed(body)
    except CommandLineRefused as refused:
        record_end(refused.message)
        raise
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            # Python flushes stdout once more at exit and would complain there.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return NO_READER
        if isinstance(error, InvariantError) or not isinstance(error, VswaError | OSError):
            record_end("".join(traceback.format_exception_only(error)).strip())
            raise
        return _say(name, error)


def _flushed(body: Callable[[], int]) -> int:
    """A reader that has gone shall be noticed here, not as the interpreter ends."""
    try:
        code = body()
    except SystemExit:  # as after --help, of which argparse ignores that it cannot be written
        sys.stdout.flush()
        if _reader_has_gone():
            raise BrokenPipeError from None
        raise
    sys.stdout.flush()
    return code


def _say(name: str, error: Exception) -> int:
    """One line for ``error``, and its exit code."""
    message = str(error) or type(error).__name__
    user = isinstance(error, ConfigError)
    if isinstance(error, OSError) and not isinstance(error, VswaError):
        user = error.errno in _USER_ERRNOS
        if user and error.filename is not None:
            message = f"cannot use {error.filename}: {error.strerror}; check the path and its permissions"
    if _traceback_wanted():
        traceback.print_exception(error)
    sys.stderr.write(f"{name}: {'error' if user else 'failed'}: {message}\n")
    record_end(message)
    return USER_ERROR if user else FAILED


def _traceback_wanted() -> bool:
    asked = os.environ.get(TRACEBACK_ENV, "0") not in ("", "0")
    return asked or logging.getLogger().isEnabledFor(logging.DEBUG)


def _reader_has_gone() -> bool:
    """Whether nobody reads our standard output any more; a socket of ours may have broken instead."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # it is no file
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))
