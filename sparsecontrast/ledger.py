"""The durable privacy budget of a site: charged first, on disk, and only then may noise be drawn.

``reserve`` charges a whole round in one transaction and returns when it has survived a power cut. What was
charged is never given back: a round that crashed may have drawn its noise and sent its weights, so the same
round of the same run, reserved again, is another attempt and is charged again. There is no idempotency by
name, and therefore none to be abused. ``cohorts.py`` says whom a charge burdens, ``policy.py`` what can no
longer change, ``chain.py`` what proves that nothing was taken away.

Not seen: ledger and head deleted together, and a machine put back as a whole; against these helps only a
head noted elsewhere (``sparsecontrast budget --verify``, ``--noted``). Nor another ``site.state_dir`` over
the same images: it holds a ledger with a budget of its own, and which folder counts is the site's word.
SQLite's write-ahead log needs a local disk; on a network share its locks may not hold.
"""

import os
import secrets
import sqlite3
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparsecontrast.accounting import Charge
from sparsecontrast.book import Book, read_book
from sparsecontrast.chain import Head, Row, check_chain, check_head, next_row, read_head, write_head
from sparsecontrast.cohorts import Cohort
from sparsecontrast.database import Database
from sparsecontrast.errors import ConfigError, LedgerError
from sparsecontrast.policy import Policy
from sparsecontrast.settings import Config

FILE = "ledger.sqlite"
HEAD = "ledger.head.json"
INSECURE = "insecure"  # folder of the ledger of runs whose noise can be repeated
TABLES = (
    "CREATE TABLE IF NOT EXISTS chain (number INTEGER PRIMARY KEY, previous TEXT NOT NULL, "
    "kind TEXT NOT NULL, body TEXT NOT NULL, hash TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS members (cohort TEXT PRIMARY KEY, digests BLOB NOT NULL)",
)


@dataclass(frozen=True)
class Receipt:
    """What a reservation allows: exactly these steps of this round, once.

    Attributes:
        row: of the chain.
        hash: of that row; noted elsewhere, it proves later that the ledger was not rolled back past it.
        attempt: how often this round of this run was reserved, this time included.
        policy: with its delta.
        charge: the steps.
        epsilon: of the cohort's worst patient, this round included.
    """

    row: int
    hash: str
    attempt: int
    policy: Policy
    charge: Charge
    epsilon: float


class Ledger:
    """The ledger in a site's folder of durable state; made at the first reservation.

    Every call opens the database anew, checks it whole and closes it again: processes may come and go,
    and a worker that was forked shares nothing.

    Args:
        folder: of the site, not of a run: a budget belongs to patients, and they outlive runs.
    """

    def __init__(self, folder: Path):
        self.path, self.head = Path(folder) / FILE, Path(folder) / HEAD
        self.database = Database(self.path)

    def reserve(self, run: str, round_number: int, cohort: Cohort, policy: Policy, charge: Charge) -> Receipt:
        """Charge a whole round, durably; only after it has returned may noise be drawn.

        Args:
            run: for people to recognise it; the account is the patients'.
            round_number: 1-based.
            cohort: all patients who may be sampled.
            policy: as configured.
            charge: all noisy steps of the round, also the empty ones.

        Raises:
            BudgetSpentError: a patient would exceed the promised epsilon; nothing was charged.
            PolicyError: not what was agreed with these patients.
            LedgerError: the ledger cannot be trusted, or is of another key of pseudonyms.
            StorageError: the disk does not take it. It may have been charged, but must not be run.
            ConfigError: no such round.
        """
        if not (0 < len(run) <= 200 and round_number >= 1):
            raise ConfigError(f"run {run[:20]!r}, round {round_number}: needs a name and a number from 1")
        self._begin_if_new(cohort.key_check)
        with self.database.transaction() as db:
            book = self._read(db)
            self._check_key(book, cohort)
            policy = book.settled(cohort, policy)
            epsilon = book.after(cohort, policy, charge)
            rows, attempt = list(book.rows), book.attempt(run, round_number)
            if cohort.fingerprint not in book.members:
                rows.append(self._add_cohort(db, rows, cohort, policy))
            content = {
                "run": run, "round": round_number, "attempt": attempt, "cohort": cohort.fingerprint,
                **asdict(charge), "epsilon": epsilon, "delta": policy.delta, "time": _now(),
            }  # fmt: skip
            row = self._append(db, rows, "charge", content)
        self._witness()
        return Receipt(row.number, row.hash, attempt, policy, charge, epsilon)

    def plan(self, run: str, cohort: Cohort, policy: Policy, sample_rate: float, steps: int) -> float:
        """Return the sigma for a run: its own if it goes on, else the least with which its plan fits.

        Args:
            run: as in ``reserve``.
            cohort: as in ``reserve``.
            policy: as configured.
            sample_rate: q.
            steps: noisy steps of all planned rounds together.

        Raises:
            BudgetSpentError: the plan does not fit, whatever the noise.
            PolicyError, LedgerError, StorageError: as in ``reserve``.
        """
        head = read_head(self.head)
        if head is None and not self.path.exists():
            book = Book((), {}, {}, ())
        else:
            self._begin_if_new(cohort.key_check)
            book = self.read()
            self._check_key(book, cohort)
        return book.noise_multiplier(run, cohort, book.settled(cohort, policy), sample_rate, steps)

    def read(self) -> Book:
        """Read the ledger and check it whole.

        Raises:
            LedgerError: there is none, or it cannot be trusted.
        """
        head = read_head(self.head)  # before the rows: they may only become more
        if not self.path.exists():
            self._refuse_missing(head)
            raise LedgerError(f"{self.path}: no ledger; it is made by the first private round")
        with self.database.connected() as db:
            return self._read(db, head)

    def verify(self) -> Head:
        """Prove pages, chain, patients and head; returns the head, to be noted elsewhere.

        Raises:
            LedgerError: names the first row that is broken, or says what is missing.
        """
        book = self.read()
        with self.database.connected() as db:
            if (found := db.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
                raise LedgerError(f"{self.path}: damaged pages ({found}); restore it as it last was")
        return self._head(book.rows)

    def adopt(self, reason: str) -> None:
        """Accept that the database is another file than it was; the reason is kept in the chain for ever.

        For a ledger that was moved to a new disk or restored from its newest backup. Two copies in use
        would each spend the whole budget: whoever calls this vouches that the other is gone.

        Raises:
            LedgerError: rows are missing or changed: that cannot be adopted.
            ConfigError: no reason.
        """
        if not reason.strip():
            raise ConfigError("--adopt: say why, such as 'moved to new server, old disk destroyed'")
        if not self.path.exists():
            self.read()
        with self.database.transaction() as db:
            book = self._read(db, adopting=True)
            self._append(db, book.rows, "adopted", {"reason": reason[:500], "time": _now()})
        self._witness(adopting=True)

    def _begin_if_new(self, key_check: str) -> None:
        """Make the ledger and its head before the first charge: from then on either can miss the other."""
        head = read_head(self.head)
        if head is not None and self.path.exists():
            return
        self._refuse_missing(head)
        self.database.create()
        with self.database.transaction() as db:
            for table in TABLES:
                db.execute(table)
            rows = self._rows(db)
            if len(rows) > 1:  # another process was faster, or the head was taken away
                if read_head(self.head) is None:
                    raise LedgerError(f"{self.head}: missing, but {len(rows)} rows were written; restore it")
            elif not rows:
                content = {"ledger": secrets.token_hex(16), "key_check": key_check, "time": _now()}
                self._append(db, (), "ledger", content)
        self._witness(new=True)

    def _refuse_missing(self, head: Head | None) -> None:
        if head is not None and head.count > 1 and not self.path.exists():
            raise LedgerError(
                f"{self.path}: missing, but it had {head.count} rows: what was spent is not known, so "
                f"nothing more may be. Restore it from a backup; {self.head.name} tells if it is the newest"
            )

    def _read(self, db: sqlite3.Connection, head: Head | None = None, adopting: bool = False) -> Book:
        head = head or read_head(self.head)
        rows = self._rows(db)
        check_chain(rows, self.path)
        if head is None or not rows:
            raise LedgerError(f"{self.head if head is None else self.path}: missing or empty; restore it")
        check_head(rows, head, self.path)
        if not adopting and head.inode != self._inode():
            raise LedgerError(
                f"{self.path}: is a copy of the ledger, not the file that was written: the original could "
                "spend the same budget again. Go on with the original; if it is gone for good, "
                "`sparsecontrast budget FOLDER --adopt REASON`"
            )
        members = {name: bytes(blob) for name, blob in db.execute("SELECT cohort, digests FROM members")}
        return read_book(rows, members, self.path)

    def _rows(self, db: sqlite3.Connection) -> list[Row]:
        found = db.execute("SELECT number, previous, kind, body, hash FROM chain ORDER BY number")
        return [Row(*row) for row in found]

    def _check_key(self, book: Book, cohort: Cohort) -> None:
        if book.rows[0].content["key_check"] != cohort.key_check:
            raise LedgerError(
                f"{self.path}: was made with another key of pseudonyms, so no patient would be recognised "
                "and all would begin anew; restore the site's pseudonym.key"
            )

    def _add_cohort(self, db: sqlite3.Connection, rows: list[Row], cohort: Cohort, policy: Policy) -> Row:
        members = (cohort.fingerprint, b"".join(cohort.digests))
        db.execute("INSERT INTO members VALUES (?, ?)", members)
        content = {"cohort": cohort.fingerprint, "patients": len(cohort.digests), "policy": asdict(policy),
                   "time": _now()}  # fmt: skip
        return self._append(db, rows, "cohort", content)

    def _append(self, db: sqlite3.Connection, rows: Any, kind: str, content: dict[str, Any]) -> Row:
        row = next_row(rows, kind, content)
        db.execute("INSERT INTO chain VALUES (?, ?, ?, ?, ?)", tuple(asdict(row).values()))
        return row

    def _witness(self, new: bool = False, adopting: bool = False) -> None:
        """Write the head under the database's lock, so that it never goes back.

        A crash before it leaves a head that is behind: rows it does not know were charged and not run.
        """
        with self.database.transaction() as db:
            rows, head = self._rows(db), read_head(self.head)
            if new and head is not None and head.count > 1:
                return  # another process began it, and has charged since
            if head is None or adopting or len(rows) > head.count or new:
                write_head(self.head, self._head(rows))

    def _head(self, rows: Any) -> Head:
        return Head(rows[0].content["ledger"], len(rows), rows[-1].hash, self._inode())

    def _inode(self) -> int:
        """The file's number: kept when it is renamed, another for every copy."""
        return os.stat(self.path).st_ino


def ledger_of(config: Config, state_dir: Path) -> Ledger:
    """Return the ledger in a site's folder of durable state.

    A run with an insecure seed protects nobody: it has a ledger apart, and neither burdens nor refutes the
    one that says what patients were promised.

    Raises:
        ConfigError: that folder is a run's own, though the patients are real: each new ``output_dir``
            would begin with a whole budget.
    """
    if config.privacy.insecure_seed is not None:
        return Ledger(state_dir / INSECURE)
    if config.site.state_dir is None and config.data.kind != "phantom":
        raise ConfigError(
            "site.state_dir=null: a privacy budget belongs to patients, but this folder to one run, and the "
            "next would begin at zero; set site.state_dir to a folder that stays"
        )
    return Ledger(state_dir)


def _now() -> str:
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds")
