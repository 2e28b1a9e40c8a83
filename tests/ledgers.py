"""A ledger with a past, for tests."""

from sparsecontrast.accounting import Charge, epsilon
from sparsecontrast.cohorts import cohort_of
from sparsecontrast.ledger import Ledger
from sparsecontrast.policy import Policy

KEY, CHARGE, DELTA = b"k" * 32, Charge(4.0, 1.0, 1), 1e-3
PATIENTS = [f"feed{i:012x}" for i in range(40)]
COHORT = cohort_of(PATIENTS, KEY)


def budget(rounds):
    """A policy under which exactly so many rounds fit."""
    return Policy(epsilon([CHARGE] * rounds, DELTA) + 1e-6, DELTA, 1.0, 4)


def charged(folder):
    """Five of six rounds are charged."""
    ledger = Ledger(folder)
    for number in range(1, 6):
        ledger.reserve("first", number, COHORT, budget(6), CHARGE)
    return ledger


def spent(ledger, cohort=COHORT):
    return ledger.read().epsilon(cohort.digests, DELTA)
