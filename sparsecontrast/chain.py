"""Rows that vouch for each other, and the witness that lies beside them.

Each row holds the SHA-256 of the one before, so that a row changed, dropped or put elsewhere breaks every
later one. A chain cannot tell that its end is missing: for that the head, a small file of its own, says how
many rows there were at least, and what the last of them was. Who may write both can forge both, and a disk
put back as a whole looks like the past; ``sparsecontrast budget`` prints the head, to be noted elsewhere.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsecontrast.durable import write_bytes
from sparsecontrast.errors import LedgerError, StorageError

START = "0" * 64  # what the first row holds as the hash of the one before


@dataclass(frozen=True)
class Row:
    """One row of the chain.

    Attributes:
        number: 1, 2, ...
        previous: hash of the row before.
        kind: ledger, cohort, charge or adopted; of a log of releases hello, train or torn.
        body: canonical JSON.
        hash: of all the others.
    """

    number: int
    previous: str
    kind: str
    body: str
    hash: str

    @property
    def content(self) -> dict[str, Any]:
        """The body, read."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Head:
    """The witness: ``ledger`` had at least ``count`` rows, the last with ``hash``, in file ``inode``."""

    ledger: str
    count: int
    hash: str
    inode: int


def next_row(rows: Sequence[Row], kind: str, content: Mapping[str, Any]) -> Row:
    """Make the row that follows; the last of ``rows`` is enough."""
    body = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    previous = rows[-1].hash if rows else START
    number = rows[-1].number + 1 if rows else 1
    return Row(number, previous, kind, body, _digest(number, previous, kind, body))


def check_chain(rows: Sequence[Row], where: object) -> None:
    """Recompute every hash.

    Raises:
        LedgerError: names the first row that is not as it was written.
    """
    if (number := first_broken(rows)) is not None:
        raise LedgerError(
            f"{where}: row {number} is broken: it, or one before it, was changed, dropped or moved. "
            "Nothing is charged on a ledger that cannot be trusted; restore it as it last was"
        )


def first_broken(rows: Sequence[Row]) -> int | None:
    """Return the number of the first row that is not as it was written; None where all are."""
    previous = START
    for number, row in enumerate(rows, 1):
        right = (number, previous, _digest(number, previous, row.kind, row.body))
        if (row.number, row.previous, row.hash) != right:
            return number
        previous = row.hash
    return None


def check_head(rows: Sequence[Row], head: Head, where: object) -> None:
    """Hold the rows to what the witness saw.

    Raises:
        LedgerError: rows are missing at the end, or others stand there.
    """
    if len(rows) < head.count:
        raise LedgerError(
            f"{where}: {len(rows)} rows, but there were {head.count}: the ledger was rolled back or "
            "restored from an old copy, and what was spent since is not in it. Restore the newest one"
        )
    if rows[head.count - 1].hash != head.hash or rows[0].content["ledger"] != head.ledger:
        raise LedgerError(
            f"{where}: row {head.count} is not the one that was written: another ledger was put in its "
            "place, or its rows were made anew. Restore the one that belongs to the head file"
        )


def read_head(path: Path) -> Head | None:
    """Read the witness; None when it is not there.

    Raises:
        LedgerError: it is torn; it is replaced whole, so something else has written there.
    """
    try:
        told = json.loads(path.read_bytes())
        return Head(str(told["ledger"]), int(told["count"]), str(told["hash"]), int(told["inode"]))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LedgerError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"{path}: damaged; restore it, it proves that the ledger is whole") from error


def write_head(path: Path, head: Head) -> None:
    """Replace the witness, durably.

    Raises:
        StorageError: the disk does not take it; the former one is intact, and what was charged stays so.
    """
    try:
        write_bytes(path, json.dumps(asdict(head)).encode() + b"\n")
    except StorageError as error:
        raise StorageError(
            f"cannot write {path}: {error.__cause__}; the round stays charged but must not be run. "
            "Free some space and run it again"
        ) from error


def _digest(number: int, previous: str, kind: str, body: str) -> str:
    return hashlib.sha256(f"{number}\n{previous}\n{kind}\n{body}".encode()).hexdigest()
