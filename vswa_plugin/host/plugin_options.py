"""Options of plugins: where they are read, whose they are, and what is said of those that nobody takes.

Of one key the last of these that has it counts:

1. the file of ``--plugin-options``, or where that is not given, of ``VSWA_PLUGIN_OPTIONS``: YAML or JSON, a
   mapping from plugin names to mappings;
2. a variable of the plugin's own (``option_variables``), as text;
3. ``VSWA_PLUGIN_<NAME>_<KEY>``: JSON where it is JSON, else text.

An empty variable counts as not set. What nobody takes is an error where the command line named it, and a
warning where it comes from the environment, which all programs of a deployment may share.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from vswa_plugin.engine.option_files import json_or_text, read_options
from vswa_plugin.engine.options import Section
from vswa_plugin.errors import ConfigError, shown, unknown_choice

logger = logging.getLogger(__name__)

FILE_OPTION = "--plugin-options"
FILE_ENV = "VSWA_PLUGIN_OPTIONS"
PREFIX = "VSWA_PLUGIN_"
_HOLDS = "a mapping from plugin names to their options"


@dataclass(frozen=True)
class Given:
    """Options of one plugin from one place.

    :param source: that place, for messages: a file or a variable.
    :param strict: whether it is an error that nobody takes them.
    """

    plugin: str
    values: Mapping[str, object]
    source: str
    strict: bool = False


def given_options(
    file: str | None, environ: Mapping[str, str], names: Collection[str], own: Mapping[str, Mapping[str, str]]
) -> list[Given]:
    """All options that were given, those that count more behind the others.

    :param file: value of ``--plugin-options``.
    :param names: of all plugins that there are.
    :param own: plugin -> its own variables, each with the key that it stands for.
    :raises ConfigError: the file cannot be read, or is no mapping of mappings.
    """
    return [
        *_of_file(file, environ),
        *(
            Given(plugin, {key: environ[variable]}, variable)
            for plugin, variables in own.items()
            for variable, key in variables.items()
            if environ.get(variable)
        ),
        *_of_variables(environ, names),
    ]


def sections(given: Collection[Given], refusals: Mapping[str, str]) -> dict[str, Section]:
    """Plugin -> its options.

    :param refusals: plugin -> why it takes no options; empty for one that does.
    :raises ConfigError: options that nobody takes, where the command line named them.
    """
    values: dict[str, dict[str, object]] = {}
    sources: dict[str, list[str]] = {}
    for each in given:
        reason = refusals.get(each.plugin)
        if reason is None:
            reason = unknown_choice("plugin", each.plugin, refusals)
        if not reason:
            values.setdefault(each.plugin, {}).update(each.values)
            sources.setdefault(each.plugin, []).append(each.source)
        elif each.strict:
            raise ConfigError(f"{FILE_OPTION} {each.source}: {reason}; remove these options")
        else:
            logger.warning("%s has no effect: %s", each.source, reason)
    return {
        plugin: Section({plugin: own}, " and ".join(sources[plugin])).section(plugin)
        for plugin, own in values.items()
    }


def _of_file(file: str | None, environ: Mapping[str, str]) -> Iterator[Given]:
    path = environ.get(FILE_ENV) or None if file is None else file
    if path is None:
        return
    where = FILE_ENV if file is None else FILE_OPTION
    for plugin, options in read_options(path, where, _HOLDS).items():
        section = Section(options, path, plugin)
        if wrong := [key for key in section.data if not isinstance(key, str)]:
            raise ConfigError(f"{plugin}: expected names of options, got {shown(wrong[0])} (in {path})")
        yield Given(plugin, section.data, path, strict=file is not None)


def _of_variables(environ: Mapping[str, str], names: Collection[str]) -> Iterator[Given]:
    by_prefix = {f"{PREFIX}{re.sub(r'[^A-Za-z0-9]', '_', name).upper()}_": name for name in names}
    for variable in sorted(environ):
        if not variable.startswith(PREFIX) or variable == FILE_ENV or not environ[variable]:
            continue
        # A plugin's name may begin with another's.
        prefix = max((each for each in by_prefix if variable.startswith(each)), key=len, default=None)
        if prefix is None or variable == prefix:
            plugin, key = variable.removeprefix(PREFIX).lower(), ""
        else:
            plugin, key = by_prefix[prefix], variable.removeprefix(prefix).lower()
        try:
            value = json_or_text(environ[variable])
        except ConfigError as error:
            raise ConfigError(f"{variable}: {error}") from None
        yield Given(plugin, {key: value}, variable)
