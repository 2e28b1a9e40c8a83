"""Charged first, never given back, never more than was promised, whoever asks."""

import time

import pytest

from sparsecontrast.accounting import Charge, epsilon
from sparsecontrast.cohorts import cohort_of
from sparsecontrast.errors import BudgetSpentError, ConfigError, LedgerError, PolicyError
from sparsecontrast.ledger import FILE, Ledger
from sparsecontrast.policy import Policy
from tests.ledgers import CHARGE, COHORT, DELTA, KEY, PATIENTS, budget, charged, spent


@pytest.fixture
def ledger(tmp_path):
    return charged(tmp_path / "site")


def test_a_round_is_charged_and_receipted(tmp_path):
    ledger = Ledger(tmp_path)
    first = ledger.reserve("run", 1, COHORT, budget(3), CHARGE)
    second = ledger.reserve("run", 2, COHORT, budget(3), Charge(4.0, 1.0, 2))
    assert (first.row, second.row, first.attempt) == (3, 4, 1)  # after the ledger's own row and the cohort's
    assert first.epsilon == epsilon([CHARGE], DELTA) and second.epsilon == epsilon([CHARGE] * 3, DELTA)
    assert ledger.verify().hash == second.hash
    assert [(e.run, e.round, e.charge.steps) for e in ledger.read().entries] == [("run", 1, 1), ("run", 2, 2)]
    assert (tmp_path / FILE).stat().st_mode & 0o077 == 0


def test_the_last_round_fits_and_the_next_does_not(ledger):
    ledger.reserve("first", 6, COHORT, budget(6), CHARGE)
    before = ledger.verify()
    with pytest.raises(BudgetSpentError, match=r"Nothing was charged") as caught:
        ledger.reserve("first", 7, COHORT, budget(6), CHARGE)
    assert ledger.verify() == before and caught.value.code == "budget_spent"
    assert not any(patient in str(caught.value) for patient in PATIENTS)


@pytest.mark.parametrize("run", ["first", "second", "renamed"])
def test_another_run_or_a_restart_or_a_new_name_finds_what_was_spent(ledger, run):
    again = Ledger(ledger.path.parent)
    again.reserve(run, 1, COHORT, budget(6), CHARGE)
    with pytest.raises(BudgetSpentError):
        again.reserve(run, 2, COHORT, budget(6), CHARGE)


def test_the_same_round_again_is_charged_again(ledger):
    assert ledger.reserve("first", 5, COHORT, budget(6), CHARGE).attempt == 2
    assert spent(ledger) == epsilon([CHARGE] * 6, DELTA)


@pytest.mark.parametrize("patients", [
    [*PATIENTS, "new"], PATIENTS[:3], [*PATIENTS[39:], "x", "y", "z", "more"],
], ids=["grown", "shrunk", "one stayed"])  # fmt: skip
def test_a_cohort_that_overlaps_does_not_begin_at_zero(ledger, patients):
    cohort, policy = cohort_of(patients, KEY), budget(6)
    assert spent(ledger, cohort) == epsilon([CHARGE] * 5, DELTA)
    ledger.reserve("other", 1, cohort, policy, CHARGE)
    with pytest.raises(BudgetSpentError):
        ledger.reserve("other", 2, cohort, policy, CHARGE)
    with pytest.raises(BudgetSpentError):  # nor does the first one get away from what the other spent
        ledger.reserve("first", 6, COHORT, policy, CHARGE)


def test_other_patients_have_their_own_budget(ledger):
    others = cohort_of([f"other {i}" for i in range(40)], KEY)
    assert ledger.reserve("other", 1, others, budget(2), CHARGE).epsilon == epsilon([CHARGE], DELTA)
    assert spent(ledger) == epsilon([CHARGE] * 5, DELTA)


@pytest.mark.parametrize(("policy", "says"), [
    (budget(60), "target_epsilon was"),
    (Policy(budget(6).target_epsilon, 1e-4, 1.0, 4), r"delta was 0\.001, is 0\.0001"),
    (Policy(budget(6).target_epsilon, DELTA, 2.0, 4), r"max_grad_norm was 1\.0, is 2\.0"),
    (Policy(budget(6).target_epsilon, DELTA, 1.0, 8), "images_per_patient was 4, is 8"),
])  # fmt: skip
def test_a_changed_policy_is_refused_with_what_differs(ledger, policy, says):
    for cohort in (COHORT, cohort_of([*PATIENTS, "new"], KEY)):
        with pytest.raises(PolicyError, match=says):
            ledger.reserve("first", 6, cohort, policy, CHARGE)
    assert len(ledger.read().entries) == 5


def test_a_null_delta_is_the_agreed_one(ledger):
    policy = Policy(budget(6).target_epsilon, None, 1.0, 4)
    assert ledger.reserve("first", 6, COHORT, policy, CHARGE).policy.delta == DELTA


def test_another_key_of_pseudonyms_is_refused(ledger):
    with pytest.raises(LedgerError, match="another key of pseudonyms"):
        ledger.reserve("first", 6, cohort_of(PATIENTS, b"l" * 32), budget(6), CHARGE)


def test_no_pseudonym_is_kept(ledger):
    data = b"".join(path.read_bytes() for path in ledger.path.parent.iterdir())
    assert not any(patient.encode() in data for patient in PATIENTS)


@pytest.mark.parametrize(("run", "number"), [("", 1), ("x" * 201, 1), ("run", 0), ("run", -1)])
def test_a_round_that_cannot_be_is_refused(ledger, run, number):
    with pytest.raises(ConfigError, match="needs a name and a number"):
        ledger.reserve(run, number, COHORT, budget(6), CHARGE)


def test_a_clock_that_goes_backwards_changes_nothing(ledger, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 0.0)
    ledger.reserve("first", 6, COHORT, budget(6), CHARGE)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    with pytest.raises(BudgetSpentError):
        ledger.reserve("first", 7, COHORT, budget(6), CHARGE)
    assert ledger.read().entries[-1].time.startswith("1970-01-01") and ledger.verify()


def test_a_plan_takes_what_is_left_and_a_run_keeps_its_noise(ledger):
    empty = Ledger(ledger.path.parent / "elsewhere")
    policy = budget(6)
    fresh = empty.plan("run", COHORT, policy, 0.5, 20)
    assert not empty.path.exists()
    left = ledger.plan("run", COHORT, policy, 0.5, 20)
    assert left > fresh > 1
    ledger.reserve("run", 1, COHORT, policy, Charge(left, 0.5, 5))
    assert ledger.plan("run", COHORT, policy, 0.5, 20) == left  # goes on
    for number in (2, 3, 4):
        ledger.reserve("run", number, COHORT, policy, Charge(left, 0.5, 5))
    with pytest.raises(BudgetSpentError):
        ledger.reserve("run", 5, COHORT, policy, Charge(left, 0.5, 5))
