"""Verified replies wait on disk: what a round holds in memory does not grow with the number of sites."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np

from server.strategy import Contribution
from sparsecontrast.errors import StorageError


class Spool:
    """A folder for one round's replies, emptied at its start and its end.

    Args:
        folder: its own; what a killed round left there goes.

    Raises:
        StorageError: it cannot be made.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.close()
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise StorageError(f"cannot make {folder}: {error.strerror}") from error

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def keep(self, reply: Contribution) -> Contribution:
        """Write a reply's weights; the one returned reads them whenever it is asked.

        Raises:
            StorageError: the disk is full.
        """
        path = self.folder / f"{len(list(self.folder.iterdir())):04d}.npy"
        return self._write(path, reply, reply.flat)

    def replace(self, reply: Contribution, flat: np.ndarray) -> Contribution:
        """Put other weights [n] in the place of those that a reply of this spool waits with.

        Raises:
            StorageError: the disk is full.
        """
        assert isinstance(reply.source, Path)
        return self._write(reply.source, reply, flat)

    def _write(self, path: Path, reply: Contribution, flat: np.ndarray) -> Contribution:
        try:
            np.save(path, flat)
        except OSError as error:
            raise StorageError(
                f"cannot write {path}: {error.strerror or error}; a round needs room for one model a site. "
                "Free some space, then continue with resume="
            ) from error
        return dataclasses.replace(reply, source=path)

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
