"""What the rows of a ledger say: who was charged what, and under which promise."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sparsecontrast.accounting import Charge, calibrate, epsilon
from sparsecontrast.chain import Row
from sparsecontrast.cohorts import DIGEST, Cohort, fingerprint, overlapping, split, worst_histories
from sparsecontrast.errors import BudgetSpentError, LedgerError
from sparsecontrast.policy import Policy


@dataclass(frozen=True)
class Entry:
    """One round that was charged.

    Attributes:
        row: its number in the chain.
        run: as it was called.
        round: 1-based.
        attempt: 2 and more where the round was reserved again.
        cohort: fingerprint.
        charge: the steps.
        epsilon: of the cohort's worst patient, this round included.
        time: as the site's clock said, ISO 8601; for people, nothing depends on it.
    """

    row: int
    run: str
    round: int
    attempt: int
    cohort: str
    charge: Charge
    epsilon: float
    time: str


@dataclass(frozen=True)
class Book:
    """A ledger, read and checked.

    Attributes:
        rows: the chain.
        members: digests by cohort.
        policies: by cohort, each with its delta.
        entries: in the order in which they were charged.
    """

    rows: tuple[Row, ...]
    members: Mapping[str, frozenset[bytes]]
    policies: Mapping[str, Policy]
    entries: tuple[Entry, ...]

    def settled(self, cohort: Cohort, policy: Policy) -> Policy:
        """Hold a policy to what was agreed with any of the cohort's patients, and choose its delta.

        Raises:
            PolicyError: it differs, or its delta is too large.
        """
        near = overlapping(cohort.digests, self.members)
        return policy.settled(len(cohort.digests), [self.policies[name] for name in near])

    def histories(self, patients: Iterable[bytes]) -> list[tuple[Charge, ...]]:
        """Return what the most burdened of these patients have spent, in whatever cohort."""
        return worst_histories(patients, self.members, [(e.cohort, e.charge) for e in self.entries])

    def epsilon(self, patients: Iterable[bytes], delta: float, *more: Charge) -> float:
        """Return the epsilon of the worst of these patients after ``more``."""
        return max(epsilon((*history, *more), delta) for history in self.histories(patients))

    def after(self, cohort: Cohort, policy: Policy, charge: Charge) -> float:
        """Return the epsilon of the worst patient after a charge.

        Raises:
            BudgetSpentError: it would be more than was promised.
        """
        delta, target = policy.delta or 0.0, policy.target_epsilon
        after = self.epsilon(cohort.digests, delta, charge)
        if not after <= target:
            before = self.epsilon(cohort.digests, delta)
            raise BudgetSpentError(
                f"{charge.steps} steps at noise_multiplier={charge.noise_multiplier:g}, sample_rate="
                f"{charge.sample_rate:g} would bring a patient of this cohort to epsilon {after:.4g}, but "
                f"{target:g} was promised and {before:.4g} is spent (delta {delta:g}). Nothing was charged; "
                "see `sparsecontrast budget`"
            )
        return after

    def noise_multiplier(
        self, run: str, cohort: Cohort, policy: Policy, sample_rate: float, steps: int
    ) -> float:
        """Return the sigma with which a run goes on, or the least one with which its plan fits.

        A run that was interrupted keeps its sigma: calibrated anew to all of its planned rounds, on top
        of those already done, it would take ever more noise.

        Args:
            run: as it was called when it charged.
            cohort: its patients.
            policy: settled.
            sample_rate: q.
            steps: of all planned rounds together.

        Raises:
            BudgetSpentError: no noise makes the plan fit.
        """
        for entry in reversed(self.entries):
            if (entry.run, entry.cohort, entry.charge.sample_rate) == (run, cohort.fingerprint, sample_rate):
                return entry.charge.noise_multiplier
        return max(
            calibrate(policy.target_epsilon, policy.delta or 0.0, sample_rate, steps, history)
            for history in self.histories(cohort.digests)
        )

    def attempt(self, run: str, round_number: int) -> int:
        """Count the next attempt at a round, from 1."""
        return 1 + sum((e.run, e.round) == (run, round_number) for e in self.entries)


def read_book(rows: Sequence[Row], members: Mapping[str, bytes], where: object) -> Book:
    """Make sense of verified rows.

    Args:
        rows: of the chain.
        members: sorted digests, joined, by cohort; bound to the chain by the fingerprint.
        where: the file, for messages.

    Raises:
        LedgerError: a cohort's patients are not those of its row.
    """
    policies, entries = {}, []
    for row in rows:
        told = row.content
        if row.kind == "cohort":
            name = told["cohort"]
            blob = members.get(name, b"")
            if fingerprint(blob) != name or len(blob) != DIGEST * told["patients"]:
                raise LedgerError(
                    f"{where}: row {row.number}: the list of its patients was changed or dropped"
                )
            policies[name] = Policy(**told["policy"])
        elif row.kind == "charge":
            kind = Charge(told["noise_multiplier"], told["sample_rate"], told["steps"])
            entries.append(
                Entry(row.number, told["run"], told["round"], told["attempt"], told["cohort"], kind,
                      told["epsilon"], told["time"])
            )  # fmt: skip
    if foreign := set(members) - set(policies):
        raise LedgerError(f"{where}: {len(foreign)} list(s) of patients without a row; they were put there")
    return Book(tuple(rows), {name: split(members[name]) for name in policies}, policies, tuple(entries))
