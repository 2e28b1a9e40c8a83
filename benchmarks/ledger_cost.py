"""``python -m benchmarks.ledger_cost``: what a reservation costs after 1,000 rounds of history.

The history is put there in one transaction, row by row as ``reserve`` writes them. ``fresh`` is the first
reservation of a process that has never composed anything (the accountant is imported already), ``next`` the
median of the following ones. A kind is a pair of noise multiplier and sample rate: a run has one, so a
cohort has as many as it has had plans.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.ledger_crashes import workers
from benchmarks.record import print_table, write_result
from sparsecontrast.accounting import Charge
from sparsecontrast.cohorts import Cohort, cohort_of
from sparsecontrast.ledger import Ledger
from sparsecontrast.policy import Policy

POLICY = Policy(900.0, None, 1.0, 4)
NEXT = 5


def measure(rounds: int, kinds: int, patients: int, folder: Path) -> dict[str, float]:
    """Write a history of ``rounds``, then time reservations in a fresh process."""
    cohort = cohort_of((f"patient {i}" for i in range(patients)), b"k" * 32)
    _write_history(Ledger(folder), cohort, kinds, rounds)
    queue = workers().SimpleQueue()
    process = workers().Process(target=_reserve, args=(folder, cohort, kinds, rounds, queue))
    process.start()
    seconds = queue.get()
    process.join()
    return {
        "rounds": rounds, "kinds": kinds, "patients": patients,
        "fresh_seconds": round(seconds[0], 3), "next_seconds": round(statistics.median(seconds[1:]), 3),
    }  # fmt: skip


def _charge(number: int, kinds: int, rounds: int) -> Charge:
    """Plans follow each other; the last goes on."""
    return Charge(1 + min((number - 1) * kinds // rounds, kinds - 1) / 32, 0.02, 10)


def _write_history(ledger: Ledger, cohort: Cohort, kinds: int, rounds: int) -> None:
    ledger.reserve("run", 1, cohort, POLICY, _charge(1, kinds, rounds))
    rows = list(ledger.read().rows)
    first = rows[-1].content
    with ledger.database.transaction() as db:
        for number in range(2, rounds + 1):
            content = first | {"round": number, **asdict(_charge(number, kinds, rounds))}
            rows.append(ledger._append(db, rows, "charge", content))
    ledger._witness()


def _reserve(
    folder: Path, cohort: Cohort, kinds: int, rounds: int, queue: "multiprocessing.SimpleQueue[list[float]]"
) -> None:
    ledger, seconds = Ledger(folder), []
    for number in range(rounds + 1, rounds + NEXT + 2):
        started = time.perf_counter()
        ledger.reserve("run", number, cohort, POLICY, _charge(number, kinds, rounds))
        seconds.append(time.perf_counter() - started)
    queue.put(seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=1000, help="of history; default 1000")
    parser.add_argument("--quick", action="store_true", help="20 rounds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    rounds, rows = 20 if options.quick else options.rounds, []
    for kinds, patients in ((1, 1000), (10, 1000), (25, 1000), (1, 100_000)):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(rounds, kinds, patients, Path(folder)))
    print_table("a reservation", rows)
    if options.json:
        write_result("ledger_cost", f"python -m benchmarks.ledger_cost --rounds {rounds}", rows, options.json)


if __name__ == "__main__":
    main()
