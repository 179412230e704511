"""Which plugins a program loads: its command line and environment, turned into a host."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Iterable, Mapping

from vswa_plugin.errors import ConfigError, unknown_choice
from vswa_plugin.host import plugin_options
from vswa_plugin.host import sources as plugin_sources
from vswa_plugin.host.host import PluginHost


def add_plugin_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--plugin``, ``--no-plugin`` and ``--plugin-options``, which :func:`load_host` takes."""
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
    parser.add_argument(
        plugin_options.FILE_OPTION,
        metavar="FILE",
        help="options of plugins: YAML or JSON, plugin name -> options "
        f"(default: {plugin_options.FILE_ENV}; also: {plugin_options.PREFIX}<NAME>_<KEY>=value)",
    )


def load_host(
    plugin: Iterable[str] = (),
    no_plugin: Iterable[str] = (),
    environ: Mapping[str, str] | None = None,
    options: str | None = None,
) -> PluginHost:
    """The host with all plugins of this machine, as command line and environment want it.

    ``VSWA_PLUGINS=a,b`` loads only those of the installed ones (empty: none); ``VSWA_PLUGINS_DISABLED=a,b``
    leaves those out; ``VSWA_TRACE_PLUGINS=1`` logs each call. Each plugin has been given its options.

    :param plugin: values of ``--plugin``.
    :param no_plugin: values of ``--no-plugin``.
    :param environ: ``os.environ`` unless given.
    :param options: value of ``--plugin-options``.
    :raises ConfigError: an unknown name, with the known ones; a ``--plugin`` that cannot be loaded; or
        options that cannot be used.
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
    try:
        host.load_entry_points(only=chosen)
        for where in local:
            host.load_local(where)
        _give_options(host, options, env)
    except BaseException:
        host.close()
        raise
    return host


def _give_options(host: PluginHost, file: str | None, environ: Mapping[str, str]) -> None:
    variables = host.option_variables()
    refusals = {}
    for status in host.plugins():
        if status.state == "loaded":
            takes = status.name in variables
            refusals[status.name] = "" if takes else f"plugin {status.name!r} takes no options"
        else:
            # Of two plugins of one name, one may be loaded.
            refusals.setdefault(status.name, f"plugin {status.name!r} is {status.state}: {status.reason}")
    given = plugin_options.given_options(file, environ, refusals, variables)
    host.options(plugin_options.sections(given, refusals))


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
