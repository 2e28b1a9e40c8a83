"""One SQLite file, durably: opened for each use, written ahead, waited for at every commit."""

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from sparsecontrast.durable import sync_folder
from sparsecontrast.errors import LedgerError, StorageError

WAIT = 120.0  # seconds for another process's transaction, which takes less than one


class Database:
    """A file that a transaction changes as a whole or not at all.

    Args:
        path: of the file; only ``create`` makes it.
    """

    def __init__(self, path: Path):
        self.path = path

    def create(self) -> None:
        """Make an empty file, readable by its owner alone, unless it is there.

        Raises:
            StorageError: the folder does not take it.
        """
        with _told(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch(mode=0o600)
            sync_folder(self.path.parent)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Hold the one write lock; commit at the end, or leave everything as it was.

        Raises:
            StorageError: the disk does not take it, or others held the lock for ``WAIT`` seconds.
            LedgerError: the file is damaged.
        """
        with self.connected() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                self.commit(db)
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def commit(self, db: sqlite3.Connection) -> None:
        """Return when what was written survives a power cut."""
        db.execute("COMMIT")

    @contextlib.contextmanager
    def connected(self) -> Iterator[sqlite3.Connection]:
        """Open the file for reading, or for a transaction, and close it.

        Raises:
            StorageError, LedgerError: as for a transaction.
        """
        with _told(self.path):
            uri = f"{self.path.absolute().as_uri()}?mode=rw"  # never makes a file
            db = sqlite3.connect(uri, uri=True, timeout=WAIT, isolation_level=None)
            try:
                # text that somebody broke is to be read, and then found broken
                db.text_factory = lambda data: data.decode(errors="replace")
                _write_ahead(db)
                db.execute("PRAGMA synchronous=FULL")
                yield db
            finally:
                db.close()


def _write_ahead(db: sqlite3.Connection) -> None:
    """Ask for a write-ahead log; the change of mode, unlike all else, does not wait for a lock by itself."""
    until = time.monotonic() + WAIT
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.01)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Tell a disk that does not take a row from a file that is no database any more."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            raise LedgerError(f"{path}: no ledger any more ({error}); restore it as it last was") from error
        raise StorageError(
            f"{path}: {error}; nothing may be run on it. Free some space or wait for the other process"
        ) from error
    except sqlite3.DatabaseError as error:
        raise LedgerError(f"{path}: damaged ({error}); restore it as it last was") from error
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}") from error
