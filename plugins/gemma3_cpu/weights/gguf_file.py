"""A GGUF file: metadata, and tensors as float32 NumPy arrays.

The container is read here, because the package ``gguf`` takes many seconds over the metadata of a vocabulary
of 262,144 pieces, and an engine has to know layers and windows before it starts. That package does what is
laborious: it undoes the quantization.
"""

from __future__ import annotations

import math
import mmap
import struct
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vswa_plugin.errors import ConfigError, shown

from ..model.tensors import Float32

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
#: What a header may hold: bytes of it, values, tensors, members of an array; of a model with a vocabulary of
#: 262,144 pieces it has 6 MB. Dimensions are GGML's.
_MAX_HEADER, _MAX_ENTRIES, _MAX_ARRAY, _MAX_DIMENSIONS = 64 << 20, 1 << 16, 1 << 24, 4
#: The densest of all types has less than two bits a value.
_MOST_VALUES_PER_BYTE = 8
_MAX_ALIGNMENT = 1 << 16
_INSTALL = "pip install 'vswa-plugin[gguf]'"

_BOOL, _STRING, _ARRAY = 7, 8, 9
#: Type number of a metadata value -> its layout.
_NUMBERS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "?", 10: "<u8", 11: "<i8",
    12: "<f8",
}  # fmt: skip
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class GgufTensor(NamedTuple):
    """Where one tensor lies.

    :param shape: as NumPy has it, i.e. the file's dimensions in reverse.
    :param type_id: GGML's number of its type.
    :param offset: bytes from the beginning of the file.
    """

    shape: tuple[int, ...]
    type_id: int
    offset: int


def is_gguf(path: str | Path) -> bool:
    """Whether ``path`` is a file that begins like a GGUF file, or is named like one."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC or path.suffix.lower() == ".gguf"


def require_gguf() -> None:
    """Raise ConfigError where the package ``gguf`` is not installed."""
    if find_spec("gguf") is None:
        raise ConfigError(f"a GGUF file needs the package gguf, which is not installed: {_INSTALL}")


class GgufFile:
    """Metadata and tensor directory of one file; tensors are read one by one.

    :raises ConfigError: not a GGUF file, one of an unknown version, or a truncated one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        #: Values by key: numbers, strings, lists of strings, NumPy arrays of numbers.
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        try:
            self._size = self.path.stat().st_size
            with self.path.open("rb") as file:
                start = file.read(len(MAGIC))
                if start != MAGIC:
                    raise self._error(f"expected a GGUF file, which begins with {MAGIC!r}, got {start!r}")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    self._parse(_Cursor(data))
        except OSError as error:
            raise self._error(f"expected a GGUF file, got: {error}") from error
        except (struct.error, EOFError) as error:
            raise self._error(
                f"the file ends after {self._size} bytes within its header, or that is longer than "
                f"{_MAX_HEADER} bytes: copy it again"
            ) from error
        except UnicodeDecodeError as error:
            raise self._error(
                f"expected a GGUF file, got metadata that cannot be read: {shown(error)}"
            ) from error

    def read(self, name: str) -> Float32:
        """One tensor, dequantized, as a float32 array that the caller may keep and change.

        :raises ConfigError: the package ``gguf`` is missing or does not know the type, or the file
            ends early.
        """
        gguf, tensor = _package(), self.tensors[name]
        quant, shape = self._stored(gguf, name)
        raw = np.memmap(self.path, np.uint8, "r", tensor.offset, shape)
        try:
            values = gguf.quants.dequantize(_as_stored(raw, quant.name), quant)
        except NotImplementedError as error:
            raise self._error(
                f"tensor {name}: the package gguf cannot dequantize type {quant.name}"
            ) from error
        return np.array(values, dtype=np.float32).reshape(tensor.shape)

    def check_places(self) -> None:
        """Check that each tensor lies within the file, behind the one before it.

        :raises ConfigError: names the one that does not; or the package ``gguf`` is missing.
        """
        gguf, end, before = _package(), 0, ""
        for name, tensor in sorted(self.tensors.items(), key=lambda each: each[1].offset):
            if tensor.offset < end:
                raise self._error(
                    f"tensor {name}: expected it behind {before}, which ends at {end}, got {tensor.offset}: "
                    "the file is damaged"
                )
            end, before = tensor.offset + math.prod(self._stored(gguf, name)[1]), name

    def _stored(self, gguf: Any, name: str) -> tuple[Any, tuple[int, ...]]:
        """The type of a tensor, and the shape of its bytes, which are in the file."""
        tensor = self.tensors[name]
        quant, blocks, block_bytes = self._type(gguf, name, tensor)
        columns = tensor.shape[-1]
        if columns % blocks:
            raise self._error(f"tensor {name}: expected rows of whole blocks of {blocks}, got {columns}")
        shape = (*tensor.shape[:-1], columns // blocks * block_bytes)
        size = math.prod(shape)
        if tensor.offset + size > self._size:
            raise self._error(
                f"tensor {name}: expected {size} bytes at {tensor.offset}, the file has {self._size}: "
                "it is truncated; copy it again"
            )
        return quant, shape

    def type_name(self, name: str) -> str:
        """GGML's name of a tensor's type, e.g. ``Q8_0``."""
        return str(self._type(_package(), name, self.tensors[name])[0].name)

    def _type(self, gguf: Any, name: str, tensor: GgufTensor) -> tuple[Any, int, int]:
        """The type, its values per block and its bytes per block."""
        try:
            quant = gguf.GGMLQuantizationType(tensor.type_id)
            blocks, block_bytes = gguf.GGML_QUANT_SIZES[quant]
        except (ValueError, KeyError) as error:
            raise self._error(
                f"tensor {name}: the installed package gguf does not know type {tensor.type_id}; "
                "upgrade it: pip install --upgrade gguf"
            ) from error
        return quant, blocks, block_bytes

    def _parse(self, cursor: _Cursor) -> None:
        version = cursor.u32()
        if version not in _VERSIONS:
            raise self._error(f"expected GGUF version 2 or 3 (little-endian), got {version}")
        tensors, entries = cursor.u64(), cursor.u64()
        if max(tensors, entries) > _MAX_ENTRIES:
            raise self._error(
                f"expected at most {_MAX_ENTRIES} tensors and as many values, got {tensors} and {entries}"
            )
        for _ in range(entries):
            key = cursor.string()
            if key in self.metadata:
                raise self._error(f"expected each key once, got {shown(key)} again")
            self.metadata[key] = self._value(cursor, key)
        headers = [self._read_tensor(cursor) for _ in range(tensors)]
        alignment = self._alignment()
        data = -(-cursor.at // alignment) * alignment
        for name, shape, kind, offset in headers:
            if name in self.tensors:
                raise self._error(f"tensor {shown(name)}: expected each name once, got it again")
            if data + offset >= self._size:
                raise self._error(
                    f"tensor {name}: expected its bytes at {data + offset}, the file has {self._size}: "
                    "it is truncated; copy it again"
                )
            self.tensors[name] = GgufTensor(shape, kind, data + offset)

    def _value(self, cursor: _Cursor, key: str) -> Any:
        try:
            return cursor.value(cursor.u32())
        except _UnknownType as unknown:
            raise self._error(
                f"{shown(key)}: expected a value of a type from 0 to {max(_NUMBERS)}, got {unknown.where} "
                f"{unknown.kind}: the file is damaged, or of a later version of GGUF; copy it again"
            ) from None

    def _read_tensor(self, cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset."""
        name, count = cursor.string(), cursor.u32()
        if not 1 <= count <= _MAX_DIMENSIONS:
            raise self._error(
                f"tensor {shown(name)}: expected 1 to {_MAX_DIMENSIONS} dimensions, got {count}"
            )
        shape = tuple(cursor.u64() for _ in range(count))[::-1]
        if not 0 < math.prod(shape) <= self._size * _MOST_VALUES_PER_BYTE:
            raise self._error(
                f"tensor {shown(name)}: expected a shape whose values fit into a file of {self._size} bytes, "
                f"got {list(shape)}: it is truncated or damaged; copy it again"
            )
        return name, shape, cursor.u32(), cursor.u64()

    def _alignment(self) -> int:
        value = self.metadata.get("general.alignment", _ALIGNMENT)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MAX_ALIGNMENT:
            raise self._error(
                f"general.alignment: expected a number from 1 to {_MAX_ALIGNMENT}, got {shown(value)}"
            )
        return value

    def _error(self, message: str) -> ConfigError:
        return ConfigError(f"{self.path}: {message}")


class _UnknownType(Exception):
    """A value of a type that this version of the format does not have."""

    def __init__(self, kind: int, where: str) -> None:
        super().__init__(kind)
        self.kind, self.where = kind, where


def _dtype(kind: int, where: str) -> np.dtype[Any]:
    if kind not in _NUMBERS:
        raise _UnknownType(kind, where)
    return np.dtype(_NUMBERS[kind])


class _Cursor:
    """Reads the header from the beginning; raises EOFError or struct.error at the end of the data."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.at = len(MAGIC)

    def u32(self) -> int:
        (value,) = _U32.unpack_from(self._data, self.at)
        self.at += _U32.size
        return int(value)

    def u64(self) -> int:
        (value,) = _U64.unpack_from(self._data, self.at)
        self.at += _U64.size
        return int(value)

    def string(self) -> str:
        return self._take(self.u64()).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(self.u32(), self.u64())
        dtype = _dtype(kind, "type")
        return np.frombuffer(self._take(dtype.itemsize), dtype)[0].item()

    def _array(self, kind: int, count: int) -> list[str] | NDArray[Any]:
        if count > _MAX_ARRAY:
            raise EOFError
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        dtype = _dtype(kind, "a list of type")
        return np.frombuffer(self._take(count * dtype.itemsize), dtype)

    def _take(self, size: int) -> bytes:
        if size > min(len(self._data), _MAX_HEADER) - self.at:
            raise EOFError
        data = self._data[self.at : self.at + size]
        self.at += size
        return data


def _package() -> Any:
    """The package ``gguf``: imported here only, so that all else works without it."""
    require_gguf()
    import_module("gguf.quants")
    return import_module("gguf")


def _as_stored(raw: NDArray[np.uint8], type_name: str) -> NDArray[Any]:
    """Bytes as the package wants them: plain floats as such, quantized rows as bytes."""
    plain = {"F32": "<f4", "F16": "<f2"}.get(type_name)
    return raw if plain is None else raw.view(plain)
