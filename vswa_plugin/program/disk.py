"""Room on disks: where temporary files go, and what to say where a disk is full."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from vswa_plugin.errors import ConfigError, shown
from vswa_plugin.program.run import FULL

#: What names the folder of temporary files, in the order in which Python looks.
_VARIABLES = ("TMPDIR", "TEMP", "TMP")
#: A file system may keep a smaller file beside its name, and so have room for it and for no other one.
_PROBE_BYTES = 1 << 14


def temporary_folder() -> Path:
    """Where temporary files go: the folder that TMPDIR names, or else one of the system's.

    Python alone would silently go to another folder where none can be written in the one that is named.

    :raises ConfigError: files cannot be written there.
    """
    for variable in _VARIABLES:
        if named := os.environ.get(variable):
            if (error := _cannot_write(named)) is not None:
                step = "free some space there" if error.errno in FULL else "create it"
                raise ConfigError(
                    f"{variable}: expected a directory in which files can be written, got {shown(named)}: "
                    f"{error.strerror}; {step}, or name another one"
                ) from error
            return Path(named)
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:  # it has looked in several
        raise ConfigError(
            "TMPDIR: expected a directory in which files can be written, got none, and the system has none "
            f"either: {error.strerror}; free some space there, or set TMPDIR to one"
        ) from error


def require_room(folder: Path, least: int, what: str, step: str) -> None:
    """Refuse a folder on whose disk fewer than ``least`` bytes are free.

    :param what: what is to be written there; ``step``: what else the user can do.
    :raises ConfigError: there is too little room.
    """
    if (free := shutil.disk_usage(folder).free) < least:
        raise ConfigError(
            f"expected {least >> 20} MiB free for {what} in {folder}, got {free >> 20} MiB: free some space "
            f"there, or {step}"
        )


def why_full(folder: Path) -> str:
    """That the disk of ``folder`` is full, and what to do; empty where files can be written there."""
    error = _cannot_write(folder)
    if error is None or error.errno not in FULL:
        return ""
    return (
        f"{error.strerror} in {folder}: free some space there, or name another disk with --log-dir or TMPDIR"
    )


def _cannot_write(folder: str | Path) -> OSError | None:
    """Why no file can be written in ``folder``."""
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as probe:
            probe.write(bytes(_PROBE_BYTES))
    except OSError as error:
        return error
    return None
