"""Entry files: written atomically, locked while their writer lives, read with a verdict on its life.

Synchronous. Names are the registry's keys, quoted, so that one flat folder holds them all.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from pathlib import Path
from urllib.parse import quote, unquote

import msgspec

from vswa_plugin.registry import MAX_ENTRY_BYTES, PREFIX

logger = logging.getLogger(__name__)

SUFFIX = ".json"
#: What a file system answers that has no locks.
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)


def file_name(key: str) -> str:
    return quote(key.removeprefix(PREFIX), safe="") + SUFFIX


def key_of(name: str) -> str:
    return PREFIX + unquote(name.removesuffix(SUFFIX))


def _lock(descriptor: int, kind: int) -> bool | None:
    """Whether the lock was free and is ours now; None where the file system has none."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


class EntryFile:
    """The file of one key, as its writer sees it. All methods raise OSError."""

    def __init__(self, folder: Path, key: str) -> None:
        self._path = folder / file_name(key)
        self._descriptor: int | None = None
        self._payload: bytes | None = None

    def write(self, payload: bytes) -> None:
        """Replace the file, so that a reader sees the former or the new content, each locked."""
        self._payload = None
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
        descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        try:
            if os.write(descriptor, payload) != len(payload):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            _lock(descriptor, fcntl.LOCK_EX)
            draft.rename(self._path)
        except OSError:
            os.close(descriptor)
            raise
        self._close()
        self._descriptor, self._payload = descriptor, payload

    def touch(self, payload: bytes) -> bool:
        """Touch the file as a sign of life; False where it must be written again: gone, or not ``payload``.

        A file that another worker has put in its place is left alone.
        """
        if self._descriptor is None or payload != self._payload:
            return False
        os.utime(self._descriptor)
        try:
            current = self._path.stat().st_ino
        except FileNotFoundError:
            return False
        if current != os.fstat(self._descriptor).st_ino:
            logger.warning("%s was replaced by another worker of the same id", self._path)
        return True

    def remove(self) -> None:
        try:
            if self._descriptor is not None and _is_current(self._path, self._descriptor):
                self._path.unlink(missing_ok=True)
        finally:
            self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class _Host(msgspec.Struct):
    host: str = ""


class Scanner:
    """Reads the live entries of a folder. Remembers when it saw each file touched last."""

    def __init__(self, folder: Path, ttl_s: float, host: str) -> None:
        self._folder = folder
        self._ttl_s = ttl_s
        self._host = host
        # name -> time of the last touch, and when that was on our monotonic clock
        self._touched: dict[str, tuple[int, float]] = {}
        self._unreadable: set[str] = set()  # each is logged once

    def scan(self, prefix: str) -> dict[str, bytes]:
        """Key and payload of each live entry below ``prefix``; raises OSError for the folder as a whole."""
        with os.scandir(self._folder) as files:
            names = [each.name for each in files if each.name.endswith(SUFFIX) and each.name[0] != "."]
        self._touched = {name: self._touched[name] for name in names if name in self._touched}
        content = {}
        for name in names:
            if key_of(name).startswith(prefix) and (payload := self._read(name)) is not None:
                content[key_of(name)] = payload
        return content

    def _read(self, name: str) -> bytes | None:
        """The payload of a live entry, None of a dead one or of one that went meanwhile."""
        path = self._folder / name
        try:
            for _ in range(5):  # a file that is replaced while we read it is read again
                descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                try:
                    payload = os.read(descriptor, MAX_ENTRY_BYTES + 1)
                    if not self._is_fresh(name, os.fstat(descriptor).st_mtime_ns):
                        return None
                    if not (self._is_local(payload) and _lock(descriptor, fcntl.LOCK_SH)):
                        return payload
                    if _is_current(path, descriptor):
                        return None
                finally:
                    os.close(descriptor)
        except FileNotFoundError:
            return None
        except OSError as error:
            if name not in self._unreadable:
                logger.warning("registry entry left out: %s: %s", path, error.strerror)
            self._unreadable.add(name)
        return None

    def _is_fresh(self, name: str, mtime_ns: int) -> bool:
        now = time.monotonic()
        touch = self._touched.get(name)
        if touch is None or touch[0] != mtime_ns:
            age_s = max(0.0, (time.time_ns() - mtime_ns) / 1e9)
            touch = self._touched[name] = (mtime_ns, now - age_s)
        return now - touch[1] <= self._ttl_s

    def _is_local(self, payload: bytes) -> bool:
        try:
            return msgspec.json.decode(payload, type=_Host).host == self._host
        except (msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError):
            return False


def _is_current(path: Path, descriptor: int) -> bool:
    """Whether ``path`` still names the open file and not another one in its place."""
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return True  # removed by its writer, which is as dead


def sweep(folder: Path, age_s: float) -> None:
    """Delete the files of writers that died more than ``age_s`` seconds ago."""
    with os.scandir(folder) as files:
        for each in files:
            if not each.name.endswith((SUFFIX, ".tmp")):
                continue
            with contextlib.suppress(OSError):
                if time.time() - each.stat().st_mtime > age_s:
                    os.unlink(each.path)
