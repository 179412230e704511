"""Where a model comes from: a Hugging Face directory, or a GGUF file that becomes one in the cache."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from vswa_plugin.errors import ConfigError

from ..model.config import CONFIG_FILE, Gemma3Config, load_config, parse_config
from ..model.model import Gemma3Model
from ..model.tensors import EMBEDDING, HEAD
from ..model.tensors import check_tensors as check_names_and_shapes
from .gguf_file import GgufFile, is_gguf, require_gguf
from .gguf_import import check_tensors, import_gguf, read_config
from .safetensors import SafetensorsSource

logger = logging.getLogger(__name__)

#: Raised when the importer's output changes: older conversions are then left alone and made again.
_FORMAT = 1


class ModelSource(NamedTuple):
    """A checked model.

    :param directory: the Hugging Face directory to load from; of a GGUF file it is there after
        :meth:`prepare`.
    :param gguf: the GGUF file, or None.
    """

    directory: Path
    config: Gemma3Config
    gguf: Path | None = None

    @property
    def converted_dir(self) -> str | None:
        """The directory, where it is not what the user named."""
        return None if self.gguf is None else str(self.directory)

    def prepare(self) -> None:
        """Convert the GGUF file where that has not been done; takes seconds to minutes.

        :raises ConfigError: the file cannot be converted.
        """
        if self.gguf is None:
            return
        with locked(self.directory):
            if is_complete(self.directory):
                return
            logger.info("converting %s to %s, once", self.gguf, self.directory)
            import_gguf(self.gguf, self.directory, overwrite=True)


def find_model(path: str | Path) -> ModelSource:
    """Check a model without reading its weights.

    :raises ConfigError: no model directory and no GGUF file of a Gemma 3, or a GGUF file that cannot be
        converted because the extra ``gguf`` is missing.
    """
    if not is_gguf(path):
        config = load_config(path)
        open_weights(path, config)
        return ModelSource(Path(path), config)
    source = GgufFile(path)
    config = parse_config(read_config(source), str(path))
    check_tensors(source, config)
    directory = conversion_dir(source.path)
    if not is_complete(directory):
        require_gguf()
    return ModelSource(directory, config, source.path)


def load_model(model_dir: str | Path, config: Gemma3Config | None = None) -> Gemma3Model:
    """The model of a Hugging Face directory.

    :raises ConfigError: the directory, its config.json or its tensors do not fit.
    """
    config = config or load_config(model_dir)
    return Gemma3Model(config, open_weights(model_dir, config))


def open_weights(model_dir: str | Path, config: Gemma3Config) -> SafetensorsSource:
    """The tensors of a Hugging Face directory, none of them read yet but for a comparison.

    :raises ConfigError: they are not those of ``config``, which is then no measure of anything.
    """
    source = SafetensorsSource(model_dir)
    check_names_and_shapes(config, source)
    if config.tie_word_embeddings and HEAD in source.shapes() and not source.same(HEAD, EMBEDDING):
        raise ConfigError(
            f"{source.where}: tensor {HEAD}: expected the values of {EMBEDDING} by tie_word_embeddings in "
            "config.json, got others; set tie_word_embeddings to false to use this head, or remove the tensor"
        )
    return source


def cache_root() -> Path:
    """Where converted models are kept: ``vswa-plugin`` in XDG_CACHE_HOME or ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vswa-plugin"


def conversion_dir(file: Path) -> Path:
    """The cache directory of one GGUF file: another file, or a changed one, has another."""
    stat = file.stat()
    return cache_root() / "gguf" / f"{file.stem}-{stat.st_size}-{stat.st_mtime_ns}-{_FORMAT}"


def is_complete(directory: Path) -> bool:
    """Conversions appear whole, so one file stands for all."""
    return (directory / CONFIG_FILE).is_file()


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One process at a time: two workers may start with one file at once."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with (directory.parent / f".{directory.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
