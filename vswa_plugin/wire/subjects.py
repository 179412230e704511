"""The subjects of events and of requests to a rank, and the names that they consist of. Pure."""

from __future__ import annotations

import re

from vswa_plugin.errors import ConfigError, shown
from vswa_plugin.wire.events import VERSION, Source

_ROOT = f"vswa.v{VERSION}"
_NAME = re.compile(r"[A-Za-z0-9_-]+")


def check_name(what: str, name: str) -> str:
    """``name``, fit to be one token of a subject and one segment of a registry key.

    :raises ConfigError: dots, wildcards, spaces and the like would change what a subject means.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{what}: expected letters, digits, '-' and '_' only, got {shown(name)}")
    return name


def subject(source: Source, channel: str) -> str:
    """The subject of one rank's ``events`` or ``control``."""
    namespace = check_name("namespace", source.namespace)
    component = check_name("component", source.component)
    return f"{_ROOT}.{namespace}.{component}.{source.worker_id:x}.{source.dp_rank}.{channel}"


def events_of(namespace: str | None = None, component: str | None = None) -> str:
    """Subject wildcard for the events of all ranks, of one namespace or component where given."""
    tokens = [check_name("namespace", namespace) if namespace else "*"]
    tokens.append(check_name("component", component) if component else "*")
    return ".".join((_ROOT, *tokens, "*", "*", "events"))


def source_of(event_subject: str) -> Source:
    """The rank that publishes on ``event_subject``.

    :raises ConfigError: it is not one of ours, or not as :func:`subject` writes it: a rank has one subject.
    """
    try:
        *_, namespace, component, worker_id, dp_rank, channel = event_subject.split(".")
        source = Source(namespace, component, int(worker_id, 16), int(dp_rank))
        numbers_fit = 0 <= source.worker_id < 1 << 64 and source.dp_rank >= 0
        if numbers_fit and subject(source, channel) == event_subject:
            return source
    except ValueError:  # a ConfigError is one
        pass
    raise ConfigError(
        f"expected a subject {_ROOT}.<namespace>.<component>.<worker, hexadecimal>.<rank>.events, "
        f"got {event_subject[:200]!r}"
    )
