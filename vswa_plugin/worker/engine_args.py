"""Engine options from a file and the command line, in TensorRT-LLM's format; engines check the keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from vswa_plugin.engine.option_files import json_options, read_options
from vswa_plugin.errors import ConfigError, unknown_choice

CONFIG_OPTION = "--engine-config"
#: The folder engine_configs of the source tree, as it is installed.
_CONFIGS = "vswa_engine_configs"
FILE_OPTION, OVERRIDE_OPTION = "--extra-engine-args", "--override-engine-args"
_EXAMPLE = '{"kv_cache_config": {"tokens_per_block": 32}}'


def load_engine_args(
    file: str | None, override: str | None, base: Mapping[str, Any] = {}, sources: Sequence[str] = ()
) -> tuple[dict[str, Any], str]:
    """Options of ``--extra-engine-args`` with those of ``--override-engine-args`` laid over them.

    :param file: path of a YAML mapping, or of a JSON object where it ends in ``.json``; None: no file.
    :param override: a JSON object, merged key by key, or None.
    :param base: options under those of the file; ``sources``: where they came from.
    :returns: the options, and where they came from for messages.
    :raises ConfigError: names the file, line, key or option that is wrong.
    """
    options = dict(base) if file is None else merged(dict(base), read_options(file, FILE_OPTION))
    places = [*sources, *([] if file is None else [file])]
    if override is not None:
        options = merged(options, json_options(override, OVERRIDE_OPTION, _EXAMPLE))
        places.append(OVERRIDE_OPTION)
    return options, " and ".join(places) or f"no {FILE_OPTION}"


def shipped_configs() -> dict[str, Path]:
    """The engine configurations that this package has, by name, such as ``gemma3/vswa_agg``."""
    folder = Path(str(files(_CONFIGS)))
    found = sorted(folder.glob("*/*.yaml"))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in found}


def shipped_config(name: str) -> dict[str, Any]:
    """The options of one of them; raises ConfigError where there is none of that name."""
    configs = shipped_configs()
    if name not in configs:
        raise ConfigError(
            f"{CONFIG_OPTION}: {unknown_choice('configuration', name, configs)}; "
            f"a file of your own is for {FILE_OPTION}"
        )
    return read_options(str(configs[name]), CONFIG_OPTION)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``over`` laid over it, section by section."""
    both = dict(base)
    for key, value in over.items():
        before = both.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            value = merged(before, value)
        both[key] = value
    return both
