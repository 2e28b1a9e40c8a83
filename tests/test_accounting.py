"""Accounting: the published table, another accountant, and what any correct one must do."""

import itertools

import pytest
from opacus.accountants import PRVAccountant

from sparsecontrast import accounting
from sparsecontrast.accounting import Charge, calibrate, epsilon, merged
from sparsecontrast.errors import BudgetSpentError, ConfigError
from sparsecontrast.ranges import MAX_STEPS

TABLE = [
    (1.0, 0.01, 1000, 1e-5, 1.828),
    (0.8, 0.0128, 1560, 1e-6, 5.692),
    (1.5, 0.08, 625, 1e-4, 6.386),
    (0.5, 0.01, 500, 1e-5, 10.283),
]


@pytest.mark.parametrize(("sigma", "q", "steps", "delta", "published"), TABLE)
def test_the_published_table(sigma, q, steps, delta, published):
    assert epsilon([Charge(sigma, q, steps)], delta) == pytest.approx(published, abs=1e-2)


@pytest.mark.parametrize(("sigma", "q", "steps", "delta", "published"), TABLE)
def test_opacus_prv_agrees(sigma, q, steps, delta, published):
    other = PRVAccountant()
    other.history = [(sigma, q, steps)]
    # its figure is an upper bound by at most eps_error, ours by the grid
    assert epsilon([Charge(sigma, q, steps)], delta) == pytest.approx(
        other.get_epsilon(delta, eps_error=0.01), abs=0.02
    )


def test_opacus_prv_agrees_on_a_mixture():
    other = PRVAccountant()
    other.history = [(1.0, 0.02, 300), (2.0, 0.1, 100), (1.5, 0.05, 50)]
    ours = epsilon(itertools.starmap(Charge, other.history), 1e-5)
    assert ours == pytest.approx(other.get_epsilon(1e-5, eps_error=0.01), abs=0.02)


def test_the_gaussian_mechanism_without_sampling_has_its_closed_form():
    from scipy.optimize import brentq
    from scipy.stats import norm

    mu = 10**0.5 / 4  # ten steps at sigma 4 are one at 4 / sqrt(10): Balle and Wang 2018, eq. 6

    def excess(e):
        return norm.cdf(mu / 2 - e / mu) - 2.718281828459045**e * norm.cdf(-mu / 2 - e / mu) - 1e-5

    assert epsilon([Charge(4, 1, 10)], 1e-5) == pytest.approx(float(brentq(excess, 0.01, 20)), abs=2e-3)


def test_no_step_costs_nothing_and_one_more_always_costs():
    assert epsilon([], 1e-5) == 0
    history = [Charge(1, 0.02, 200)]
    before = epsilon(history, 1e-5)
    assert before < epsilon([*history, Charge(1, 0.02, 10)], 1e-5)
    assert before < epsilon([*history, Charge(5, 0.01, 10)], 1e-5)


@pytest.mark.parametrize(("less", "more"), [
    (Charge(1.2, 0.02, 300), Charge(1.1, 0.02, 300)),  # less noise
    (Charge(1.2, 0.02, 300), Charge(1.2, 0.03, 300)),  # more of the patients
    (Charge(1.2, 0.02, 300), Charge(1.2, 0.02, 301)),  # a step more
    (Charge(0.3, 1e-3, 1), Charge(0.3, 1.0, 1)),
])  # fmt: skip
def test_epsilon_rises_with_what_costs(less, more):
    for delta in (1e-6, 1e-3):
        assert epsilon([less], delta) < epsilon([more], delta)


def test_epsilon_falls_with_delta():
    values = [epsilon([Charge(1, 0.05, 100)], delta) for delta in (1e-8, 1e-6, 1e-4, 1e-2)]
    assert values == sorted(values, reverse=True) and len(set(values)) == 4


def test_equal_kinds_are_merged_whatever_stood_between_them():
    a, b = Charge(1, 0.02, 50), Charge(2, 0.1, 30)
    assert merged([a, b, a]) == (b, Charge(1, 0.02, 100))
    together = epsilon([Charge(1, 0.02, 100), b], 1e-5)
    for order in itertools.permutations([a, a, b]):
        assert epsilon(order, 1e-5) == pytest.approx(together, abs=1e-6)
    assert epsilon([Charge(1, 0.02, 1)] * 100 + [b], 1e-5) == pytest.approx(together, abs=1e-6)


@pytest.mark.parametrize("spent", [(), (Charge(1.5, 0.05, 100), Charge(3, 0.1, 50))], ids=["new", "history"])
@pytest.mark.parametrize("target", [3.0, 8.0])
def test_calibration_is_the_least_noise_that_fits(target, spent):
    sigma = calibrate(target, 1e-5, 0.1, 200, spent)
    assert epsilon([*spent, Charge(sigma, 0.1, 200)], 1e-5) <= target
    assert epsilon([*spent, Charge(sigma / 1.002, 0.1, 200)], 1e-5) > target


def test_a_plan_ends_within_its_budget_when_charged_round_by_round():
    sigma, history = calibrate(2.0, 1e-4, 0.2, 8 * 5), []
    for _ in range(8):
        history.append(Charge(sigma, 0.2, 5))
        assert epsilon(history, 1e-4) <= 2.0
    assert epsilon([*history, history[0]], 1e-4) > 2.0


def test_calibration_says_what_cannot_be():
    history = [Charge(1, 0.1, 500)]
    gone = epsilon(history, 1e-5)
    with pytest.raises(BudgetSpentError, match=r"of 2 is spent: no noise can undo it"):
        calibrate(2.0, 1e-5, 0.1, 10, history)
    with pytest.raises(BudgetSpentError, match="plan fewer rounds"):
        calibrate(gone + 1e-4, 1e-5, 1.0, 10_000, history)
    assert calibrate(100.0, 1e-5, 0.01, 1) == 0.1  # the least noise that is ever taken


@pytest.mark.parametrize("words", [
    (0.0, 0.1, 1), (float("nan"), 0.1, 1), (-1, 0.1, 1), (1, 0, 1), (1, 1.1, 1), (1, 0.1, 0),
    (1, 0.1, MAX_STEPS + 1),
])  # fmt: skip
def test_an_impossible_charge_is_refused(words):
    with pytest.raises(ConfigError, match="must be in"):
        Charge(*words)


@pytest.mark.parametrize("delta", [0, 1, -1e-5, float("nan")])
def test_an_impossible_delta_is_refused(delta):
    with pytest.raises(ConfigError, match="delta"):
        epsilon([Charge(1, 0.1, 1)], delta)


def test_the_last_kind_alone_is_composed_anew(monkeypatch):
    made = []
    step = accounting._step
    monkeypatch.setattr(accounting, "_step", lambda *kind: made.append(kind) or step(*kind))
    kinds = [Charge(1 + i / 64, 0.017, 20) for i in range(5)]
    epsilon(kinds, 1e-5)
    assert len(made) == 5
    epsilon([*kinds, kinds[-1]], 1e-5)
    assert made[5:] == [(kinds[-1].noise_multiplier, 0.017)]


def test_more_kinds_than_are_remembered(monkeypatch):
    monkeypatch.setattr(accounting, "REMEMBERED", 2)
    kinds = [Charge(8 + i / 64, 0.017, 20) for i in range(12)]
    together = epsilon(kinds, 1e-5)
    for start in (3, 5):
        epsilon(kinds[start:], 1e-5)
    accounting._epsilon.cache_clear()
    assert epsilon(kinds, 1e-5) == together and len(accounting._remembered) == 2
