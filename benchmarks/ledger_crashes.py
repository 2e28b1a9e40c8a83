"""``python -m benchmarks.ledger_crashes``: kill -9 at every point of a reservation, and at any.

A site's processes reserve rounds and say, in a file of their own, when they release something noisy; they
are killed, restarted and raced until the budget is spent, then a new site begins. After each crash the
ledger must verify, hold a charge of its own for everything that was released, and stay within its target.
A killed process leaves the machine running: what a power cut does to a disk that lies about ``fsync`` is not
shown here.
"""

import argparse
import multiprocessing
import multiprocessing.context
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.record import print_table, write_result
from sparsecontrast.accounting import Charge, epsilon
from sparsecontrast.cohorts import cohort_of
from sparsecontrast.database import Database
from sparsecontrast.errors import BudgetSpentError, LedgerError
from sparsecontrast.ledger import Ledger
from sparsecontrast.policy import Policy

CHARGE = Charge(4.0, 1.0, 1)  # cheap to compose: this asks about crashes, not about accounting
ROUNDS = 12  # that fit into the budget
DELTA = 1e-3
COHORT = cohort_of((f"patient {i}" for i in range(50)), b"k" * 32)
RELEASED = "released"
SPENT = 3  # exit status of a process that was refused
POINTS = (
    "before reserve", "inserted", "before commit", "after commit", "head half written", "before noise",
    "mid round", "any time", "race of two", "race of three",
)  # fmt: skip


class Faulty(Ledger):
    """A ledger whose process dies at a named point, the ``after``-th time it comes there."""

    def __init__(self, folder: Path, point: str, after: int):
        super().__init__(folder)
        self.point, self.after = point, after
        self.database.commit = self.commit

    def reach(self, point: str) -> None:
        """Die here, if it is time."""
        if point == self.point:
            self.after -= 1
            if self.after <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def _append(self, db: Any, rows: Any, kind: str, content: dict[str, Any]) -> Any:
        row = super()._append(db, rows, kind, content)
        self.reach("inserted")
        return row

    def commit(self, db: Any) -> None:
        """Commit, and die before or after."""
        self.reach("before commit")
        Database.commit(self.database, db)
        self.reach("after commit")


def workers() -> multiprocessing.context.ForkServerContext:
    """Processes forked from one that has imported everything: a crash then costs a fraction of a second."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "dp_accounting.pld.privacy_loss_distribution"])
    return context


def train(folder: Path, run: str, point: str, after: int, target: float) -> None:
    """Reserve and release rounds until killed or refused; every attempt begins at round 1 again."""
    ledger = Faulty(folder, point, after)
    _die_before_rename(ledger)
    for number in range(1, 1000):
        ledger.reach("before reserve")
        try:
            receipt = ledger.reserve(run, number, COHORT, Policy(target, DELTA, 1.0, 4), CHARGE)
        except BudgetSpentError:
            sys.exit(SPENT)
        ledger.reach("before noise")
        with open(folder / RELEASED, "a") as file:
            file.write(f"{receipt.row} {receipt.hash} {run} {number}\n")
            file.flush()
            os.fsync(file.fileno())
        ledger.reach("mid round")


def violations(folder: Path, target: float) -> list[str]:
    """Say what was released without a charge of its own, or charged beyond the target."""
    file = folder / RELEASED
    released = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
    try:
        Ledger(folder).verify()
        book = Ledger(folder).read()
    except LedgerError as error:
        unborn = "no ledger" in str(error) or "missing or empty" in str(error)
        return [] if unborn and not released else [str(error)]
    charged = {(str(e.row), book.rows[e.row - 1].hash, e.run, str(e.round)) for e in book.entries}
    found = [f"{line} was never charged" for line in released if tuple(line) not in charged]
    found += ["one charge, two releases"] * (len(released) - len({line[0] for line in released}))
    if book.epsilon(COHORT.digests, DELTA) > target:
        found.append("charged beyond the target")
    if released and epsilon([CHARGE] * len(released), DELTA) > target:
        found.append("released beyond the target")
    return found


def crash(point: str, wanted: int, folder: Path, seed: int) -> dict[str, Any]:
    """Injure sites at one point until ``wanted`` processes were killed."""
    draw, target = random.Random(f"{point} {seed}"), epsilon([CHARGE] * ROUNDS, DELTA) + 1e-6
    row: dict[str, Any] = {"fault": point, "crashes": 0, "held": 0, "sites": 0, "charged": 0, "released": 0,
                           "refused": 0}  # fmt: skip
    site = folder / "0"
    while row["crashes"] < wanted:
        site.mkdir(parents=True, exist_ok=True)
        codes = _attempt(point, site, target, draw)
        found = violations(site, target)
        for text in found:
            print(f"VIOLATION, {point}: {text}", file=sys.stderr)
        killed = sum(code == -signal.SIGKILL for code in codes)
        row["crashes"] += killed
        row["held"] += 0 if found else killed
        row["refused"] += sum(code == SPENT for code in codes)
        if unknown := [code for code in codes if code not in (-signal.SIGKILL, SPENT)]:
            raise RuntimeError(f"{point}: a process ended with {unknown}")
        if found or SPENT in codes:
            _count(site, row)
            site = folder / str(row["sites"])
    if site.exists():
        _count(site, row)
    return row


def _attempt(point: str, site: Path, target: float, draw: random.Random) -> list[int]:
    """Start one, two or three processes, kill what is to be killed from outside, and wait."""
    context = workers()
    number = {"race of two": 2, "race of three": 3}.get(point, 1)
    runs: list[BaseProcess] = [
        context.Process(target=train, args=(site, f"run-{i}", point, draw.randint(1, 4), target))
        for i in range(number)
    ]
    for run in runs:
        run.start()
    if point == "any time" or number > 1:
        _until_begun(site, runs)
        for run in runs:
            time.sleep(draw.choice((0.05, 0.3, 1.5)) * draw.random())
            if run.pid is not None and run.is_alive():
                os.kill(run.pid, signal.SIGKILL)
    for run in runs:
        run.join()
    return [run.exitcode or 0 for run in runs]


def _until_begun(site: Path, runs: Sequence[BaseProcess]) -> None:
    """Wait until the database has been touched: a process killed while it is born teaches nothing."""
    file, before = site / "ledger.sqlite-shm", time.monotonic()
    while not file.exists() and any(run.is_alive() for run in runs) and time.monotonic() < before + 60:
        time.sleep(0.001)


def _count(site: Path, row: dict[str, Any]) -> None:
    file = site / RELEASED
    row["sites"] += 1
    row["released"] += len(file.read_text().splitlines()) if file.exists() else 0
    try:
        row["charged"] += len(Ledger(site).read().entries)
    except LedgerError:
        return  # killed before the first charge


def _die_before_rename(ledger: Faulty) -> None:
    replace = os.replace

    def dying(source: Any, target: Any) -> None:
        ledger.reach("head half written")
        replace(source, target)

    os.replace = dying


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the matrix; 0 if nothing was ever released that was not charged."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--crashes", type=int, default=30, help="at each point; default 30")
    parser.add_argument("--quick", action="store_true", help="2 at each point")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    wanted = 2 if options.quick else options.crashes
    with tempfile.TemporaryDirectory() as folder:
        rows = [crash(p, wanted, Path(folder) / p.replace(" ", "_"), options.seed) for p in POINTS]
    total, held = sum(row["crashes"] for row in rows), sum(row["held"] for row in rows)
    print_table("ledger, kill -9", rows)
    print(f"{held} of {total} crashes: never less charged than released")
    if options.json:
        command = f"python -m benchmarks.ledger_crashes --crashes {wanted} --seed {options.seed}"
        write_result("ledger_crashes", command, rows, options.json)
    return int(held < total)


if __name__ == "__main__":
    sys.exit(main())
