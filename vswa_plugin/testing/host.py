"""A plugin host for tests. A plugin that fails costs only its own answer, so a test would pass all the same:
this host looks at the failures when the test ends.

    with plugin_host(my_plugin) as host:
        host.request_finished(record)
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

from vswa_plugin.engine.options import Section
from vswa_plugin.errors import ConfigError
from vswa_plugin.hookspecs import hookimpl
from vswa_plugin.host.host import PluginHost

__all__ = [
    "PluginHost",
    "plugin",
    "plugin_host",
]

#: What ``plugin_host(**hooks)`` is registered as.
FUNCTIONS = "functions"


def plugin(**hooks: Callable[..., Any]) -> object:
    """An object that implements each given hook: ``plugin(vswa_metrics=lambda: "")``."""
    return SimpleNamespace(**{name: hookimpl(function, specname=name) for name, function in hooks.items()})


@contextmanager
def plugin_host(
    *plugins: object,
    options: Mapping[str, Mapping[str, object]] = {},
    expect_failures: Collection[str] | None = (),
    clock: Callable[[], float] = time.monotonic,
    **hooks: Callable[..., Any],
) -> Iterator[PluginHost]:
    """A host with these plugins and no others, closed at the end.

    :param plugins: modules, objects, or what ``--plugin`` takes: a path to a ``.py`` file or a dotted name.
        A module is registered under the last part of its name, an object as ``plugin1``, ``plugin2``, ...
    :param options: options by plugin name, then by option. As in a program, ``vswa_options`` is called before
        any other hook, of each plugin that implements it, also where it has no options here.
    :param expect_failures: the hooks in which calls must have failed by the end, and no others may have;
        None: failures are not looked at.
    :param clock: monotonic seconds, for the host's own limits.
    :param hooks: functions by the name of their hook: one more plugin, named ``functions``.
    :raises PluginError: a plugin breaks the contract of a hook.
    :raises ConfigError: a plugin refuses its options, or takes none.
    :raises AssertionError: at the end: other calls failed than were expected to.
    """
    with PluginHost(clock=clock) as host:
        for number, each in enumerate(plugins, 1):
            _load(host, each, number)
        if hooks:
            host.register(plugin(**hooks), FUNCTIONS)
        _give_options(host, options)
        yield host
        if expect_failures is not None:
            _check(host, frozenset(expect_failures))


def _load(host: PluginHost, each: object, number: int) -> None:
    if isinstance(each, str | os.PathLike):
        host.load_local(os.fspath(each))
    elif isinstance(each, ModuleType):
        host.register(each, each.__name__.rpartition(".")[2])
    else:
        host.register(each, f"plugin{number}")


def _give_options(host: PluginHost, options: Mapping[str, Mapping[str, object]]) -> None:
    takers = host.option_variables()
    if unknown := sorted(options.keys() - takers.keys()):
        raise ConfigError(
            f"options of {', '.join(unknown)}: expected names of plugins here that implement vswa_options, "
            f"which are {', '.join(sorted(takers)) or 'none'}"
        )
    host.options({name: Section(own, "options of plugin_host", name) for name, own in options.items()})


def _check(host: PluginHost, expected: frozenset[str]) -> None:
    failures = host.failures()
    unasked = [
        f"plugin {name!r} failed in {hook} ({count} calls)"
        for (name, hook), count in sorted(failures.items())
        if hook not in expected
    ]
    missing = sorted(expected - {hook for _, hook in failures})
    if unasked:
        raise AssertionError(
            f"expected no plugin to fail, got: {'; '.join(unasked)}. The log has the traceback; a test that "
            "means a hook to fail names it in expect_failures"
        )
    if missing:
        raise AssertionError(f"expected calls to fail in {', '.join(missing)}, but all of them succeeded")
