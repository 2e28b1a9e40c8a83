"""A site's privacy account in one run: a round is reserved on disk, and only what was reserved may be done.

The ledger knows what was spent by all runs; this is what stands between it and the training loop: sigma by
plan or as configured, one reservation a round, and a count of the steps that it allows.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from sparsecontrast.accounting import Charge
from sparsecontrast.cohorts import Cohort, cohort_of
from sparsecontrast.disclosure import public_patients
from sparsecontrast.errors import PrivacyError
from sparsecontrast.ledger import Ledger, Receipt, ledger_of
from sparsecontrast.policy import Policy, policy_of
from sparsecontrast.privacy import Mechanism
from sparsecontrast.settings import Config


@dataclass
class Account:
    """What one run may do with one site's patients.

    Attributes:
        ledger: of the site.
        run: as the ledger calls it.
        cohort: all patients who may be sampled.
        policy: as configured.
        mechanism: of every step.
        steps_per_round: noisy steps.
    """

    ledger: Ledger
    run: str
    cohort: Cohort
    policy: Policy
    mechanism: Mechanism
    steps_per_round: int
    _left: int = field(default=0, init=False)

    def reserve(self, round_number: int) -> Receipt:
        """Charge a round, durably, before anything of it is drawn; what an earlier one left is forfeited.

        Raises:
            BudgetSpentError: a patient would exceed the promised epsilon; nothing was charged.
            PolicyError, LedgerError, StorageError: see ``Ledger.reserve``.
        """
        self._left = 0
        told = self.mechanism
        charge = Charge(told.noise_multiplier, told.sample_rate, self.steps_per_round)
        receipt = self.ledger.reserve(self.run, round_number, self.cohort, self.policy, charge)
        self._left = receipt.charge.steps
        return receipt

    def book(self, mechanism: Mechanism) -> None:
        """Take one step off what was reserved; the charge of ``PatientSGD``.

        Raises:
            PrivacyError: nothing is left, or the step is not of the kind that was reserved.
        """
        if self._left < 1 or mechanism != self.mechanism:
            raise PrivacyError("a noisy step that was not reserved: nothing of it was released")
        self._left -= 1


def open_account(
    config: Config, state_dir: Path, run: str, patients: Iterable[object], key: bytes
) -> Account:
    """Open a site's account for a run.

    Args:
        config: with ``privacy=dp_sgd``.
        state_dir: of the site.
        run: its key; a run that goes on under it keeps its sigma.
        patients: pseudonyms of all who may be sampled, one an image or one a patient.
        key: of the pseudonyms.

    Raises:
        BudgetSpentError: what is left does not carry the planned rounds.
        PolicyError, LedgerError, StorageError, ConfigError: see ``Ledger.plan`` and ``ledger_of``.
    """
    p = config.privacy
    policy, cohort, ledger = policy_of(p), cohort_of(patients, key), ledger_of(config, state_dir)
    assert p.sample_rate and p.steps_per_round and p.planned_rounds, "checked by relations.py"
    steps = p.planned_rounds * p.steps_per_round
    sigma = p.noise_multiplier or ledger.plan(run, cohort, policy, p.sample_rate, steps)
    public = public_patients(config, len(cohort.digests))
    mechanism = Mechanism(p.sample_rate, sigma, policy.max_grad_norm, public)
    return Account(ledger, run, cohort, policy, mechanism, p.steps_per_round)
