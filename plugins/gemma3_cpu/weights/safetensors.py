"""Tensors of a Hugging Face directory: safetensors, one file or sharded, as float32 NumPy arrays.

A safetensors file is an 8-byte little-endian length, a JSON header {name: dtype, shape, data_offsets}, and
the data. It is read here rather than through the ``safetensors`` package because NumPy has no bfloat16:
from a memory map one tensor at a time can be widened, without the whole file in memory twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from vswa_plugin.errors import ConfigError

from ..model.config import WEIGHTS_FILE, WEIGHTS_INDEX_FILE
from ..model.tensors import Float32

_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_MAX_HEADER = 100_000_000
# Text-only checkpoints, multimodal ones before and after transformers 4.52, and a bare text model.
_PREFIXES = ("language_model.model.", "model.language_model.", "model.")
_VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")


class _Tensor(msgspec.Struct, frozen=True):
    """Where one tensor lies: file, dtype name, shape, and bytes [start, stop) after the header."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class SafetensorsSource:
    """Tensors of ``model.safetensors``, or of the shards that ``model.safetensors.index.json`` names.

    :raises ConfigError: a file that is missing, truncated or not safetensors.
    """

    def __init__(self, directory: str | Path) -> None:
        root = Path(directory)
        self.where = str(root)
        self._tensors: dict[str, _Tensor] = {}
        for path in _weight_files(root):
            for name, tensor in read_header(path):
                canonical = canonical_name(name)
                if canonical is not None:
                    self._tensors[canonical] = tensor

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Float32:
        tensor = self._tensors[name]
        raw = np.memmap(tensor.path, np.uint8, "r", tensor.start, (tensor.stop - tensor.start,))
        return _widen(raw.view(_DTYPES[tensor.dtype]), tensor.dtype).reshape(tensor.shape)


def canonical_name(name: str) -> str | None:
    """The text model's own name of a tensor of a checkpoint; None for tensors of the vision part.

    >>> canonical_name("language_model.model.layers.3.mlp.up_proj.weight")
    'layers.3.mlp.up_proj.weight'
    """
    if _VISION.match(name) or name.endswith("rotary_emb.inv_freq"):
        return None
    if name.endswith("lm_head.weight"):
        return "lm_head.weight"
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def read_header(path: Path) -> Iterator[tuple[str, _Tensor]]:
    """Names and places of the tensors of one safetensors file.

    :raises ConfigError: not a safetensors file, or shorter than its header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(_MAX_HEADER, size - 8):
                raise ConfigError(
                    f"{path}: expected a safetensors file, got a header of {length} bytes in {size}"
                )
            header = json.loads(file.read(length))
        entries = {
            name: msgspec.convert(entry, _Entry) for name, entry in header.items() if name != "__metadata__"
        }
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: not found; the weights are incomplete, download them again") from error
    except (OSError, ValueError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: expected a safetensors file, got: {error}") from error
    for name, entry in entries.items():
        yield name, _place(path, name, entry, 8 + length, size)


def _place(path: Path, name: str, entry: _Entry, data: int, size: int) -> _Tensor:
    if entry.dtype not in _DTYPES:
        raise ConfigError(f"{path}: tensor {name}: expected dtype {', '.join(_DTYPES)}, got {entry.dtype}")
    start, stop = (data + offset for offset in entry.data_offsets)
    count = int(np.prod(entry.shape, dtype=np.int64)) * _DTYPES[entry.dtype].itemsize
    if start < data or stop - start != count or stop > size:
        raise ConfigError(
            f"{path}: tensor {name}: expected {count} bytes at {start}, the file has {size}: "
            "it is truncated; copy it again"
        )
    return _Tensor(path, entry.dtype, tuple(entry.shape), start, stop)


def _weight_files(root: Path) -> list[Path]:
    index = root / WEIGHTS_INDEX_FILE
    if (root / WEIGHTS_FILE).is_file() or not index.is_file():
        return [root / WEIGHTS_FILE]
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [root / Path(shard).name for shard in sorted(set(shards))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{index}: expected an object 'weight_map' of tensor name to file, got: {error!r}"
        ) from error


def _widen(raw: NDArray[Any], dtype: str) -> Float32:
    if dtype == "BF16":
        # A bfloat16 is the upper half of a float32.
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)
