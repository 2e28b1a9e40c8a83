"""How much privacy a training run has lost at least: an audit that needs that one run alone.

Of m canaries each takes part with probability 1/2. From what the run released, every canary gets a
score; for the highest k+ the auditor guesses "was in", for the lowest k- "was out", and abstains from the
rest (Steinke, Nasr and Jagielski, "Privacy auditing with one (1) training run", NeurIPS 2023,
arXiv 2305.08846, algorithm 1). Where the run is (epsilon, delta)-private to adding or removing a canary,
the number V of right guesses among r is almost bounded by that of randomised response: for all v

    P[V >= v] <= f(v) + 2 m delta max_{i >= 1} (f(v - i) - f(v)) / i,
    f(v) = P[Binomial(r, e^epsilon / (1 + e^epsilon)) >= v]

(section 5, corollary 5.4; the code of appendix D). The second term: delta lets V be larger than the
binomial by some N >= 0 of mean at most 2 m delta, and among all such N one that is 0 or a single i is the
worst. An epsilon whose right side is below 1 - confidence is refuted; the bound is the largest such.

A bound below the claim proves nothing: the audit finds faults, it certifies no one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln

from sparsecontrast.errors import EvaluationError
from sparsecontrast.probes import Interval, Scored, bootstrap
from sparsecontrast.ranges import check_range

PRECISION = 1e-4  # of a bound, which is rounded down by less
SHARES = ((0.45, 0.45), (0.2, 0.2), (0.05, 0.05), (0.0125, 0.0125), (0.025, 0.0))
"""(k+, k-) as shares of the canaries, fixed before any score is seen and all tried: see ``audit``.

From nearly all, for a run that hides nothing, to the few extreme ones of a run that hides much; with
sampled patients "was in" shows more clearly than "was out", hence the last."""


@dataclass(frozen=True)
class Audit:
    """What one run gave away.

    Attributes:
        epsilon: lower bound, >= 0.
        canaries: m.
        guesses: r of the plan that proved most.
        correct: of these guesses.
        attack: row of the scores that proved most.
    """

    epsilon: float
    canaries: int
    guesses: int
    correct: int
    attack: int


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Bound the chance of ``correct`` or more right guesses under (epsilon, delta)-privacy.

    Args:
        canaries: m >= 1, each in the run with probability 1/2.
        guesses: r in [0, m].
        correct: v in [0, r].
        epsilon: >= 0.
        delta: in [0, 1].

    Raises:
        ConfigError: an impossible number.
    """
    check_range("canaries", canaries, (1, math.inf, "[)"))
    check_range("guesses", guesses, (0, canaries, "[]"))
    check_range("correct", correct, (0, guesses, "[]"))
    check_range("epsilon", epsilon, (0, math.inf, "[)"))
    check_range("delta", delta, (0, 1, "[]"))
    if correct == 0:
        return 1.0
    chances = _binomial(guesses, epsilon)
    tail = chances[correct:].sum()
    # f(v - i) - f(v) for i = 1..v; beyond v it grows no more
    more = np.cumsum(chances[:correct][::-1])
    worst = (more / np.arange(1, correct + 1)).max()
    return float(min(1.0, tail + 2 * canaries * delta * worst))


def lower_bound(canaries: int, guesses: int, correct: int, delta: float, confidence: float = 0.95) -> float:
    """Return the largest epsilon that so many right guesses refute, 0 if none.

    Every epsilon with ``p_value`` below 1 - confidence is refuted, and with it all that are smaller, which
    promise more; that the p-value grows with epsilon is not needed.

    Raises:
        ConfigError: an impossible number.
    """
    check_range("confidence", confidence, (0, 1, "()"))

    def refuted(epsilon: float) -> bool:
        return p_value(canaries, guesses, correct, epsilon, delta) < 1 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    while high - low > PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def audit(
    scores: np.ndarray,
    included: np.ndarray,
    delta: float,
    confidence: float = 0.95,
    shares: Sequence[tuple[float, float]] = SHARES,
) -> Audit:
    """Guess who was in the run, and bound the run's epsilon from below.

    How many guesses prove most depends on the run. Taking the best number afterwards would be cheating:
    the plans are fixed beforehand, and a union bound over all of them, and over all attacks, pays for the
    choice (each is held to 1 - (1 - confidence) / (plans x attacks)). Equal scores are ranked by a fixed
    shuffle.

    Args:
        scores: [m], or [attacks, m]; higher means "was in". They may depend on all that was released and
            all that is public, never on ``included``.
        included: whether each canary took part, boolean [m]: tosses of a fair coin, independent of each
            other and of everything else.
        delta: of the claim.
        confidence: with which the bound holds.
        shares: the plans: (k+, k-) as shares of m, at most 1 together.

    Raises:
        ConfigError: an impossible number.
        EvaluationError: scores that do not fit the canaries, or are no numbers.
    """
    scores = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    included = np.asarray(included)
    _check(scores, included)
    count = included.size
    plans = [(math.floor(top * count), math.floor(bottom * count)) for top, bottom in shares]
    for top, bottom in plans:
        check_range("k+ and k- together", top + bottom, (0, count, "[]"))
    each = 1 - (1 - confidence) / (len(plans) * len(scores))
    shuffle = np.random.Generator(np.random.PCG64(0)).permutation(count)
    best = None
    for attack, row in enumerate(scores):
        ranked = included[np.lexsort((shuffle, row))]
        for top, bottom in plans:
            guesses = top + bottom
            correct = int(ranked[count - top :].sum() + (~ranked[:bottom]).sum())
            # most plans do not even refute what another one has refuted
            if best is None or p_value(count, guesses, correct, best.epsilon, delta) < 1 - each:
                bound = lower_bound(count, guesses, correct, delta, each)
                if best is None or bound > best.epsilon:
                    best = Audit(bound, count, guesses, correct, attack)
    assert best is not None, "there is a plan and an attack"
    return best


def ceiling(
    canaries: int,
    delta: float,
    confidence: float = 0.95,
    shares: Sequence[tuple[float, float]] = SHARES,
    attacks: int = 1,
) -> float:
    """Return the largest bound that ``audit`` can give: no guess is wrong.

    About ln(r / ln(plans x attacks / (1 - confidence))): a claim above it cannot be refuted.
    """
    each = 1 - (1 - confidence) / (len(shares) * attacks)
    guesses = [math.floor(top * canaries) + math.floor(bottom * canaries) for top, bottom in shares]
    return max(lower_bound(canaries, r, r, delta, each) for r in guesses)


def membership_auroc(
    scores: np.ndarray, included: np.ndarray, replicates: int = 1000, seed: int = 0
) -> Interval:
    """Probability that a canary that was in outscores one that was out, with its 95 % interval.

    The classic figure of membership inference (Mann and Whitney's U over the number of pairs), by
    bootstrap over canaries. It is an average: a few canaries may be known for certain at 0.5.

    Raises:
        EvaluationError: scores that do not fit the canaries, are no numbers, or none was in or out.
    """
    scores, included = np.asarray(scores, dtype=np.float64), np.asarray(included)
    _check(scores[None], included)
    if included.all() or not included.any():
        raise EvaluationError("an AUROC needs canaries that were in and canaries that were out")
    count = np.arange(len(scores))
    one = Scored(scores[None], included.astype(np.int64), count, np.zeros_like(count), np.ones(1))
    return bootstrap([one], replicates, seed)


def _binomial(count: int, epsilon: float) -> np.ndarray:
    """Chance of 0..count right answers of randomised response, float64 [count + 1].

    In logarithms, so that 1 - e^epsilon / (1 + e^epsilon) loses no digit where epsilon is large.
    """
    right, wrong = -np.log1p(np.exp(-epsilon)), -epsilon - np.log1p(np.exp(-epsilon))
    k = np.arange(count + 1)
    ways = gammaln(count + 1) - gammaln(k + 1) - gammaln(count - k + 1)
    return np.exp(ways + k * right + (count - k) * wrong)


def _check(scores: np.ndarray, included: np.ndarray) -> None:
    if included.dtype != np.bool_ or included.ndim != 1 or included.size == 0:
        raise EvaluationError(f"included: expected booleans [m], got {included.dtype} {included.shape}")
    if scores.ndim != 2 or scores.shape[1] != len(included) or len(scores) == 0:
        raise EvaluationError(f"scores of shape {scores.shape} for {len(included)} canaries")
    if np.isnan(scores).any():
        raise EvaluationError("a score is not a number; give a canary that says nothing the same finite one")
