"""The installed package: whether it is there, its version, and the few names of it that are used.

The only file that imports tensorrt_llm, which takes tens of seconds and wants a GPU: nothing here does it
before :func:`load`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import re
import socket
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vswa_plugin.engine import visible_gpus
from vswa_plugin.errors import ConfigError

logger = logging.getLogger(__name__)

#: What ``--engine`` takes.
ENGINE = "tensorrt_llm"
MODULE = "tensorrt_llm"
DISTRIBUTION = "tensorrt-llm"
INSTALL = "pip install 'vswa-plugin[trtllm]' --extra-index-url https://pypi.nvidia.com"

_NO_CANDIDATE = 1 << 20
_VERSION = re.compile(r"v?(\d+)\.(\d+)\.(\d+)(?:[-_.]?(rc|c|a|alpha|b|beta|dev)[-_.]?(\d*))?", re.ASCII)
#: TensorRT-LLM splits the machine's number in two from 1.3.0rc22 on.
_PROCESS_IDS = 64
_MACHINES, _MACHINES_AND_PROCESSES = 1021, 256 * _PROCESS_IDS


class Version(NamedTuple):
    """A release; of candidates the number, else more than any; what comes before them counts as the first."""

    major: int
    minor: int
    patch: int
    candidate: int = _NO_CANDIDATE

    @classmethod
    def parse(cls, text: str) -> Version | None:
        """None for what does not look like a version of TensorRT-LLM."""
        match = _VERSION.match(text)
        if match is None:
            return None
        major, minor, patch, stage, number = match.groups()
        numbers = int(major), int(minor), int(patch)
        if stage is None:
            return cls(*numbers)
        return cls(*numbers, int(number or 0) if stage in ("rc", "c") else 0)

    def __str__(self) -> str:
        tail = "" if self.candidate == _NO_CANDIDATE else f"rc{self.candidate}"
        return f"{self.major}.{self.minor}.{self.patch}{tail}"


class Api(NamedTuple):
    """What is used of TensorRT-LLM, classes and one function."""

    LLM: Any
    SamplingParams: Any
    GuidedDecodingParams: Any
    DisaggregatedParams: Any
    SchedulingParams: Any
    LoRARequest: Any
    Logprob: Any
    RequestError: type[Exception]
    #: None in releases that number requests on the prefill worker only.
    get_global_disagg_request_id: Callable[..., int] | None


def require_installed() -> Version | None:
    """The installed version, None where it is unknown. Imports nothing.

    :raises ConfigError: the package is not installed; the message gives the command.
    """
    if importlib.util.find_spec(MODULE) is None:
        raise ConfigError(
            f"--engine tensorrt_llm: the package {MODULE} is not installed; on a machine with an NVIDIA GPU: "
            f"{INSTALL}"
        )
    try:
        text = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None
    return Version.parse(text)


def default_reason(environ: Mapping[str, str], root: Path = Path("/")) -> str | None:
    """Why this engine is to serve where none was named; None: the package or a GPU is not there."""
    if importlib.util.find_spec(MODULE) is None:
        return None
    gpus = visible_gpus(environ, root)
    if not gpus:
        logger.info(
            "no engine was named, and %s is installed, but no GPU is visible: it does not serve", MODULE
        )
        return None
    count = "one GPU is" if len(gpus) == 1 else f"{len(gpus)} GPUs are"
    return f"no engine was named, {MODULE} is installed and {count} visible; --engine names another"


def load() -> Api:
    """Import TensorRT-LLM.

    :raises ConfigError: it is installed and cannot be imported; names the reason.
    """
    try:
        return Api(
            LLM=_name("llmapi", "LLM"),
            SamplingParams=_name("llmapi", "SamplingParams"),
            GuidedDecodingParams=_name("sampling_params", "GuidedDecodingParams"),
            DisaggregatedParams=_name("llmapi", "DisaggregatedParams"),
            SchedulingParams=_name("scheduling_params", "SchedulingParams"),
            LoRARequest=_name("executor.request", "LoRARequest"),
            Logprob=_name("executor.result", "Logprob"),
            RequestError=_name("executor.utils", "RequestError"),
            get_global_disagg_request_id=_name_if_any("llmapi.disagg_utils", "get_global_disagg_request_id"),
        )
    except Exception as error:  # its imports look at the driver, and raise what they like
        raise ConfigError(
            f"--engine tensorrt_llm: the installed package cannot be imported: {error}; it needs an NVIDIA "
            f"driver and the CUDA libraries of its release; to install it anew: {INSTALL}"
        ) from error


def disagg_request_id(api: Api) -> int | None:
    """A number for one request over both its phases, unlike those of other workers; None: no such thing."""
    make = api.get_global_disagg_request_id
    if make is None:
        return None
    worker = zlib.crc32(f"{socket.gethostname()}:{os.getpid()}".encode())
    if "process_id" in inspect.signature(make).parameters:
        return make(*divmod(worker % _MACHINES_AND_PROCESSES, _PROCESS_IDS))
    return make(worker % _MACHINES)


def _name(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"{MODULE}.{module}"), name)


def _name_if_any(module: str, name: str) -> Any:
    try:
        return _name(module, name)
    except (ImportError, AttributeError):
        return None
