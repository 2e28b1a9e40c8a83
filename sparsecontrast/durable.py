"""Files that are whole or not there, whatever is killed or full."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sparsecontrast.errors import StorageError


def write_bytes(path: Path, data: bytes | bytearray, mode: int = 0o666) -> None:
    """Replace ``path`` by ``data``, or leave it as it was.

    Args:
        path: of the file.
        data: all of it.
        mode: of the file from its first byte on, less the umask; 0o600 keeps others out.

    Raises:
        StorageError: the disk is full, or the folder cannot be written; the old file is intact.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(scratch, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}. The previous file, if any, is intact; "
            "free some space or choose another output_dir, then continue with resume="
        ) from error


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a scratch folder that becomes ``path`` when the block ends; after an error neither is there.

    Raises:
        StorageError: ``path`` is there and not empty, or the disk does not take it.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists() and not (path.is_dir() and next(path.iterdir(), None) is None):
            raise StorageError(f"{path}: is already there and not empty; choose another folder or remove it")
        scratch.mkdir(parents=True)
        yield scratch
        for inner in (*scratch.rglob("*"), scratch):
            sync_folder(inner)
        os.replace(scratch, path)
        sync_folder(path.parent)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; nothing was left there"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut; a file is flushed the same way."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
