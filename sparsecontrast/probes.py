"""Linear probe, nearest neighbours, AUROC and its bootstrap: pure functions on arrays.

The statistics are of patients, not of images: label budgets, folds and resamples all draw whole
patients. An AUROC counts only pairs of one *stratum* (the source an image came from, or the fold
it was scored in): a score that merely tells two hospitals apart gains nothing from it.

Shape letters: N images, D width, M models, R resamples, P patients.
"""

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
INNER_FOLDS = 3
CHUNK = 4_000_000  # elements of one [R, N] block of the bootstrap: bounds its memory


@dataclass(frozen=True)
class Scored:
    """What one feature set says about the images of one cell.

    Attributes:
        scores: [M, N] higher means positive; one row a model.
        labels: [N] 0 or 1.
        patients: [N] whom each image shows.
        strata: [N] only pairs within one stratum are compared.
        weights: [M] share of each model in the mean, summing to 1.
    """

    scores: np.ndarray
    labels: np.ndarray
    patients: np.ndarray
    strata: np.ndarray
    weights: np.ndarray

    def select(self, rows: np.ndarray) -> "Scored":
        """Keep the images of ``rows`` (a mask or indices)."""
        return Scored(
            self.scores[:, rows], self.labels[rows], self.patients[rows], self.strata[rows], self.weights
        )


@dataclass(frozen=True)
class Interval:
    """A value with its percentile bootstrap interval; ``low`` is None where resamples failed."""

    value: float
    low: float | None
    high: float | None
    skipped: int


@dataclass(frozen=True)
class Probe:
    """A linear probe: standardise as on the training rows, then one weight per feature."""

    mean: np.ndarray
    scale: np.ndarray
    coefficients: np.ndarray
    intercept: float
    c: float
    chosen_by: str

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Return the log-odds [N] of features [N, D]."""
        return ((features - self.mean) / self.scale) @ self.coefficients + self.intercept


def downsampled_pixels(images: np.ndarray, size: int = 16) -> np.ndarray:
    """Area-average images [N, S, S] to [N, size * size] in [0, 1]; S need not be a multiple of size."""
    weights = _area_weights(images.shape[1], size)
    blocks = [
        np.einsum("ah,nhw,bw->nab", weights, chunk.astype(np.float32), weights, optimize=True)
        for chunk in np.array_split(images, max(1, len(images) // 256))
    ]
    return (np.concatenate(blocks) / 255.0).reshape(len(images), size * size).astype(np.float32)


def standardiser(train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and deviation [D] of features [N, D]; a constant feature keeps deviation 1."""
    scale = train.std(axis=0)
    return train.mean(axis=0), np.where(scale > 1e-8, scale, 1.0)


def fit_probe(
    features: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    grid: Sequence[float] = C_GRID,
) -> Probe:
    """Fit a logistic regression on frozen features, its strength chosen by validation AUROC.

    Args:
        features: [N, D] of the labelled training images.
        labels: [N] 0 or 1, both present.
        patients: [N]; without a usable validation set the choice is made by folds of patients.
        validation: features [V, D] and labels [V] that C is chosen on.
        grid: the values of C, scikit-learn's inverse strength, on features of unit variance.
    """
    mean, scale = standardiser(features)
    x = (features - mean) / scale
    if validation is not None and _both(validation[1]):
        quality = _path_quality(x, labels, (validation[0] - mean) / scale, validation[1], grid)
        chosen_by = "validation"
    else:
        quality, chosen_by = _inner_quality(x, labels, patients, grid)
    # The first of equal ones: the most strongly regularised.
    best = grid[int(np.argmax(quality))]
    model = next(iter(_path(x, labels, [best])))
    return Probe(mean, scale, model.coef_[0].copy(), float(model.intercept_[0]), best, chosen_by)


def knn_scores(train: np.ndarray, labels: np.ndarray, queries: np.ndarray, neighbours: int) -> np.ndarray:
    """Return the share of positives among the ``neighbours`` nearest by cosine, for each query [Q].

    Features are standardised on ``train`` first: without it the mean image decides the angle.
    """
    mean, scale = standardiser(train)
    near = _unit((train - mean) / scale)
    similarity = _unit((queries - mean) / scale) @ near.T
    order = np.argsort(-similarity, axis=1, kind="stable")[:, : min(neighbours, len(train))]
    return labels[order].mean(axis=1)


def patient_order(patients: Iterable[str], seed: int, purpose: str) -> list[str]:
    """Order patients by a seeded hash: a patient's place among others never depends on row order."""
    return sorted(set(patients), key=lambda p: hashlib.sha256(f"{seed}:{purpose}:{p}".encode()).digest())


def label_budget(patients: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Mask [N] of the images whose labels a budget of ``fraction`` of the patients buys.

    Budgets are nested: 1 % is part of 10 % is part of 100 %. At least one patient is bought.
    """
    order = patient_order(patients.tolist(), seed, "labels")
    bought = set(order[: max(1, int(np.ceil(fraction * len(order) - 1e-9)))])
    return np.array([p in bought for p in patients.tolist()], dtype=bool)


def patient_folds(patients: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Fold number [N] of every image; a patient lies in one fold, folds differ by at most one patient."""
    place = {p: i % folds for i, p in enumerate(patient_order(patients.tolist(), seed, "folds"))}
    return np.array([place[p] for p in patients.tolist()], dtype=np.int64)


def auroc(scores: np.ndarray, labels: np.ndarray, strata: np.ndarray | None = None) -> float:
    """Probability that a positive outscores a negative of its stratum, ties counting half.

    NaN where no stratum holds both classes. With one stratum it equals scikit-learn's
    ``roc_auc_score``.
    """
    strata = np.zeros(len(labels), dtype=np.int64) if strata is None else strata
    return float(_weighted_auroc(scores, labels, strata, np.ones((1, len(labels))))[0])


def mean_auroc(cells: Sequence[Scored]) -> float:
    """AUROC averaged over models by their weight, then over ``cells`` (the labels of a macro)."""
    return float(
        np.mean(
            [
                sum(w * auroc(s, c.labels, c.strata) for s, w in zip(c.scores, c.weights, strict=True))
                for c in cells
            ]
        )
    )


def bootstrap(cells: Sequence[Scored], replicates: int, seed: int) -> Interval:
    """Percentile 95 % interval of ``mean_auroc`` over resampled patients.

    A resample in which any label lost one class is skipped and counted; where more than half are,
    there is no interval.
    """
    counts = _PatientCounts(cells, replicates, seed)
    return _interval(mean_auroc(cells), counts.statistics(cells))


def paired_bootstrap(
    first: Sequence[Scored], second: Sequence[Scored], replicates: int, seed: int
) -> Interval:
    """Interval of ``mean_auroc(first) - mean_auroc(second)``, both on the same resampled patients."""
    for a, b in zip(first, second, strict=True):
        if not np.array_equal(a.patients, b.patients) or not np.array_equal(a.labels, b.labels):
            raise ValueError("paired_bootstrap: both sides must score the same images")
    counts = _PatientCounts(first, replicates, seed)
    value = mean_auroc(first) - mean_auroc(second)
    return _interval(value, counts.statistics(first) - counts.statistics(second))


def seeds_bootstrap(
    first: Sequence[Scored], second: Sequence[Scored], replicates: int, seed: int
) -> Interval:
    """``paired_bootstrap`` over patients and models at once: model i of both sides is of one seed.

    Models of equal weights; a resample draws as many of them as there are, in pairs.
    """
    models = len(first[0].scores)
    if {len(cell.scores) for cell in (*first, *second)} != {models}:
        raise ValueError("seeds_bootstrap: both sides need the same number of models")
    one, other = (resampled_models(cells, replicates, seed) for cells in (first, second))
    return paired_interval(mean_auroc(first) - mean_auroc(second), one, other, seed)


def resampled_models(cells: Sequence[Scored], replicates: int, seed: int) -> np.ndarray:
    """AUROC of each model in each resample of patients, the mean over ``cells``: [models, R]."""
    counts = _PatientCounts(cells, replicates, seed)
    models = range(len(cells[0].scores))
    alone = ([replace(c, scores=c.scores[[i]], weights=np.ones(1)) for c in cells] for i in models)
    return np.stack([counts.statistics(cell) for cell in alone])


def paired_interval(value: float, first: np.ndarray, second: np.ndarray, seed: int) -> Interval:
    """Interval over patients and models of two ``resampled_models`` [models, R] of the same patients."""
    models, replicates = first.shape
    drawn = np.random.Generator(np.random.PCG64([seed, models])).multinomial(
        models, np.full(models, 1 / models), size=replicates
    )
    return _interval(value, (drawn.T / models * (first - second)).sum(0))


def _model(cell: Scored, i: int) -> Scored:
    return replace(cell, scores=cell.scores[[i]], weights=np.ones(1))


class _PatientCounts:
    """How often each patient was drawn in each resample: [R, P]."""

    def __init__(self, cells: Sequence[Scored], replicates: int, seed: int):
        self.names = np.unique(np.concatenate([c.patients for c in cells]))
        total = len(self.names)
        generator = np.random.Generator(np.random.PCG64(seed))
        self.counts = generator.multinomial(total, np.full(total, 1 / total), size=replicates)

    def statistics(self, cells: Sequence[Scored]) -> np.ndarray:
        """``mean_auroc`` of every resample [R]; NaN where it cannot be computed."""
        total = np.zeros(len(self.counts))
        for cell in cells:
            codes = np.searchsorted(self.names, cell.patients)
            step = max(1, CHUNK // max(1, len(codes)))
            for start in range(0, len(self.counts), step):
                drawn = self.counts[start : start + step][:, codes].astype(np.float64)
                for scores, weight in zip(cell.scores, cell.weights, strict=True):
                    value = _weighted_auroc(scores, cell.labels, cell.strata, drawn)
                    total[start : start + step] += weight * value
        return total / len(cells)


def _weighted_auroc(
    scores: np.ndarray, labels: np.ndarray, strata: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """AUROC [R] of N images under R weightings [R, N], in one sort.

    Images of equal score form a group; a positive beats every negative of the lower groups of its
    stratum and half of those of its own group.
    """
    codes = np.unique(strata, return_inverse=True)[1]
    order = np.lexsort((scores, codes))
    scores, codes, labels = scores[order], codes[order], np.asarray(labels)[order]
    new_stratum = np.r_[True, codes[1:] != codes[:-1]]
    first = np.flatnonzero(new_stratum | np.r_[True, scores[1:] != scores[:-1]])
    positive = np.add.reduceat(weights[:, order] * (labels == 1), first, axis=1)
    negative = np.add.reduceat(weights[:, order] * (labels == 0), first, axis=1)
    starts = np.flatnonzero(new_stratum[first])  # groups that open a stratum
    below = np.cumsum(negative, axis=1) - negative
    below -= np.repeat(below[:, starts], np.diff(np.r_[starts, len(first)]), axis=1)
    wins = (positive * (below + 0.5 * negative)).sum(axis=1)
    pairs = (np.add.reduceat(positive, starts, axis=1) * np.add.reduceat(negative, starts, axis=1)).sum(
        axis=1
    )
    return np.divide(wins, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def _interval(value: float, resampled: np.ndarray) -> Interval:
    usable = resampled[np.isfinite(resampled)]
    skipped = len(resampled) - len(usable)
    if len(usable) == 0 or skipped > len(resampled) / 2:
        return Interval(value, None, None, skipped)
    low, high = np.percentile(usable, [2.5, 97.5])
    return Interval(value, float(low), float(high), skipped)


def _area_weights(size: int, cells: int) -> np.ndarray:
    """Rows [cells, size] that average the pixels under each cell, by the area they share."""
    edges = np.linspace(0, size, cells + 1)
    pixel = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    overlap = np.clip(overlap, 0, None)
    return (overlap / overlap.sum(axis=1, keepdims=True)).astype(np.float32)


def _both(labels: np.ndarray) -> bool:
    return bool((labels == 1).any() and (labels == 0).any())


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _path(x: np.ndarray, y: np.ndarray, grid: Sequence[float]):
    """Yield one regression fitted at each C, every fit starting from the one before."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=500, warm_start=True)
    for c in grid:
        model.set_params(C=c)
        with warnings.catch_warnings():
            # At weak regularisation separable data has no finite optimum; validation then picks another C.
            warnings.simplefilter("ignore", ConvergenceWarning)
            yield model.fit(x, y.astype(np.int64))


def _path_quality(x, y, query, truth, grid: Sequence[float]) -> np.ndarray:
    return np.array([auroc(model.decision_function(query), truth) for model in _path(x, y, grid)])


def _inner_quality(x, y, patients, grid: Sequence[float]) -> tuple[np.ndarray, str]:
    """Mean AUROC at each C over folds of the training patients that have both classes on both sides."""
    folds = patient_folds(patients, INNER_FOLDS, 0)
    quality = [
        _path_quality(x[folds != f], y[folds != f], x[folds == f], y[folds == f], grid)
        for f in range(INNER_FOLDS)
        if _both(y[folds == f]) and _both(y[folds != f])
    ]
    if quality:
        return np.mean(quality, axis=0), "folds of the training patients"
    fixed = np.array([-abs(np.log10(c / 1e-2)) for c in grid])
    return fixed, "fixed: too few patients to choose"
