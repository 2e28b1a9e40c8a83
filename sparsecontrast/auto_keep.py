"""How few cells an image may be computed with: a threshold with a stated risk, by conformal risk control.

Source: Angelopoulos, Bates, Fisch, Lei, Schuster, Conformal Risk Control (ICLR 2024, arXiv
2208.02814), theorem 1. The use is ours:

- a ladder of *rungs*, kept cells m_1 < ... < m_R = all of them (dense);
- before the backbone runs, the scores s of an image say how much surprise a rung leaves out: the
  *uncovered* mass u_r, the share of softmax(s) outside of the m_r highest cells. It falls with r
  and is 0 where all are kept. The scores are those before border and text are put last: these
  cells are not chosen, but being coarse they move the embedding too (on phantoms u_r then goes
  with the distance, rank correlation .3; without them it goes against it at high rungs);
- at threshold t an image is computed at the lowest rung with u_r <= t;
- its loss is 1 if its embedding there is further from its dense embedding than a tolerance (cosine
  distance), else 0. The theorem needs a loss that never falls as t rises, so a rung also counts as
  failed where any rung above it failed. This can only overstate the risk;
- images of one patient are alike, patients are exchangeable: the risk is a mean over patients of the
  mean over their images, and n counts patients;
- the threshold is the largest with n / (n + 1) risk + 1 / (n + 1) <= alpha: the paper's rule for losses up
  to B = 1, its lambda turned round, because here a higher threshold risks more.

For an image of a new patient, drawn as the calibration patients were, the probability that its
embedding is off by more than the tolerance is then at most alpha, on average over calibration sets.
It promises nothing for a patient from elsewhere, nor for one hospital of several. Candidates are the
masses that occur, and 1: chosen from n + 1 patients they treat all alike, as the proof needs, though
the loss jumps at a candidate and not after it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor

POINTS = 24  # of the recorded curve
ROUNDING = 1e-12  # of alpha = 1 - confidence: nine patients are enough for 0.9


@dataclass(frozen=True)
class Point:
    """One way to choose rungs: the mean share of tokens of the images, the risk of the patients."""

    share: float
    risk: float


@dataclass(frozen=True)
class AutoKeep:
    """What a calibration found.

    Attributes:
        threshold: the largest uncovered mass that is allowed, in [0, 1]; None: all images dense.
        patients: calibrated on.
        curve: from dense to the cheapest threshold.
        fixed: every image at the same rung, one point a rung.
        reason: why all images are dense; None where they are not.
    """

    threshold: float | None
    patients: int
    curve: tuple[Point, ...]
    fixed: tuple[Point, ...]
    reason: str | None


def uncovered_mass(scores: Tensor, cells: Sequence[int]) -> Tensor:
    """Share of softmax(scores) outside of the m highest cells, for each m in ``cells``.

    Args:
        scores: [B, cells].
        cells: numbers of kept cells, rising; the last is all of them.

    Returns:
        [B, rungs] in [0, 1], float64, falling along each row to exactly 0.
    """
    rising = scores.double().softmax(1).sort(dim=1).values
    # summed from the smallest: a difference from 1 would not fall evenly, nor reach 0
    below = F.pad(rising.cumsum(1), (1, 0)).clamp_max(1)
    return below[:, [scores.shape[1] - m for m in cells]]


def rungs_for(uncovered: np.ndarray, threshold: float | None) -> np.ndarray:
    """Return the lowest rung [N] whose uncovered mass [N, rungs] is allowed; None allows dense alone."""
    if threshold is None:
        return np.full(len(uncovered), uncovered.shape[1] - 1)
    return (uncovered <= threshold).argmax(1)


def calibrate(
    distances: np.ndarray,
    uncovered: np.ndarray,
    patients: np.ndarray,
    shares: Sequence[float],
    alpha: float,
    tolerance: float,
) -> AutoKeep:
    """Choose the threshold of a stated risk, or dense with the reason.

    Args:
        distances: cosine distance of each image at each rung from its dense embedding [N, rungs]; the
            last column is dense and not read. Not-a-number counts as too far.
        uncovered: [N, rungs], of ``uncovered_mass``.
        patients: [N], equal for images of one patient.
        shares: of all tokens, that each rung computes [rungs], rising to 1.
        alpha: the risk that is allowed, in (0, 1).
        tolerance: the distance up to which embeddings count as equal.
    """
    n, needed = len(np.unique(patients)), math.ceil(1 / alpha - 1 - ROUNDING)
    if n < max(needed, 1):
        told = f"{n} patient{'' if n == 1 else 's'} to calibrate on"
        return AutoKeep(None, n, (), (), f"{told}, where the confidence of {1 - alpha:g} needs {needed}")
    weights = patient_weights(patients)
    failed = failures(distances, tolerance)
    candidates = np.unique(np.append(uncovered, 1.0))
    risks = _risks(candidates, uncovered, failed, weights)
    within = candidates[n / (n + 1) * risks + 1 / (n + 1) <= alpha + ROUNDING]
    fixed = tuple(Point(float(s), float(r)) for s, r in zip(shares, weights @ failed, strict=True))
    curve = _curve(candidates, risks, uncovered, np.asarray(shares))
    threshold = float(within[-1]) if len(within) else None
    rungs = rungs_for(uncovered, threshold)
    saving = rungs < uncovered.shape[1] - 1
    # where every saving is a failure, the risk that is allowed would be spent on nothing
    if failed[saving, rungs[saving]].all():
        return AutoKeep(None, n, curve, fixed, _unproven(fixed, n, alpha))
    return AutoKeep(threshold, n, curve, fixed, None)


def patient_weights(patients: np.ndarray) -> np.ndarray:
    """Weights of images [N] that sum to 1: patients count equally, and so do the images of one."""
    _, index, counts = np.unique(patients, return_inverse=True, return_counts=True)
    return 1 / (len(counts) * counts[index])


def failures(distances: np.ndarray, tolerance: float) -> np.ndarray:
    """Where a rung, or any rung above it, is too far from dense: [N, rungs], falling along each row."""
    far = ~(distances <= tolerance)
    far[:, -1] = False
    return np.logical_or.accumulate(far[:, ::-1], axis=1)[:, ::-1]


def _risks(
    candidates: np.ndarray, uncovered: np.ndarray, failed: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Risk at each candidate: an image fails from the mass of its highest failed rung upwards."""
    highest = np.maximum(failed.sum(1) - 1, 0)
    from_here = np.where(failed.any(1), uncovered[np.arange(len(uncovered)), highest], np.inf)
    order = np.argsort(from_here)
    sums = np.append(0.0, np.cumsum(weights[order]))
    return sums[np.searchsorted(from_here[order], candidates, side="right")]


def _curve(
    candidates: np.ndarray, risks: np.ndarray, uncovered: np.ndarray, shares: np.ndarray
) -> tuple[Point, ...]:
    """A few points of the trade-off: dense, then evenly spaced among the candidates to the last."""
    chosen = np.unique(np.linspace(0, len(candidates) - 1, POINTS).round().astype(int))
    dense = Point(1.0, 0.0)  # the lowest candidate is 0, and a mass may be rounded to it
    means = [float(shares[rungs_for(uncovered, float(candidates[i]))].mean()) for i in chosen]
    return (dense, *(Point(m, float(risks[i])) for m, i in zip(means, chosen, strict=True)))


def _unproven(fixed: Sequence[Point], n: int, alpha: float) -> str:
    if len(fixed) < 2:
        return "this backbone has nothing to leave out"
    best = fixed[-2]
    return (
        f"no saving can be promised at a risk of {alpha:.2g} from {n} patients: already with "
        f"{100 * best.share:.0f} % of the tokens, {100 * best.risk:.0f} % of the embeddings are off"
    )
