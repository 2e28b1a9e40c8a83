"""The log of all that left a site: written and on disk before the bytes go, each row vouching for the last.

``egress.jsonl`` holds one row for each answer, an error code too: when, to which run and round, the names,
shapes and norms of the tensors, the SHA-256 of their bytes, the scalars told, epsilon so far. No value of a
weight, no path, no patient. A row changed or dropped breaks the chain behind it; rows missing at the end show
against the head, a file of its own, and against the ledger of a private site (``sparsecontrast.witness``).

Not seen without a ledger: log and head deleted together, or the head and all rows but the first; nor anywhere
a folder put back as a whole. Against these helps a row noted elsewhere (``egress verify --noted``).

A crash may tear the last line. What it would have told never left, because the row comes first; the next row
says that there was such a line, and its bytes stay in ``egress.torn``.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparsecontrast.chain import Row, first_broken, next_row
from sparsecontrast.durable import sync_folder, write_bytes
from sparsecontrast.errors import EgressError, StorageError
from sparsecontrast.witness import Witness

FILE = "egress.jsonl"
HEAD = "egress.head.json"
TORN = "egress.torn"


class EgressLog:
    """The log in a site's folder of durable state; processes may write in turn.

    Args:
        folder: made at the first row.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.path, self.head = self.folder / FILE, self.folder / HEAD
        self.witness = Witness(self.folder)

    def append(self, kind: str, content: Mapping[str, Any]) -> Row:
        """Write a row; it has survived a power cut when this returns.

        Args:
            kind: of what leaves.
            content: plain values; the time is added.

        Raises:
            EgressError: the end of the log is not what was written, so nothing may leave.
            StorageError: the disk does not take it; nothing may leave.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked() as file:
                file.seek(0)
                rows, torn = self._checked(file.read())
                if torn:
                    rows.append(self._set_aside(file, rows, torn))
                if rows and not self.head.exists():  # a crash leaves one row without a head, never two
                    self._write_head(rows[-1])
                row = next_row(rows[-1:], kind, {**content, "time": _now()})
                _write(file, row)
                self._write_head(row)
                self.witness.write(row.number, row.hash)
                return row
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written: {error.strerror}; nothing left") from error

    def begun(self) -> bool:
        """Whether anything says that there is, or was, a log."""
        return self.path.exists() or self.head.exists() or self.witness.read() is not None

    def rows(self) -> list[Row]:
        """Read the log and check it whole; a torn last line is left out.

        Raises:
            EgressError: it is missing, or names the first row that is not as it was written.
        """
        if not self.path.exists():
            self._refuse_missing()
            raise EgressError(f"{self.path}: no log; it is made by the first answer of this site")
        return self._checked(self.path.read_bytes())[0]

    def verify(self, noted: str | None = None) -> Row:
        """Prove the log whole, and that it holds a row noted elsewhere as ``ROW:HASH``; returns the last row.

        Raises:
            EgressError: it is not, or does not.
        """
        rows = self.rows()
        if noted is not None:
            number, _, digest = noted.partition(":")
            row = rows[int(number) - 1] if number.isdecimal() and 0 < int(number) <= len(rows) else None
            if row is None or len(digest) < 8 or not row.hash.startswith(digest):
                raise EgressError(f"{self.path}: has no row {noted}: cut off before it, or another log")
        if not rows:
            raise EgressError(f"{self.path}: empty")
        return rows[-1]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[Any]:
        if not self.path.exists():
            self._refuse_missing()
        with open(self.path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            sync_folder(self.folder)
            yield file

    def _refuse_missing(self) -> None:
        for where, seen in ((HEAD, self._read_head()), ("the ledger", self.witness.read())):
            if seen is not None:
                raise EgressError(f"{self.path}: missing, but {where} says that it was there; restore it")

    def _write_head(self, row: Row) -> None:
        write_bytes(self.head, json.dumps({"count": row.number, "hash": row.hash}).encode())

    def _checked(self, data: bytes) -> tuple[list[Row], bytes]:
        """All whole rows, held to the chain, the head and the ledger, and what a crash left behind them."""
        head = self._read_head()
        *lines, torn = data.split(b"\n")
        rows = [self._row(line, number) for number, line in enumerate(lines, 1)]
        if (broken := first_broken(rows)) is not None:
            raise EgressError(
                f"{self.path}: row {broken} is broken: it, or one before it, was changed, dropped or moved. "
                "Nothing leaves until the log is restored as it last was"
            )
        if head is None and len(rows) > 1:
            raise EgressError(f"{self.head}: missing, but {len(rows)} rows were written; restore it")
        for seen in (head, self.witness.read()):
            if seen is not None:
                self._hold(rows, *seen)
        return rows, torn

    def _hold(self, rows: Sequence[Row], count: int, digest: str) -> None:
        if len(rows) < count:
            raise EgressError(f"{self.path}: {len(rows)} rows, but there were {count}: its end was cut off")
        if count < 1 or rows[count - 1].hash != digest:
            raise EgressError(f"{self.path}: row {count} is not the one that was written: made anew")

    def _set_aside(self, file: Any, rows: Sequence[Row], torn: bytes) -> Row:
        with open(self.folder / TORN, "ab") as aside:
            aside.write(torn + b"\n")
            os.fsync(aside.fileno())
        file.truncate(file.seek(0, os.SEEK_END) - len(torn))
        row = next_row(rows, "torn", {"bytes": len(torn), "time": _now()})
        _write(file, row)
        return row

    def _row(self, line: bytes, number: int) -> Row:
        try:
            told = json.loads(line)
            return Row(**{key: told[key] for key in ("number", "previous", "kind", "body", "hash")})
        except (ValueError, KeyError, TypeError) as error:
            raise EgressError(f"{self.path}: row {number} is broken: not a row of this log") from error

    def _read_head(self) -> tuple[int, str] | None:
        """Number and hash of the row that was last when the head was written."""
        try:
            told = json.loads(self.head.read_bytes())
            return int(told["count"]), str(told["hash"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise EgressError(f"{self.head}: damaged; restore it, it proves that the log is whole") from error


def _write(file: Any, row: Row) -> None:
    file.seek(0, os.SEEK_END)
    file.write(json.dumps(asdict(row), sort_keys=True).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _now() -> str:
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds")
