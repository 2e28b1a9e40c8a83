"""Accuracy, macro-F1 and their intervals: pure functions on arrays."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Scored:
    """A value and its 95 % percentile interval over resampled groups."""

    value: float
    low: float
    high: float


def accuracy(labels: np.ndarray, said: np.ndarray, classes: int) -> float:
    """Share of pictures [N] that were named rightly."""
    return float((labels == said).mean())


def macro_f1(labels: np.ndarray, said: np.ndarray, classes: int) -> float:
    """Mean over classes of F1; a class that neither is there nor was said is left out of the mean."""
    counts = confusion(labels, said, classes)
    right, total = np.diag(counts), counts.sum(0) + counts.sum(1)
    there = total > 0
    return float((2 * right[there] / total[there]).mean())


def confusion(labels: np.ndarray, said: np.ndarray, classes: int) -> np.ndarray:
    """Count pictures by class (row) and by what was said (column): [C, C]."""
    return np.bincount(labels * classes + said, minlength=classes * classes).reshape(classes, classes)


def bootstrap(
    score: Callable[[np.ndarray, np.ndarray, int], float], labels: np.ndarray, said: np.ndarray,
    groups: Sequence[str] | np.ndarray, classes: int, replicates: int, seed: int,
) -> Scored:  # fmt: skip
    """Score with an interval; whole groups are drawn, with repeats.

    Args:
        score: ``accuracy`` or ``macro_f1``.
        labels: classes [N].
        said: classes [N].
        groups: of each picture [N].
        classes: C.
        replicates: resamples.
        seed: of the resampling.
    """
    members = [np.flatnonzero(np.asarray(groups) == g) for g in np.unique(np.asarray(groups))]
    draw = np.random.default_rng(seed)
    values = []
    for _ in range(replicates):
        rows = np.concatenate([members[i] for i in draw.integers(0, len(members), len(members))])
        values.append(score(labels[rows], said[rows], classes))
    low, high = np.quantile(values, [0.025, 0.975]).tolist()
    return Scored(score(labels, said, classes), low, high)
