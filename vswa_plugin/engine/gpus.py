"""The GPUs that a process may use: those of the machine, as CUDA_VISIBLE_DEVICES restricts them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path

VISIBLE_ENV = "CUDA_VISIBLE_DEVICES"
_DEVICE = re.compile(r"nvidia\d+")
_ENTRY = re.compile(r"[0-9]+|(?:GPU|MIG)-[0-9A-Za-z/-]+")


def visible_gpus(environ: Mapping[str, str], root: Path = Path("/")) -> tuple[str, ...]:
    """Numbers or names, as CUDA_VISIBLE_DEVICES has them; of the machine where that is not set.

    :param root: of the file system, where the driver shows its devices.
    """
    named = environ.get(VISIBLE_ENV)
    if named is not None:
        # CUDA looks at no device behind what names none, such as -1.
        return tuple(itertools.takewhile(names_gpu, map(str.strip, named.split(","))))
    return tuple(str(number) for number in range(_machine(root)))


def names_gpu(entry: str) -> bool:
    """Whether CUDA takes ``entry`` for a device: a number, or the beginning of a UUID."""
    return _ENTRY.fullmatch(entry) is not None


def listed_gpus(text: str) -> tuple[str, ...]:
    """The entries of a list with commas."""
    return tuple(entry.strip() for entry in text.split(",") if entry.strip())


def _machine(root: Path) -> int:
    """How many GPUs the driver shows: each has a directory, and in a container a device file."""
    try:
        return sum(1 for _ in (root / "proc/driver/nvidia/gpus").iterdir())
    except OSError:
        pass
    try:
        return sum(1 for each in (root / "dev").iterdir() if _DEVICE.fullmatch(each.name))
    except OSError:
        return 0
