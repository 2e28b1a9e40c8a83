"""Files that are whole or not there, whatever is killed or full."""

import contextlib
import os
from pathlib import Path

from sparsecontrast.errors import StorageError


def write_bytes(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``, or leave it as it was.

    Raises:
        StorageError: the disk is full, or the folder cannot be written; the old file is intact.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(scratch, "wb") as file:
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


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
