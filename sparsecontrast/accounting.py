"""What a patient's privacy has cost: epsilon of noisy steps, and the noise that a budget asks for.

The mechanism is DP-SGD's: Poisson-sampled patients, clipped sums, Gaussian noise; neighbours differ by
one patient added or removed. Privacy loss distributions (Koskela et al. 2020, arXiv 1906.03049; Doroshenko
et al. 2022, arXiv 2207.04380) are composed exactly and discretised pessimistically: epsilon is an upper
bound. This is the only file that meets Google's ``dp-accounting``.
"""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sparsecontrast.errors import BudgetSpentError
from sparsecontrast.ranges import MAX_STEPS, NOISE, check_range

INTERVAL = 1e-3  # of the discretised privacy loss
PRECISION = 1e-3  # relative, of a calibrated noise multiplier
REMEMBERED = 32  # compositions, of about a megabyte each
_remembered: "dict[tuple[Charge, ...], Any]" = {}


@dataclass(frozen=True)
class Charge:
    """Steps of one kind.

    Attributes:
        noise_multiplier: sigma, the noise's standard deviation over the clipping norm.
        sample_rate: q in (0, 1], the chance of each patient to take part in a step.
        steps: how many, at least 1.

    Raises:
        ConfigError: a value that has no privacy loss, or none that can be computed.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self):
        check_range("noise_multiplier", self.noise_multiplier, NOISE)
        check_range("sample_rate", self.sample_rate, (0, 1, "(]"))
        check_range("steps", self.steps, (1, MAX_STEPS, "[]"))


def epsilon(spent: Iterable[Charge], delta: float) -> float:
    """Compose steps and return their epsilon at ``delta``; 0 for none, inf where ``delta`` is unattainable.

    Raises:
        ConfigError: ``delta`` is not in (0, 1), or more than ``MAX_STEPS`` steps of one kind.
    """
    check_range("delta", delta, (0, 1, "()"))
    kinds = merged(spent)
    return _epsilon(kinds, delta) if kinds else 0.0


def merged(spent: Iterable[Charge]) -> tuple[Charge, ...]:
    """Join charges of equal sigma and q; the kind charged last stands last.

    Composition does not depend on order. This one keeps all but the last kind as they were from round
    to round, and with them what was composed before.
    """
    steps: dict[tuple[float, float], int] = {}
    for charge in spent:
        kind = (charge.noise_multiplier, charge.sample_rate)
        steps[kind] = steps.pop(kind, 0) + charge.steps
    return tuple(Charge(sigma, q, n) for (sigma, q), n in steps.items())


def calibrate(
    target_epsilon: float, delta: float, sample_rate: float, steps: int, spent: Iterable[Charge] = ()
) -> float:
    """Return the smallest sigma with which ``steps`` more steps stay within ``target_epsilon``.

    Args:
        target_epsilon: of history and plan together.
        delta: of the guarantee.
        sample_rate: of the plan, in (0, 1].
        steps: of the plan.
        spent: history.

    Returns:
        Sigma, at most ``PRECISION`` above the smallest possible and never below it.

    Raises:
        BudgetSpentError: history alone has spent the target, or leaves too little for any noise.
        ConfigError: an impossible argument.
    """
    history = merged(spent)
    gone = epsilon(history, delta)
    if gone > target_epsilon:
        raise BudgetSpentError(f"epsilon {gone:.4g} of {target_epsilon:g} is spent: no noise can undo it")

    def fits(sigma: float) -> bool:
        return epsilon((*history, Charge(sigma, sample_rate, steps)), delta) <= target_epsilon

    # about where the answer lies: far below it, many steps would make a huge distribution
    low, high = _bracket(fits, max(1.0, sample_rate * math.sqrt(steps) / target_epsilon))
    if math.isinf(high):
        raise BudgetSpentError(
            f"epsilon {gone:.4g} of {target_epsilon:g} is spent: {steps} more steps at sample_rate="
            f"{sample_rate:g} do not fit, even with noise_multiplier={NOISE[1]:g}; plan fewer rounds"
        )
    while high > low * (1 + PRECISION / 2):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return _rounded_up(high)


def _bracket(fits: Callable[[float], bool], guess: float) -> tuple[float, float]:
    """Return (does not fit, fits), a factor 2 apart; (x, x) if the least noise fits, (x, inf) if none."""
    least, most = float(NOISE[0]), float(NOISE[1])
    high = min(guess, most)
    while not fits(high):
        if high == most:
            return most, math.inf
        high = min(high * 2, most)
    low = max(high / 2, least)
    while fits(low):
        if low == least:
            return least, least
        low, high = max(low / 2, least), low
    return low, high


def _rounded_up(sigma: float) -> float:
    """Five significant digits, upwards: what is printed is what is used."""
    scale = 10.0 ** (4 - math.floor(math.log10(sigma)))
    return min(math.ceil(sigma * scale) / scale, float(NOISE[1]))


@functools.lru_cache(maxsize=4096)
def _epsilon(kinds: tuple[Charge, ...], delta: float) -> float:
    return float(_composition(kinds).get_epsilon_for_delta(delta))


def _composition(kinds: tuple[Charge, ...]) -> Any:
    """Compose the kinds in order, going on from the longest beginning that is remembered."""
    done = next((n for n in range(len(kinds), 0, -1) if kinds[:n] in _remembered), 0)
    total = _remember(kinds[:done], _remembered.pop(kinds[:done])) if done else None
    for n in range(done, len(kinds)):
        alone = _step(kinds[n].noise_multiplier, kinds[n].sample_rate).self_compose(kinds[n].steps)
        total = alone if total is None else total.compose(alone)
        if n + 2 >= len(kinds):  # the next round changes the last kind, or adds one
            _remember(kinds[: n + 1], total)
    return total


def _remember(kinds: tuple[Charge, ...], total: Any) -> Any:
    _remembered[kinds] = total
    while len(_remembered) > REMEMBERED:
        del _remembered[next(iter(_remembered))]  # used longest ago
    return total


@functools.lru_cache(maxsize=32)
def _step(noise_multiplier: float, sample_rate: float) -> Any:
    """The privacy loss distribution of one step."""
    # takes seconds to import, and `sparsecontrast --help` should not
    from dp_accounting.pld import privacy_loss_distribution as pld

    return pld.from_gaussian_mechanism(
        noise_multiplier,
        pessimistic_estimate=True,
        value_discretization_interval=INTERVAL,
        sampling_prob=sample_rate,
        neighboring_relation=pld.NeighborRel.ADD_OR_REMOVE_ONE,
    )
