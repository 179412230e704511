"""How many threads NumPy's matrix products use.

OpenBLAS starts one thread per core and lets them spin while they wait for each other. With small matrices, on
a machine that runs other things too, that costs far more than it brings: 512 tokens of the small random model
took 0.06 s with one thread and 1.7 s with two, on two cores with a load of 4.
"""

from __future__ import annotations

import ctypes
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

#: Below this width of the model one thread is used by default.
_WIDE = 512
_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
_SETTERS = (
    "scipy_openblas_set_num_threads64_",
    "scipy_openblas_set_num_threads",
    "openblas_set_num_threads64_",
    "openblas_set_num_threads",
)


def choose_threads(threads: int | None, hidden_size: int) -> int | None:
    """Threads to set; None: leave them as they are, because the model is wide or the environment says it."""
    if threads is not None:
        return threads
    if hidden_size >= _WIDE or any(os.environ.get(name) for name in _VARIABLES):
        return None
    return 1


def set_threads(count: int) -> bool:
    """Set the threads of the OpenBLAS that NumPy has loaded, for this process; False where there is none."""
    for library in _loaded_openblas():
        for name in _SETTERS:
            setter = getattr(library, name, None)
            if setter is not None:
                setter.argtypes, setter.restype = [ctypes.c_int], None
                setter(count)
                return True
    logger.info("no OpenBLAS found; matrix products use as many threads as NumPy's library chooses")
    return False


def _loaded_openblas() -> list[ctypes.CDLL]:
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    paths = sorted({line.split(maxsplit=5)[5] for line in maps.splitlines() if "openblas" in line})
    libraries = []
    for path in paths:
        try:
            libraries.append(ctypes.CDLL(path))
        except OSError:
            logger.debug("%s could not be opened", path)
    return libraries
