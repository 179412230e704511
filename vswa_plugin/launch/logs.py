"""The log of one child process: bounded while the child writes to it, and read from its end only.

A child writes to a descriptor of NAME.log that it has inherited, opened for appending, and it cannot be given
another file. So the file stays and loses its beginning: the bytes are first copied to NAME.log.1, then the
file system takes them out of NAME.log by one call. That is fallocate(2), which collapses the range, or, on a
file system that cannot, punches a hole: the space is free, and what is read there is zeros. Appended lines go
to the end whatever happens to the beginning, so none is lost and the child never waits for us.

The other ways were worse. To copy and then truncate loses what is written in between. A pipe makes a child
wait for its reader, and ends it when the reader has died: a child must outlive its launcher. A process
that only reads pipes would be one more thing to keep alive per child.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import threading
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)

#: How much of a log's end is read.
TAIL_BYTES = 64 << 10
#: How large the log of a child may grow by default.
LOG_BYTES = 64 << 20
_COPIED_AT_ONCE = 1 << 20
#: Modes of fallocate(2).
_COLLAPSE, _PUNCH = 0x08, 0x02 | 0x01
_CANNOT = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV)


class ChildLog:
    """``path``, to which one process after the other appends, and ``path``.1 with what came before.

    Both together are everything but what an earlier ``path``.1 held. :meth:`rotate` may run in a thread; the
    other methods wait for it no longer than one system call takes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.older = path.with_name(f"{path.name}.1")
        self._life_begins = 0
        #: Bytes at the beginning that are there no more, though the file's size counts them.
        self._freed = 0
        self._lock = threading.Lock()
        self._stuck = False
        self._warned = False

    def begin_life(self) -> BinaryIO:
        """The file, opened for a process that is about to start; :meth:`tail` reads what that writes."""
        log = self.path.open("ab")
        with self._lock:
            self._life_begins = log.tell()
            self._freed = _first_data(log.fileno())
        return log

    def tail(self, at_most: int = TAIL_BYTES) -> str:
        """The end of what the present process has written."""
        with self._lock, self.path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._life_begins, self._freed, size - at_most))
            return log.read(at_most).decode("utf-8", "replace")

    def rotate(self, most_bytes: int) -> bool:
        """Where the log is larger than ``most_bytes``, make what it holds the older log.

        Blocks while files are copied; never raises. Between two calls the log may grow beyond the bound.

        :returns: whether it has been done.
        """
        try:
            return not self._stuck and self._rotate(most_bytes)
        except OSError as error:
            if not self._warned:
                self._warned = True
                logger.warning("%s: expected to bound it to %d bytes, got %s", self.path, most_bytes, error)
            return False

    def _rotate(self, most_bytes: int) -> bool:
        with self.path.open("r+b", buffering=0) as log:
            size = os.fstat(log.fileno()).st_size
            if size - self._freed <= most_bytes:
                return False
            # Whole blocks of the file system, and not the last byte: no range may reach the end of the file.
            block = os.fstatvfs(log.fileno()).f_bsize
            cut = (size - 1) // block * block
            if cut <= self._freed:
                return False
            copy = self.older.with_name(f"{self.older.name}.part")
            try:
                _copy(log.fileno(), self._freed, cut, copy)
                if not self._free(log.fileno(), cut):
                    self._stuck = True
                    logger.warning(
                        "%s: the file system cannot shorten a file from its beginning, so this log grows "
                        "without bound; keep logs on ext4, xfs, btrfs or tmpfs",
                        self.path,
                    )
                    return False
                copy.replace(self.older)
                return True
            finally:
                copy.unlink(missing_ok=True)

    def _free(self, log: int, cut: int) -> bool:
        """Take out what lies before ``cut``; returns whether the file system can."""
        with self._lock:
            # Behind a hole that an earlier call has left, only holes are possible.
            if not self._freed and _fallocate(log, _COLLAPSE, 0, cut):
                self._life_begins = max(0, self._life_begins - cut)
                return True
            if _fallocate(log, _PUNCH, self._freed, cut - self._freed):
                self._freed = cut
                return True
            return False


def _first_data(log: int) -> int:
    """Where the hole ends that an earlier launcher has left."""
    try:
        return os.lseek(log, 0, os.SEEK_DATA)
    except OSError:  # nothing but a hole, an empty file, or a file system that cannot tell
        return 0


def _copy(source: int, begin: int, end: int, target: Path) -> None:
    with target.open("wb", buffering=0) as copy:
        while begin < end:
            piece = os.pread(source, min(_COPIED_AT_ONCE, end - begin), begin)
            if not piece:
                raise OSError(errno.EIO, f"expected {end - begin} more bytes, got the end of the file")
            view = memoryview(piece)
            while view:
                view = view[copy.write(view) :]
            begin += len(piece)


def _fallocate(file: int, mode: int, offset: int, length: int) -> bool:
    """fallocate(2), which Python has without modes only. False where system or file system has no such mode.

    :raises OSError: it has, and failed.
    """
    library = ctypes.CDLL(None, use_errno=True)
    call = getattr(library, "fallocate64", None) or getattr(library, "fallocate", None)
    if call is None:
        return False
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    while call(file, mode, offset, length):
        code = ctypes.get_errno()
        if code in _CANNOT:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True
