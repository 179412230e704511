"""Tensors of a Hugging Face directory: safetensors, one file or sharded, as float32 NumPy arrays.

A safetensors file is an 8-byte little-endian length, a JSON header {name: dtype, shape, data_offsets}, and
the data. It is read here rather than through the ``safetensors`` package because NumPy has no bfloat16:
from a memory map one tensor at a time can be widened, without the whole file in memory twice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from vswa_plugin.errors import ConfigError, shown
from vswa_plugin.files import MAX_JSON_BYTES, parse_json_object, read_json_object

from ..model.config import WEIGHTS_FILE, WEIGHTS_INDEX_FILE
from ..model.tensors import Float32

_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
#: The types of values that were packed or rounded, and need a scale that lies in another tensor.
_QUANTISED = re.compile(r"[IU](8|16|32)|F[468]_.*|F4")
#: An object of entries, each of which holds lists.
_HEADER_DEPTH = 3
_MAX_DIMENSIONS = 8
_MAX_SHARDS = 1_000
#: Values that are compared at once.
_COMPARED = 1 << 20
_Natural = Annotated[int, msgspec.Meta(ge=0)]
# Text-only checkpoints, multimodal ones before and after transformers 4.52, and a bare text model.
_PREFIXES = ("language_model.model.", "model.language_model.", "model.")
_VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")


class _Tensor(msgspec.Struct, frozen=True):
    """Where one tensor lies: file, dtype name, shape, and bytes [start, stop) of the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class _Entry(msgspec.Struct):
    dtype: str
    shape: Annotated[list[_Natural], msgspec.Meta(max_length=_MAX_DIMENSIONS)]
    data_offsets: tuple[_Natural, _Natural]


class SafetensorsSource:
    """Tensors of ``model.safetensors``, or of the shards that ``model.safetensors.index.json`` names.

    Those of the vision part are left alone, whatever they are.

    :raises ConfigError: a file that is missing, truncated or not safetensors; weights that are quantised; no
        tensor of a text model.
    """

    def __init__(self, directory: str | Path) -> None:
        root = Path(directory)
        self.where = str(root)
        self._tensors: dict[str, _Tensor] = {}
        others = 0
        for path in _weight_files(root):
            for name, tensor in read_header(path).items():
                canonical = canonical_name(name)
                if canonical is None:
                    others += 1
                    continue
                if (before := self._tensors.get(canonical)) is not None:
                    raise ConfigError(
                        f"{path}: tensor {name}: expected each tensor of the text model once, got another "
                        f"one in {before.path.name}; remove one"
                    )
                _check_type(path, name, tensor)
                self._tensors[canonical] = tensor
        if not self._tensors:
            raise ConfigError(
                f"{root}: expected the weights of a text model, got {others} tensors of a vision part and no "
                "other: the text part is missing; download the whole model"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Float32:
        tensor = self._tensors[name]
        return _widen(self._raw(tensor).view(_DTYPES[tensor.dtype]), tensor.dtype).reshape(tensor.shape)

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same values, with little of them in memory at a time."""
        left, right = self._tensors[one], self._tensors[other]
        return left.shape == right.shape and all(
            np.array_equal(self._part(left, at), self._part(right, at))
            for at in range(0, math.prod(left.shape), _COMPARED)
        )

    def _part(self, tensor: _Tensor, at: int) -> Float32:
        return _widen(self._raw(tensor).view(_DTYPES[tensor.dtype])[at : at + _COMPARED], tensor.dtype)

    @staticmethod
    def _raw(tensor: _Tensor) -> NDArray[np.uint8]:
        size = tensor.stop - tensor.start
        if not size:  # no file is mapped for nothing
            return np.zeros(0, np.uint8)
        return np.memmap(tensor.path, np.uint8, "r", tensor.start, (size,))


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


def read_header(path: Path) -> dict[str, _Tensor]:
    """Names and places of the tensors of one safetensors file.

    :raises ConfigError: not a safetensors file, or shorter than its header declares.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(MAX_JSON_BYTES, size - 8):
                raise ConfigError(
                    f"{path}: expected a safetensors file with a header of at most {MAX_JSON_BYTES} bytes, "
                    f"got one of {length} bytes in a file of {size}"
                )
            text = file.read(length)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: not found; the weights are incomplete, download them again") from error
    except OSError as error:
        raise ConfigError(f"{path}: expected a safetensors file, got: {error}") from error
    header = parse_json_object(text, path, "a safetensors file", most_depth=_HEADER_DEPTH)
    tensors = {
        name: _place(path, name, entry, 8 + length)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    _check_places(path, tensors, 8 + length, size)
    return tensors


def _place(path: Path, name: str, raw: object, data: int) -> _Tensor:
    try:
        entry = msgspec.convert(raw, _Entry)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: tensor {shown(name)}: {error}") from error
    start, stop = (data + offset for offset in entry.data_offsets)
    return _Tensor(path, entry.dtype, tuple(entry.shape), start, stop)


def _check_places(path: Path, tensors: Mapping[str, _Tensor], data: int, size: int) -> None:
    """As the format has it, the tensors lie one after another, and fill the file."""
    end = data
    for name, tensor in sorted(tensors.items(), key=lambda each: (each[1].start, each[1].stop)):
        dtype = _DTYPES.get(tensor.dtype)
        count = tensor.stop - tensor.start if dtype is None else math.prod(tensor.shape) * dtype.itemsize
        where = f"{path}: tensor {shown(name)}: expected {count} bytes at {tensor.start}"
        if tensor.stop > size or tensor.start + count > size:
            raise ConfigError(f"{where}, the file has {size}: it is truncated; copy it again")
        if tensor.stop - tensor.start != count:
            raise ConfigError(f"{where} by its shape, got {tensor.stop - tensor.start}: the file is damaged")
        if tensor.start != end:
            raise ConfigError(f"{where}, where the tensor before it ends at {end}: the file is damaged")
        end = tensor.stop
    if end != size:
        raise ConfigError(
            f"{path}: expected the file to end where its last tensor does, at {end}, got {size} bytes: "
            "the file is damaged"
        )


def _check_type(path: Path, name: str, tensor: _Tensor) -> None:
    if tensor.dtype in _DTYPES:
        return
    got = f"{path}: tensor {shown(name)}: expected dtype {', '.join(_DTYPES)}, got {shown(tensor.dtype)}"
    if _QUANTISED.fullmatch(tensor.dtype):
        got += ": the weights are quantised, which gemma3_cpu does not read; use the model's own checkpoint"
    raise ConfigError(got)


def _weight_files(root: Path) -> list[Path]:
    index = root / WEIGHTS_INDEX_FILE
    if (root / WEIGHTS_FILE).is_file() or not index.is_file():
        return [root / WEIGHTS_FILE]
    try:
        shards = msgspec.convert(read_json_object(index)["weight_map"], dict[str, str]).values()
    except (OSError, KeyError, msgspec.ValidationError) as error:
        raise ConfigError(
            f"{index}: expected an object 'weight_map' of tensor name to file, got: {error!r}"
        ) from error
    names = sorted(set(shards))
    if len(names) > _MAX_SHARDS:
        raise ConfigError(f"{index}: expected at most {_MAX_SHARDS} files of weights, got {len(names)}")
    return [root / Path(name).name for name in names]


def _widen(raw: NDArray[Any], dtype: str) -> Float32:
    if dtype == "BF16":
        # A bfloat16 is the upper half of a float32.
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)
