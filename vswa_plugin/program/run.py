"""What all of our programs share: one log format, and one way from an error to a line and an exit code.

:data:`EXIT_CODES` is the convention; docs/cli.md has it for users.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import logging
import os
import re
import select
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from vswa_plugin.errors import ConfigError, InvariantError, VswaError, one_line, plain

logger = logging.getLogger(__name__)

LEVELS = ("debug", "info", "warning", "error")

DONE, FAILED, USER_ERROR, HUNG_UP, INTERRUPTED, NO_READER, TERMINATED = 0, 1, 2, 129, 130, 141, 143
#: Exit code -> when a program or command of ours ends with it.
EXIT_CODES: Mapping[int, str] = {
    DONE: "the command has finished, or a signal stopped it as intended",
    FAILED: "something failed: a broker cannot be reached, a process died, a request or a check failed",
    USER_ERROR: "the user has something to correct: an option, a setting, a file, a port in use",
    HUNG_UP: "the terminal was closed (SIGHUP) before the command had finished",
    INTERRUPTED: "Ctrl-C, where no program of ours handles it",
    NO_READER: "the reader of the output has ended, as `head` does when it has its lines",
    TERMINATED: "SIGTERM came before the command had finished",
}
#: The system's reasons that a user can correct: a path, a permission, a full disk, an address.
_USER_ERRNOS = frozenset(
    {
        errno.EACCES,
        errno.EADDRINUSE,
        errno.EADDRNOTAVAIL,
        errno.EDQUOT,
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
#: Those of them that mean that a disk, or a user's share of it, is full.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
#: Set to 1, it adds the traceback to the line of each error; the log level debug does the same.
TRACEBACK_ENV = "VSWA_TRACEBACK"
#: Names a file for the reason why a program ends, as terminationMessagePath does in Kubernetes, where this
#: may be /dev/termination-log: whoever runs the program need not search its log.
TERMINATION_ENV = "VSWA_TERMINATION_LOG"
#: No more is written there; Kubernetes reads no more.
MESSAGE_BYTES = 4096
#: Up to Python 3.12, argparse takes the value out of it and leaves an empty list.
_DASHES_AS_VALUE = re.compile(r"-[^=]*=--")


class CommandLineRefused(SystemExit):
    """The command line was refused, and the reason has been printed; exit code 2.

    :ivar message: the reason.
    """

    def __init__(self, message: str) -> None:
        super().__init__(USER_ERROR)
        self.message = message


class Parser(argparse.ArgumentParser):
    """An argparse parser whose refusals are one line, which :func:`run_program` can record."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        for word in itertools.takewhile(lambda word: word != "--", words):
            if _DASHES_AS_VALUE.fullmatch(word):
                self.error(f"argument {word.partition('=')[0]}: expected a value, got '--'")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        line = one_line(message)
        sys.stderr.write(f"{self.prog}: error: {line}; `{self.prog} --help` lists the options\n")
        raise CommandLineRefused(line)


def exit_codes_help() -> str:
    """:data:`EXIT_CODES` for the end of a ``--help``."""
    return "exit codes:\n" + "".join(f"  {code:<4} {when}\n" for code, when in EXIT_CODES.items())


def exit_code_of(number: signal.Signals) -> int:
    """The exit code of a command that the signal ``number`` has kept from its work, as shells have it."""
    return 128 + number


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


class PlainFormatter(logging.Formatter):
    """What others say, such as the names in a message of the event stream, must not steer a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


def set_up_logging(level: str) -> None:
    """Log ``level`` (one of :data:`LEVELS`) and above to standard error; see logs.py."""
    from vswa_plugin.program.logs import formatter  # not for commands that end before they log

    handler = logging.StreamHandler()
    handler.setFormatter(formatter(os.environ))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # nats-py reports each reconnect attempt there; transport.py says it once.
    logging.getLogger("nats").setLevel(logging.CRITICAL)


def log_plainly(line: str, *, force: bool = False) -> None:
    """Write log records to standard error, in this format; ``force``: in place of what there is."""
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter(line))
    logging.basicConfig(handlers=[handler], force=force)


def run_program(name: str, body: Callable[[], int]) -> int:
    """Run ``body`` and return its exit code, or that of :data:`EXIT_CODES` for what it raises.

    An error that was foreseen is one line, with its traceback where :data:`TRACEBACK_ENV` or the log level
    asks for it. A bug of ours keeps its traceback, which is what a report needs, and Python ends with 1. Why
    the program ends is recorded in either case, see :func:`record_end`.
    """
    _open_standard_streams()
    try:
        return _flushed(body)
    except CommandLineRefused as refused:
        record_end(refused.message)
        raise
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            return NO_READER
        if isinstance(error, InvariantError) or not isinstance(error, VswaError | OSError):
            record_end("".join(traceback.format_exception_only(error)).strip())
            raise
        return _say(name, error)
    finally:
        _drop_what_cannot_be_written()


def _open_standard_streams() -> None:
    """Where one was closed as we were started (``>&-``), what we write there goes nowhere, as Python has it.

    Else the next file or socket that is opened would get its number, and what children write there.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        null = os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        os.set_inheritable(null, null == number)
        setattr(sys, name, open(null, "w" if number else "r"))  # noqa: SIM115 (as long as the process)


def _drop_what_cannot_be_written() -> None:
    """Python flushes both streams once more at its exit, and would complain there."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):  # it is no file
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


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


def is_to_correct(error: BaseException) -> bool:
    """Whether ``error`` is something that the user can correct: exit code 2."""
    if isinstance(error, OSError) and not isinstance(error, VswaError):
        return error.errno in _USER_ERRNOS
    return isinstance(error, ConfigError)


def _say(name: str, error: Exception) -> int:
    """One line for ``error``, and its exit code."""
    message = str(error) or type(error).__name__
    user = is_to_correct(error)
    if user and isinstance(error, OSError) and error.filename is not None:
        step = "free some space there" if error.errno in FULL else "check the path and its permissions"
        message = f"cannot use {error.filename}: {error.strerror}; {step}"
    if user:
        message = one_line(message)
    message = plain(message)
    if _traceback_wanted():
        traceback.print_exception(error)
    message = "; ".join((message, *getattr(error, "__notes__", ())))
    record_end(message)
    with contextlib.suppress(OSError):  # nobody reads it, or the disk is full
        sys.stderr.write(f"{name}: {'error' if user else 'failed'}: {message}\n")
    return USER_ERROR if user else FAILED


def _traceback_wanted() -> bool:
    asked = os.environ.get(TRACEBACK_ENV, "0") not in ("", "0")
    return asked or logging.getLogger().isEnabledFor(logging.DEBUG)


def _reader_has_gone() -> bool:
    """Whether nobody reads our output any more; a socket of ours may have broken instead."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # it is no file
            poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
