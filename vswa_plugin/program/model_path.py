"""A model by what the user gave: a directory, a file, or its name on the Hugging Face Hub.

A name is looked up in the local cache first, which needs no network, and is downloaded where it is not there:
weights as safetensors, configuration and tokenizer, never code. The package huggingface-hub does both; it
reads HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from vswa_plugin.errors import ConfigError, ConnectError, VswaError
from vswa_plugin.files import read_json_object

#: ``organisation/model`` or ``organisation/model@revision``, a revision being a branch, a tag or a commit.
_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
#: What is taken of a repository. Other formats of weights can hold code, and the rest is for training.
_FILES = (
    "model*.safetensors",
    _INDEX,
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
_MAX_REASON = 300


class FoundModel(NamedTuple):
    """Where a model lies on this machine, and what clients call it unless the user says otherwise.

    :param path: absolute.
    """

    path: Path
    name: str


def find_model(given: str, option: str, say: Callable[[str], None]) -> FoundModel:
    """The model that ``given`` means; downloads it where it is a name that the local cache does not have.

    Blocks, for minutes where it downloads.

    :param option: where ``given`` comes from, for messages.
    :param say: gets a line before a download.
    :raises ConfigError: there is none; says what to do.
    :raises ConnectError: the Hub cannot be reached.
    """
    if _exists(given):
        path = Path(given).resolve()
        return FoundModel(path, path.name)
    match = _NAME.fullmatch(given)
    if match is None:
        raise ConfigError(
            f"{option}: expected a model at {given[:_MAX_REASON]}, got nothing there; `vswa make-model DIR` "
            "writes a small random one, and organisation/model names one of the Hugging Face Hub"
        )
    named = _Named(match["name"], match["revision"], option, given)
    return FoundModel(named.find(say).resolve(), named.name)


def _exists(given: str) -> bool:
    try:
        return Path(given).exists()
    except (OSError, ValueError):  # too long for a path, or with a NUL
        return False


class _Named(NamedTuple):
    """A model of the Hub."""

    name: str
    revision: str | None
    option: str
    given: str

    def find(self, say: Callable[[str], None]) -> Path:
        if find_spec("huggingface_hub") is None:
            raise ConfigError(
                f"{self.option}: nothing is at {self.given}, and to look for a model of that name takes the "
                "package huggingface-hub: pip install 'vswa-plugin[hub]', or give the directory of the model"
            )
        hub = import_module("huggingface_hub")
        cached = self._cached(hub)
        if cached is not None and _lacking(cached) is None:
            return cached
        constants = hub.constants
        say(f"{self.given}: downloading it from {constants.ENDPOINT} to {constants.HF_HUB_CACHE}, once")
        try:
            folder = Path(self._snapshot(hub, local_files_only=False))
        except Exception as error:  # of the package, of its HTTP client, of the file system
            raise self._explained(hub, error) from error
        if (lacking := _lacking(folder)) is not None:
            if constants.HF_HUB_OFFLINE:
                raise self._offline(hub)
            raise ConfigError(
                f"{self.option} {self.given}: expected a model that gemma3_cpu or TensorRT-LLM can load, got "
                f"one without {lacking}, in {folder} and as far as {constants.ENDPOINT} could be reached; "
                "give a directory, or another name"
            )
        return folder

    def _cached(self, hub: Any) -> Path | None:
        """The snapshot in the local cache, which may be incomplete."""
        try:
            return Path(self._snapshot(hub, local_files_only=True))
        except (OSError, ValueError):  # LocalEntryNotFoundError and HFValidationError are such
            return None

    def _snapshot(self, hub: Any, *, local_files_only: bool) -> str:
        folder: str = hub.snapshot_download(
            self.name,
            revision=self.revision,
            allow_patterns=list(_FILES),
            local_files_only=local_files_only,
        )
        return folder

    def _explained(self, hub: Any, error: Exception) -> VswaError:
        """What the user can do about a download that failed."""
        errors, endpoint = import_module("huggingface_hub.errors"), hub.constants.ENDPOINT
        what, page = f"{self.option} {self.given}", f"{endpoint}/{self.name}"
        has_token = hub.get_token() is not None
        if isinstance(error, errors.GatedRepoError):
            got = "the token of this machine has no access" if has_token else "there is no token"
            return ConfigError(
                f"{what}: the model is gated, and {got}: accept its terms at {page}, then set HF_TOKEN to a "
                "token of that account"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return ConfigError(f"{what}: expected a branch, tag or commit of {page}, got {self.revision!r}")
        if isinstance(error, errors.RepositoryNotFoundError):
            private = "" if has_token else "; for a private one, set HF_TOKEN"
            return ConfigError(
                f"{what}: nothing is at that path, and {endpoint} has no such model: check the name{private}"
            )
        if isinstance(error, errors.HFValidationError):
            return ConfigError(f"{what}: expected a path or organisation/model, got: {_short(error)}")
        if hub.constants.HF_HUB_OFFLINE:
            return self._offline(hub)
        return ConnectError(
            f"{what}: it is not whole in {hub.constants.HF_HUB_CACHE}, and cannot be downloaded from "
            f"{endpoint} ({_short(error)}): try again, which goes on where this ended; or {self._elsewhere()}"
        )

    def _offline(self, hub: Any) -> ConfigError:
        return ConfigError(
            f"{self.option} {self.given}: it is not whole in {hub.constants.HF_HUB_CACHE}, and "
            f"HF_HUB_OFFLINE forbids to download it: {self._elsewhere()}"
        )

    def _elsewhere(self) -> str:
        return (
            f"on a machine that reaches the Hub run `hf download {self.name}` and copy its cache here "
            "(HF_HOME), or give the directory of the model"
        )


def _short(error: Exception) -> str:
    """The reason at the end of a chain of errors, in one line."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = str(error).split("\n")
    return f"{type(error).__name__}: {lines[0]}"[:_MAX_REASON]


def _lacking(folder: Path) -> str | None:
    """What a snapshot lacks of a whole model, or None."""
    if not (folder / "config.json").is_file():
        return "config.json"
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        return "tokenizer.json"
    if (folder / _WEIGHTS).is_file():
        return None
    try:
        shards = msgspec.convert(read_json_object(folder / _INDEX)["weight_map"], dict[str, str])
    except FileNotFoundError:
        return f"{_WEIGHTS} or {_INDEX}"
    except (ConfigError, KeyError, msgspec.ValidationError):
        return None  # it is there, and whoever loads it says what is wrong with it
    missing = sorted({shard for shard in shards.values() if not (folder / Path(shard).name).is_file()})
    return missing[0] if missing else None
