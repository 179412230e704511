"""What all of our programs share: one log format, and one way from an error to a line and an exit code."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable

from vswa_plugin.errors import ConfigError, InvariantError, VswaError

logger = logging.getLogger(__name__)

LEVELS = ("debug", "info", "warning", "error")
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
        super().__init__(2)
        self.message = message


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
    """Run ``body``: its exit code, 2 for what the user can correct, 1 for what failed, 130 for Ctrl-C.

    A bug of ours keeps its traceback, which is what a report needs. Why it ends is recorded in either case,
    see :func:`record_end`.
    """
    try:
        return body()
    except CommandLineRefused as refused:
        record_end(refused.message)
        raise
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if isinstance(error, InvariantError) or not isinstance(error, VswaError):
            record_end("".join(traceback.format_exception_only(error)).strip())
            raise
        code = 2 if isinstance(error, ConfigError) else 1
        sys.stderr.write(f"{name}: {'error' if code == 2 else 'failed'}: {error}\n")
        record_end(str(error))
        return code
