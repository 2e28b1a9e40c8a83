"""Whom a charge burdens, and the policy that cannot change."""

import itertools
import random

import pytest

from sparsecontrast.accounting import Charge, epsilon
from sparsecontrast.cohorts import DIGEST, MAX_HISTORIES, cohort_of, overlapping, worst_histories
from sparsecontrast.config import compose
from sparsecontrast.errors import ConfigError, EmptySiteError, PolicyError
from sparsecontrast.policy import Policy, default_delta, policy_of

KEY = b"k" * 32
POLICY = Policy(8.0, None, 1.0, 4)


def digests(*patients):
    return frozenset(cohort_of(patients, KEY).digests)


def test_a_cohort_is_its_set_of_patients():
    one = cohort_of(["a", "b", "c"], KEY)
    assert one == cohort_of(["c", "b", "a", "a", "b"], KEY) and len(one.digests) == 3
    assert one.fingerprint == cohort_of("abc", KEY).fingerprint and len(one.fingerprint) == 64
    assert cohort_of("abd", KEY).fingerprint != one.fingerprint
    other = cohort_of("abc", b"l" * 32)
    assert not set(other.digests) & set(one.digests) and other.key_check != one.key_check
    assert all(len(d) == DIGEST and d != b"a" for d in one.digests)
    with pytest.raises(EmptySiteError):
        cohort_of([], KEY)


def test_the_worst_patient_decides():
    charge = Charge(1, 0.1, 10)
    known = {"A": digests("a", "b"), "B": digests("b", "c"), "C": digests("x")}
    charges = [("A", charge), ("B", charge), ("C", charge), ("A", charge)]

    def steps(*patients):
        return sorted(sum(c.steps for c in h) for h in worst_histories(digests(*patients), known, charges))

    assert steps("a") == [20] and steps("b") == [30] and steps("c") == [10] and steps("x") == [10]
    assert steps("a", "b", "c", "new") == [30]  # grown
    assert steps("c", "new") == [10]  # shrunk and grown
    assert steps("new") == [0]  # nobody in common
    assert overlapping(digests("b", "x"), known) == ["A", "B", "C"]


def test_histories_of_different_kinds_are_all_kept():
    known = {"A": digests("a"), "B": digests("b")}
    first, second = Charge(1, 0.1, 10), Charge(2, 0.1, 10)
    found = worst_histories(digests("a", "b"), known, [("A", first), ("B", second)])
    assert sorted(found, key=str) == [(first,), (second,)]
    found = worst_histories(digests("a", "b"), known, [("A", first), ("B", first)])
    assert found == [(first,)]  # the same twice is one


def brute_force(patients, cohorts, charges, delta):
    """Epsilon of each patient alone, the worst of them."""
    return max(epsilon([c for i, c in charges if p in cohorts[i]], delta) for p in patients)


@pytest.mark.parametrize("seed", range(4))
def test_equality_with_every_patients_own_account(seed):
    draw = random.Random(seed)
    everybody = [str(i) for i in range(12)]
    cohorts = [draw.sample(everybody, draw.randint(2, 8)) for _ in range(5)]
    kinds = [Charge(1.5, 0.1, 5), Charge(3, 0.2, 10)]
    charges = [(draw.randrange(5), draw.choice(kinds)) for _ in range(12)]
    known = {str(i): digests(*c) for i, c in enumerate(cohorts)}
    new = draw.sample(everybody, 6)
    found = worst_histories(digests(*new), known, [(str(i), c) for i, c in charges])
    worst = max(epsilon(h, 1e-3) for h in found)
    assert worst == pytest.approx(brute_force(new, cohorts, charges, 1e-3), abs=1e-9)


def test_too_many_kinds_of_patients_are_bounded_from_above():
    n = MAX_HISTORIES + 4
    known = {str(i): digests(str(i)) for i in range(n)}
    charges = [(str(i), Charge(1 + i, 0.1, 10)) for i in range(n)]
    (joint,) = worst_histories(digests(*map(str, range(n))), known, charges)
    assert {c.noise_multiplier for c in joint} == {1 + i for i in range(n)}


@pytest.mark.parametrize("patients", [1, 2, 9, 10, 11, 40, 99, 100, 101, 12345, 10**6])
def test_delta_is_below_one_in_the_patients(patients):
    delta = default_delta(patients)
    assert delta * 10 * patients <= 1 + 1e-9 and delta * 10 * 10 * patients > 1 - 1e-9
    assert POLICY.settled(patients, []).delta == delta


def test_a_delta_that_would_publish_a_patient_is_refused():
    for delta in (0.025, 0.1):
        with pytest.raises(PolicyError, match=r"must be below 1 / patients = 1 / 40"):
            Policy(8.0, delta, 1.0, 4).settled(40, [])
    assert Policy(8.0, 0.024, 1.0, 4).settled(40, []).delta == 0.024


@pytest.mark.parametrize("changed", [
    {"target_epsilon": 9.0}, {"target_epsilon": 7.0}, {"delta": 1e-4}, {"max_grad_norm": 0.5},
    {"images_per_patient": 1},
])  # fmt: skip
def test_a_policy_cannot_change(changed):
    agreed = POLICY.settled(40, [])
    ((key, value),) = changed.items()
    with pytest.raises(PolicyError, match=rf"{key} was .*, is {value}"):
        Policy(**({**vars(POLICY)} | changed)).settled(40, [agreed])


def test_a_null_delta_stays_what_was_agreed_while_a_cohort_grows():
    agreed = POLICY.settled(40, [])
    assert agreed.delta == 1e-3
    assert POLICY.settled(400, [agreed]) == agreed  # by itself it would be smaller
    with pytest.raises(PolicyError, match="agreed for a smaller cohort"):
        POLICY.settled(1000, [agreed])


def test_the_policy_of_a_configuration():
    assert policy_of(compose("privacy=dp_sgd").privacy) == Policy(8.0, None, 1.0, 4)
    with pytest.raises(ConfigError, match="no policy"):
        policy_of(compose().privacy)


def test_order_does_not_matter():
    known = {"A": digests("a", "b"), "B": digests("b")}
    charges = [("A", Charge(1, 0.1, 10)), ("B", Charge(2, 0.1, 5))]
    values = {
        round(max(epsilon(h, 1e-3) for h in worst_histories(digests("a", "b"), known, order)), 9)
        for order in itertools.permutations(charges)
    }
    assert len(values) == 1
