"""What ``sparsecontrast budget`` tells: what was spent by whom, what the next round costs, what is left."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsecontrast.accounting import Charge, calibrate, epsilon
from sparsecontrast.book import Book, Entry
from sparsecontrast.errors import LedgerError, MissingDataError, PolicyError
from sparsecontrast.ledger import FILE, HEAD, Ledger
from sparsecontrast.ranges import COUNT, MAX_STEPS, check_range

MANY_ROUNDS = 4096  # left: more are not counted


def find_ledgers(folders: Sequence[Path]) -> list[Ledger]:
    """Find the ledgers of sites: in each folder itself, in its subfolders, or in its ``sites/``.

    Raises:
        MissingDataError: a folder without any.
    """
    found: list[Ledger] = []
    for folder in folders:
        inside = [folder, *sorted(folder.glob("*")), *sorted(folder.glob("sites/*"))]
        own = [Ledger(path) for path in inside if (path / FILE).exists() or (path / HEAD).exists()]
        if not own:
            raise MissingDataError(
                f"{folder}: no {FILE} here, below it or in its sites/; give a site's state_dir. The first "
                "private round makes it"
            )
        found += own
    return found


def statement(ledger: Ledger) -> dict[str, Any]:
    """Read a ledger into plain values.

    Returns:
        ``folder``, ``rows`` and ``hash`` of the head, ``cohorts`` and ``runs``, oldest first; an epsilon
        is always that of a cohort's worst patient.

    Raises:
        LedgerError: it cannot be trusted.
    """
    book = ledger.read()
    charged = [name for name in book.policies if any(e.cohort == name for e in book.entries)]
    pairs = dict.fromkeys((e.run, e.cohort) for e in book.entries)
    return {
        "folder": str(ledger.path.parent),
        "rows": len(book.rows),
        "hash": book.rows[-1].hash,
        "cohorts": [_cohort(book, name) for name in charged],
        "runs": [_run(book, run, name) for run, name in pairs],
        "adopted": [row.content for row in book.rows if row.kind == "adopted"],
    }


def plan(
    target: float, rounds: int, sample_rate: float, steps: int, delta: float, book: Book | None = None
) -> dict[str, Any]:
    """Find the noise with which ``rounds`` of ``steps`` each end within ``target``.

    Args:
        target: epsilon, of what was spent and the plan together.
        rounds: planned.
        sample_rate: q.
        steps: a round.
        delta: of the guarantee; with a book, each cohort's own counts.
        book: whose newest cohort goes on.

    Raises:
        BudgetSpentError: too little is left.
        PolicyError: more than was promised to the patients.
        ConfigError: an impossible number.
    """
    check_range("rounds", rounds, COUNT)
    check_range("--steps", steps, COUNT)
    check_range("rounds x steps", rounds * steps, (1, MAX_STEPS, "[]"))
    check_range("epsilon", target, (0, 1000, "(]"))
    histories: list[tuple[Charge, ...]] = [()]
    cohort = book.entries[-1].cohort if book is not None and book.entries else None
    if book is not None and cohort is not None:
        policy = book.policies[cohort]
        if target > policy.target_epsilon:
            raise PolicyError(f"epsilon {target:g}: {policy.target_epsilon:g} was promised and cannot change")
        delta, histories = policy.delta or delta, book.histories(book.members[cohort])
    sigma = max(calibrate(target, delta, sample_rate, rounds * steps, history) for history in histories)
    spent = max(epsilon(history, delta) for history in histories)
    after = max(epsilon((*h, Charge(sigma, sample_rate, rounds * steps)), delta) for h in histories)
    return {
        "cohort": cohort, "target_epsilon": target, "delta": delta, "rounds": rounds,
        "steps_per_round": steps, "sample_rate": sample_rate, "spent": spent,
        "noise_multiplier": sigma, "epsilon": after,
    }  # fmt: skip


def verify(ledger: Ledger, noted: str | None = None) -> dict[str, Any]:
    """Prove a ledger whole, and that it still holds a head that was noted elsewhere, as ``ROW:HASH``.

    Raises:
        LedgerError: it is not, or does not.
    """
    head = ledger.verify()
    if noted is not None:
        number, _, digest = noted.partition(":")
        rows = ledger.read().rows
        row = rows[int(number) - 1] if number.isdecimal() and 0 < int(number) <= len(rows) else None
        if row is None or len(digest) < 8 or not row.hash.startswith(digest):
            raise LedgerError(
                f"{ledger.path}: has no row {noted}: it was rolled back past it, or it is another ledger"
            )
    return {"folder": str(ledger.path.parent), "rows": head.count, "hash": head.hash}


def _cohort(book: Book, name: str) -> dict[str, Any]:
    """What a cohort has spent, and what one more round like its last would cost."""
    policy, patients = book.policies[name], book.members[name]
    delta, target = policy.delta or 0.0, policy.target_epsilon
    last = next(e.charge for e in reversed(book.entries) if e.cohort == name)
    spent, after = book.epsilon(patients, delta), book.epsilon(patients, delta, last)
    return {
        "cohort": name, "patients": len(patients), "target_epsilon": target, "delta": delta,
        "max_grad_norm": policy.max_grad_norm, "images_per_patient": policy.images_per_patient,
        "epsilon": spent, "left": target - spent, "next_round": after - spent,
        "next_fits": after <= target, "rounds_left": _rounds_left(book, name, last, target, delta),
    }  # fmt: skip


def _rounds_left(book: Book, name: str, last: Charge, target: float, delta: float) -> int:
    """How many more rounds like the last one fit; by bisection, at most ``MANY_ROUNDS``."""
    histories = book.histories(book.members[name])

    def fits(rounds: int) -> bool:
        more = Charge(last.noise_multiplier, last.sample_rate, min(rounds * last.steps, MAX_STEPS))
        return all(epsilon((*history, more), delta) <= target for history in histories)

    low, high = 0, 1
    while high < MANY_ROUNDS and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _run(book: Book, run: str, name: str) -> dict[str, Any]:
    """What one run charged one cohort; its epsilon is what it would be had there been no other run."""
    entries: list[Entry] = [e for e in book.entries if (e.run, e.cohort) == (run, name)]
    return {
        "run": run, "cohort": name, "rounds": len({e.round for e in entries}), "charged": len(entries),
        "steps": sum(e.charge.steps for e in entries),
        "noise_multiplier": sorted({e.charge.noise_multiplier for e in entries}),
        "sample_rate": sorted({e.charge.sample_rate for e in entries}),
        "epsilon_alone": epsilon((e.charge for e in entries), book.policies[name].delta or 0.0),
        "first": entries[0].time, "last": entries[-1].time,
    }  # fmt: skip


def any_spent(statements: Sequence[dict[str, Any]]) -> bool:
    """Whether some cohort cannot afford another round like its last."""
    return any(not cohort["next_fits"] for told in statements for cohort in told["cohorts"])
