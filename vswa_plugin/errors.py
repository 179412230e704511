"""Errors of vswa-plugin.

    VswaError
    ├── ConfigError            the user can fix it: says what was expected, what came, where, what to do
    │   └── PluginError        a plugin that cannot be loaded or used
    ├── ConnectError           a broker or registry that cannot be reached
    ├── RequestError           one request that is not served
    │   ├── InvalidRequest     the request can never be served as it is (the frontend answers 400)
    │   ├── Overloaded         it could be served later (503)
    │   └── Unavailable        this worker cannot serve it, another one can (the frontend migrates it)
    ├── PluginFailed           something of a plugin failed, which costs that plugin's part alone
    ├── StreamError            an event stream that is broken and will be repaired
    │   └── ProtocolError      bytes that are not a message of this protocol version
    └── InvariantError         a bug of this project: please report it

``except VswaError`` catches whatever this project raises on purpose.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "ConfigError",
    "ConnectError",
    "InvalidRequest",
    "InvariantError",
    "Overloaded",
    "PluginError",
    "PluginFailed",
    "ProtocolError",
    "RequestError",
    "StreamError",
    "Unavailable",
    "VswaError",
    "shown",
    "unknown_choice",
]

#: Of a message that a person reads, and of one value in it.
MAX_LINE, MAX_SHOWN = 1_000, 200


class VswaError(Exception):
    """Base of all errors that this project raises on purpose."""


class ConfigError(VswaError, ValueError):
    """A setting, file or model directory that the user can correct."""


class PluginError(ConfigError):
    """A plugin that cannot be loaded, or that breaks its contract."""


class ConnectError(VswaError, ConnectionError):
    """NATS, etcd or another peer cannot be reached; the message names the address and the setting."""


class RequestError(VswaError):
    """One request that is not served; the engine and other requests go on."""


class InvalidRequest(RequestError, ValueError):
    """The request can never be served as it is, e.g. a prompt longer than the context."""


class Overloaded(RequestError):
    """The request could be served later: the queue is full."""


class Unavailable(RequestError):
    """This worker stops or its engine has failed; another worker can serve the request."""


class StreamError(VswaError):
    """An event stream is broken; the view goes stale and is repaired."""


class ProtocolError(StreamError):
    """Bytes that are not a message of this protocol version."""


class PluginFailed(VswaError):
    """Something of a plugin failed: counted and named by the host; it costs that plugin's part alone."""


class InvariantError(VswaError, AssertionError):
    """A bug of this project."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{message} (this is a bug of vswa-plugin: please report it with this message)")


def unknown_choice(what: str, given: str, known: Iterable[str]) -> str:
    """Say that ``given`` is no known ``what``, list the known ones, and guess the one that was meant.

    >>> unknown_choice("mode", "aggg", ["agg", "prefill"])
    "unknown mode 'aggg': did you mean 'agg'? Known: agg, prefill"
    """
    names = sorted(known)
    near = get_close_matches(given[:MAX_SHOWN], names, n=1)
    hint = f": did you mean {near[0]!r}?" if near else "."
    return f"unknown {what} {shown(given)}{hint} Known: {', '.join(names) or 'none'}"


class _Shown(reprlib.Repr):
    """Looks at the first few values of each level only, however many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxother = 3, MAX_SHOWN
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 8
        self.maxstring = self.maxlong = MAX_SHOWN


def shown(value: object) -> str:
    """``repr(value)`` for a message, shortened where it is long: a value may be a whole file.

    >>> shown([512, 8192])
    '[512, 8192]'
    >>> len(shown("x" * 1_000_000))
    200
    """
    try:
        return _shortened(_Shown().repr(value), MAX_SHOWN)
    except Exception:  # a whole number of thousands of digits, or an object whose repr fails
        return f"a value of type {type(value).__name__}"


def one_line(text: str) -> str:
    """``text`` on one line of at most :data:`MAX_LINE` characters, which keeps its begin and its end."""
    return _shortened(plain(" ".join(text.split())), MAX_LINE)


def plain(text: str) -> str:
    """``text`` for a terminal or a log: what would steer a terminal is written out. Line ends and tabs stay.

    >>> plain("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in "\n\t" else each.encode("unicode_escape").decode()
        for each in text
    )


def _shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    tail = most // 3
    return f"{text[: most - tail - 5]} ... {text[-tail:]}"
