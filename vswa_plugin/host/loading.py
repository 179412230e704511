"""Which plugins a program loads: its command line and environment, turned into a host."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Iterable, Mapping

from vswa_plugin.errors import ConfigError, unknown_choice
from vswa_plugin.host import sources as plugin_sources
from vswa_plugin.host.host import PluginHost


def add_plugin_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--plugin`` and ``--no-plugin``, which :func:`load_host` takes."""
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE_OR_MODULE",
        help="also load this plugin: a .py file or a dotted module name; may be repeated",
    )
    parser.add_argument(
        "--no-plugin",
        action="append",
        default=[],
        metavar="NAME",
        help="switch a plugin off; may be repeated (also: VSWA_PLUGINS_DISABLED=a,b)",
    )


def load_host(
    plugin: Iterable[str] = (), no_plugin: Iterable[str] = (), environ: Mapping[str, str] | None = None
) -> PluginHost:
    """The host with all plugins of this machine, as command line and environment want it.

    ``VSWA_PLUGINS=a,b`` loads only those of the installed ones (empty: none); ``VSWA_PLUGINS_DISABLED=a,b``
    leaves those out; ``VSWA_TRACE_PLUGINS=1`` logs each call.

    :param plugin: values of ``--plugin``.
    :param no_plugin: values of ``--no-plugin``.
    :param environ: ``os.environ`` unless given.
    :raises ConfigError: an unknown name, with the known ones; or a ``--plugin`` that cannot be loaded.
    """
    env = os.environ if environ is None else environ
    local = list(plugin)
    installed = {entry.name for entry in plugin_sources.installed()}
    known = installed | {plugin_sources.local_name(where) for where in local}
    disabled = [
        *_known(no_plugin, known, "--no-plugin"),
        *_known(_names(env.get("VSWA_PLUGINS_DISABLED")), known, "VSWA_PLUGINS_DISABLED"),
    ]
    only = env.get("VSWA_PLUGINS")
    chosen = None if only is None else _known(_names(only), installed, "VSWA_PLUGINS")
    host = PluginHost(disabled=disabled, trace=tracing(env))
    host.load_entry_points(only=chosen)
    for where in local:
        host.load_local(where)
    return host


def tracing(environ: Mapping[str, str]) -> bool:
    """Whether ``VSWA_TRACE_PLUGINS`` asks for a log line per call of a plugin, on level INFO."""
    return environ.get("VSWA_TRACE_PLUGINS", "0") not in ("", "0")


def _names(value: str | None) -> list[str]:
    return [name.strip() for name in (value or "").split(",") if name.strip()]


def _known(names: Iterable[str], known: Collection[str], where: str) -> list[str]:
    given = list(names)
    for name in given:
        if name not in known:
            raise ConfigError(f"{where}: {unknown_choice('plugin', name, known)}")
    return given
