"""A second witness of the log of what left, in the database of the privacy ledger, where a site has one.

Log and head are two files that one command deletes. Who takes the ledger away as well is noticed by the next
private round, whose budget went with it. Without a ledger only a row noted elsewhere tells (``--noted``).
"""

from pathlib import Path

from sparsecontrast.database import Database
from sparsecontrast.errors import LedgerError

LEDGER = "ledger.sqlite"
TABLE = (
    "CREATE TABLE IF NOT EXISTS egress (one INTEGER PRIMARY KEY CHECK (one = 1), "
    "count INTEGER NOT NULL, hash TEXT NOT NULL)"
)


class Witness:
    """What the ledger's database says of the log; it makes no ledger, and trusts no damaged one.

    Args:
        folder: of the site.
    """

    def __init__(self, folder: Path):
        self.database = Database(Path(folder) / LEDGER)

    def read(self) -> tuple[int, str] | None:
        """Number and hash of a row that was written; None where nothing says so.

        Raises:
            StorageError: the disk does not give it.
        """
        if not self.database.path.exists():
            return None
        try:
            with self.database.connected() as db:
                if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'egress'").fetchone():
                    return None
                found = db.execute("SELECT count, hash FROM egress").fetchone()
                return None if found is None else (int(found[0]), str(found[1]))
        except (LedgerError, ValueError):  # the ledger says so itself, wherever it is needed
            return None

    def write(self, count: int, digest: str) -> None:
        """Say durably that a row was written.

        Raises:
            StorageError: the disk does not take it.
        """
        if not self.database.path.exists():
            return
        try:
            with self.database.transaction() as db:
                db.execute(TABLE)
                db.execute("INSERT OR REPLACE INTO egress VALUES (1, ?, ?)", (count, digest))
        except LedgerError:
            return
