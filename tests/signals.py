"""Programs that tests start as a terminal would, whatever started the tests."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def as_from_a_terminal() -> Iterator[None]:
    """Nohup and the background of a script have these ignored, and whatever they start inherits that."""
    signals = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
    before = [(each, signal.signal(each, signal.SIG_DFL)) for each in signals]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
