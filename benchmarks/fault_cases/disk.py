"""A disk that is full from the n-th write on, for the files below one folder, in this process.

A file opened for writing becomes ``/dev/full``, so that it is the kernel who says that there is no space; a
flush to the disk or a rename fails with the same error, raised here.
"""

import builtins
import contextlib
import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Disk:
    """Counts what is written below a folder, and from a number on writes nothing more.

    Args:
        folder: whose writes count.
        full_from: number of the first write that fails, from 1; 0 for none.
    """

    def __init__(self, folder: Path, full_from: int = 0):
        self.folder, self.full_from = str(folder), full_from
        self.writes: list[str] = []
        self._real = (builtins.open, os.replace, os.fsync)

    def full(self, kind: str, where: Any) -> bool:
        """Count a write; whether there is no room for it."""
        if not str(where).startswith(self.folder):
            return False
        self.writes.append(f"{kind} {Path(str(where)).name}")
        return 0 < self.full_from <= len(self.writes)

    @contextlib.contextmanager
    def used(self) -> Iterator["Disk"]:
        """Put it in place of the real one within the block."""
        before = (builtins.open, io.open, os.replace, os.fsync)
        builtins.open = io.open = self._open  # type: ignore[assignment]
        os.replace, os.fsync = self._replace, self._fsync
        try:
            yield self
        finally:
            builtins.open, io.open, os.replace, os.fsync = before

    def _open(self, file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        real = self._real[0]
        writing = isinstance(file, str | os.PathLike) and set(mode) & set("wax+")
        if writing and self.full("write", os.fspath(file)):
            more.pop("opener", None)
            return real("/dev/full", mode.replace("+", ""), *rest, **more)
        return real(file, mode, *rest, **more)

    def _replace(self, source: Any, target: Any) -> None:
        if self.full("rename", os.fspath(target)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._real[1](source, target)

    def _fsync(self, handle: int) -> None:
        where = os.readlink(f"/proc/self/fd/{handle}")
        if self.full("flush", where):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if where != "/dev/full":  # which takes no flush, and of an empty file nothing is to be flushed
            self._real[2](handle)
