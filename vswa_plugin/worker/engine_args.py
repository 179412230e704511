"""Engine options from a YAML file and the command line, in TensorRT-LLM's format; engines check the keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from vswa_plugin.errors import ConfigError


def load_engine_args(file: str | None, override: str | None) -> tuple[dict[str, Any], str]:
    """Options of ``--extra-engine-args`` with those of ``--override-engine-args`` laid over them.

    :param file: path of a YAML mapping, or None.
    :param override: a JSON object, merged key by key, or None.
    :returns: the options, and where they came from for messages.
    :raises ConfigError: names the file, line or option that is wrong.
    """
    options = _load_file(file) if file else {}
    sources = [file] if file else []
    if override:
        options = _merged(options, _load_override(override))
        sources.append("--override-engine-args")
    return options, " and ".join(sources) or "no --extra-engine-args"


def _load_file(file: str) -> dict[str, Any]:
    try:
        text = Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--extra-engine-args: expected a YAML file at {file}, got {error}") from error
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--extra-engine-args: {file} is not YAML: {error}") from error
    return _mapping(f"--extra-engine-args {file}", {} if loaded is None else loaded)


def _load_override(override: str) -> dict[str, Any]:
    try:
        loaded = json.loads(override)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"--override-engine-args: expected a JSON object such as "
            f'\'{{"kv_cache_config": {{"tokens_per_block": 32}}}}\', got {override!r}: {error}'
        ) from error
    return _mapping("--override-engine-args", loaded)


def _mapping(where: str, loaded: object) -> dict[str, Any]:
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise ConfigError(f"{where}: expected a mapping of option names, got {type(loaded).__name__}")
    return loaded


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        before = merged.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            value = _merged(before, value)
        merged[key] = value
    return merged
