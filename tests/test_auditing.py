"""The one-run audit: it seldom claims too much, and claims much where much is given away."""

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.stats import binom, norm

from sparsecontrast.auditing import SHARES, audit, ceiling, lower_bound, membership_auroc, p_value
from sparsecontrast.errors import ConfigError, EvaluationError

ALL = ((0.5, 0.5),)


@pytest.mark.parametrize(
    ("told", "printed"), [((1000, 100, 75, 1e-4), 0.673), ((100_000, 1510, 1439, 1e-5), 2.675)]
)
def test_bounds_that_the_paper_prints(told, printed):
    """Appendix D, and the example of section 7: rounded there in one case, cut off in the other."""
    assert lower_bound(*told) == pytest.approx(printed, abs=1e-3)


def tail_exactly(guesses, odds):
    """f(v) for v = 0..guesses of a binomial of rational odds, in fractions."""
    q = Fraction(odds, 1 + odds)
    chances = [math.comb(guesses, k) * q**k * (1 - q) ** (guesses - k) for k in range(guesses + 1)]
    return [sum(chances[v:], Fraction(0)) for v in range(guesses + 1)]


@pytest.mark.parametrize("odds", [1, 3, 20])
@pytest.mark.parametrize("delta", [0.0, 1e-4, 1e-3])
def test_p_value_is_the_worst_that_delta_can_do(odds, delta):
    """Against the linear programme behind it, solved: W + N guesses are right, the mean of N bounded."""
    m, r = 60, 25
    f = [float(x) for x in tail_exactly(r, odds)]
    for v in range(1, r + 1):
        reached = [f[max(v - i, 0)] for i in range(m + 1)]
        worst = linprog(
            [-x for x in reached], A_ub=[list(range(m + 1))], b_ub=[2 * m * delta],
            A_eq=[[1.0] * (m + 1)], b_eq=[1.0],
        )  # fmt: skip
        found = p_value(m, r, v, math.log(odds), delta)
        assert found == pytest.approx(min(1.0, -worst.fun), rel=1e-6, abs=1e-12)


def test_p_value_grows_with_delta_and_falls_with_right_guesses():
    values = [p_value(500, 100, v, 1.0, 1e-4) for v in range(101)]
    assert values[0] == 1 and np.diff(values).max() <= 1e-12  # rounding
    assert p_value(500, 100, 90, 1.0, 0) < p_value(500, 100, 90, 1.0, 1e-5) < p_value(500, 100, 90, 1.0, 1e-3)
    assert p_value(500, 100, 90, 1.0, 0) == pytest.approx(binom.sf(89, 100, 1 / (1 + math.exp(-1))))


@pytest.mark.parametrize("guesses", [1, 10, 1000, 30_000])
def test_a_faultless_auditor_reaches_the_known_maximum(guesses):
    q = 0.05 ** (1 / guesses)  # all right with chance 1 in 20
    wanted = max(0.0, math.log(q / (1 - q)))
    assert lower_bound(guesses, guesses, guesses, 0.0) == pytest.approx(wanted, abs=2e-4)


def test_perfect_scores_reach_the_ceiling():
    included = np.random.default_rng(0).random(4000) < 0.5
    found = audit(included.astype(float), included, 0.0)
    assert found.correct == found.guesses and found.epsilon == ceiling(4000, 0.0)
    each = 0.05 / len(SHARES)
    assert found.epsilon == pytest.approx(math.log(found.guesses / math.log(1 / each)), abs=0.01)
    again = audit(np.stack(3 * [included.astype(float)]), included, 0.0)  # every attack is paid for
    assert again.epsilon == ceiling(4000, 0.0, attacks=3) < found.epsilon
    assert ceiling(4000, 1e-5) < ceiling(4000, 0.0)


def answers(included, epsilon, rng):
    """Randomised response: each coin is told rightly with odds e^epsilon; ties apart by nothing."""
    honest = rng.random(len(included)) < 1 / (1 + math.exp(-epsilon))
    return (included == honest) + 1e-3 * rng.random(len(included))


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_the_bound_of_randomised_response_holds(epsilon):
    rng, runs, exceeded = np.random.default_rng(1), 400, 0
    for _ in range(runs):
        included = rng.random(300) < 0.5
        exceeded += audit(answers(included, epsilon, rng), included, 0.0, shares=ALL).epsilon > epsilon
    # of one plan the confidence is meant exactly: three deviations above 5 %
    assert exceeded / runs <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)


def test_the_bound_of_randomised_response_is_close_for_many_canaries():
    rng = np.random.default_rng(2)
    included = rng.random(100_000) < 0.5
    scores = answers(included, 2.0, rng)
    assert 1.95 < audit(scores, included, 0.0, shares=ALL).epsilon <= 2.0
    assert 1.9 < audit(scores, included, 0.0).epsilon <= 2.0
    assert audit(-scores, included, 0.0).epsilon == 0


def test_what_delta_lets_through_is_not_held_against_epsilon():
    """Each coin is told outright with chance delta: private, but a bound without the delta term is wrong."""
    rng, delta, runs, with_it, without = np.random.default_rng(3), 0.02, 200, 0, 0
    for _ in range(runs):
        included = rng.random(500) < 0.5
        told = np.where(rng.random(500) < delta, 10.0 * (2 * included - 1), 0.0)
        scores = answers(included, 0.5, rng) + told
        shares = ((0.01, 0.01),)
        with_it += audit(scores, included, delta, shares=shares).epsilon > 0.5
        without += audit(scores, included, 0.0, shares=shares).epsilon > 0.5
    assert with_it <= 0.05 * runs and without > 0.5 * runs


def test_scores_that_say_nothing_prove_nothing():
    rng = np.random.default_rng(4)
    proved = [
        audit(rng.standard_normal((2, 400)), rng.random(400) < 0.5, 1e-6).epsilon > 0 for _ in range(200)
    ]
    assert sum(proved) <= 0.05 * 200


def test_the_best_of_many_plans_is_paid_for():
    """Taking the best number of guesses afterwards would prove something of noise far too often."""
    rng, plans, cheated, honest = np.random.default_rng(5), [(k / 200, 0.0) for k in range(5, 100, 2)], 0, 0
    for _ in range(100):
        included, scores = rng.random(200) < 0.5, rng.random(200)
        cheated += any(audit(scores, included, 0.0, shares=[plan]).epsilon > 0 for plan in plans)
        honest += audit(scores, included, 0.0, shares=plans).epsilon > 0
    assert honest <= 5 and cheated >= 15


@pytest.mark.parametrize("sign", [1, -1])
def test_equal_scores_tell_nothing_however_the_canaries_are_ordered(sign):
    included = np.arange(2000) * sign < 1000 * sign
    assert audit(np.zeros(2000), included, 0.0).epsilon == 0


def test_it_finds_the_attack_that_sees():
    rng = np.random.default_rng(6)
    included = rng.random(1000) < 0.5
    found = audit(np.stack([rng.random(1000), included + 0.1 * rng.random(1000)]), included, 1e-6)
    assert found.attack == 1 and found.canaries == 1000 and found.epsilon > 3


def test_what_makes_no_sense_is_refused():
    coins = np.array([True, False])
    for scores, included in [
        (np.zeros(3), coins), (np.array([np.nan, 0.0]), coins), (np.zeros(2), np.array([1, 0])),
        (np.zeros((1, 1, 2)), coins), (np.zeros(0), np.zeros(0, dtype=bool)),
    ]:  # fmt: skip
        with pytest.raises(EvaluationError):
            audit(scores, included, 0.0)
    with pytest.raises(EvaluationError, match="in and canaries that were out"):
        membership_auroc(np.zeros(2), np.array([True, True]))
    for numbers in [(0, 0, 0, 1.0, 0.0), (5, 6, 1, 1.0, 0.0), (5, 4, 5, 1.0, 0.0), (5, 4, 4, -1.0, 0.0),
                    (5, 4, 4, 1.0, 2.0), (5, 4, 4, math.nan, 0.0)]:  # fmt: skip
        with pytest.raises(ConfigError):
            p_value(*numbers)
    with pytest.raises(ConfigError, match="together"):
        audit(np.zeros(10), np.zeros(10, dtype=bool), 0.0, shares=[(0.6, 0.6)])
    with pytest.raises(ConfigError, match="confidence"):
        lower_bound(5, 4, 4, 0.0, 1.0)


def test_auroc_counts_pairs():
    rng = np.random.default_rng(7)
    included, scores = rng.random(60) < 0.5, rng.integers(0, 8, 60).astype(float)
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[included] for b in scores[~included]]
    found = membership_auroc(scores, included, 200)
    assert found.value == pytest.approx(np.mean(pairs)) and found.low < found.value < found.high


def test_the_interval_of_auroc_covers_the_truth():
    rng, truth, covered = np.random.default_rng(8), norm.cdf(1 / math.sqrt(2)), 0
    for run in range(100):
        included = rng.random(200) < 0.5
        found = membership_auroc(rng.standard_normal(200) + included, included, 200, run)
        covered += found.low <= truth <= found.high
    assert covered >= 88  # of 95 meant, three deviations below
