"""What all of our programs share: one log format, and one way from an error to a line and an exit code."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from vswa_plugin.errors import ConfigError, InvariantError, VswaError

LEVELS = ("debug", "info", "warning", "error")


def set_up_logging(level: str) -> None:
    """Log ``level`` (one of :data:`LEVELS`) and above to standard error."""
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname).1s %(name)s: %(message)s", force=True
    )
    # nats-py reports each reconnect attempt there; transport.py says it once.
    logging.getLogger("nats").setLevel(logging.CRITICAL)


def run_program(name: str, body: Callable[[], int]) -> int:
    """Run ``body``: its exit code, 2 for what the user can correct, 1 for what failed, 130 for Ctrl-C.

    A bug of ours keeps its traceback, which is what a report needs.
    """
    try:
        return body()
    except InvariantError:
        raise
    except VswaError as error:
        code = 2 if isinstance(error, ConfigError) else 1
        sys.stderr.write(f"{name}: {'error' if code == 2 else 'failed'}: {error}\n")
        return code
    except KeyboardInterrupt:
        return 130
