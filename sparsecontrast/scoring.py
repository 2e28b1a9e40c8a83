"""Features and tasks -> rows of scores: every cell a number with an interval, or a reason why not.

A cell is (features, task, label or macro, site, label fraction, metric). One probe is fitted per
label and fraction, on the labelled training images of all sites the task speaks about; the scores
of the held-out images are then cut by site. Label budgets, folds and resamples are the same for
every feature set, so differences are paired.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsecontrast import probes
from sparsecontrast.probes import Interval, Scored
from sparsecontrast.tasks import Division, Table, Task, divisions, labelled_rows

POOLED = "pooled"
MACRO = "macro"
METRICS = ("linear_probe_auroc", "knn_auroc")


@dataclass(frozen=True)
class Features:
    """Frozen features of all N images.

    Attributes:
        name: as shown in tables.
        models: [N, D] each; more than one where every site trained its own, or one for each seed.
        sites: the site of each model: a cell is then scored by the models of the sites that hold its
            images, each weighted by its share of them. Empty for models of all sites, which count equally.
    """

    name: str
    models: tuple[np.ndarray, ...]
    sites: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scorer:
    """Settings that all cells share.

    Attributes:
        fractions: label budgets in (0, 1].
        neighbours: k of the nearest-neighbour score.
        replicates: resamples of the bootstrap.
        seed: of budgets, folds and resamples.
    """

    fractions: tuple[float, ...]
    neighbours: int
    replicates: int
    seed: int

    def rows(
        self,
        features: Sequence[Features],
        table: Table,
        tasks: Sequence[Task],
        tick: Callable[[str], None],
        keep: "Keep | None" = None,
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Score everything; the second list holds the first feature set minus each other one.

        Args:
            features: the trained ones first, baselines after.
            table: aligned with the features' rows.
            tasks: from ``parse_tasks``.
            tick: called with a word once a (feature set, task, fraction, metric) is done.
            keep: called with the cells of each, their scores in them.
        """
        rows, differences = [], []
        for task in tasks:
            for fraction in self.fractions:
                for metric in METRICS:
                    cells = {}
                    for one in features:
                        cells[one.name] = self.cells(one, task, table, fraction, metric)
                        rows += [self._row(one.name, task, fraction, metric, c) for c in cells[one.name]]
                        if keep is not None:
                            keep(one.name, task, fraction, metric, cells[one.name])
                        tick(f"{one.name}: {task.name}, {fraction:.0%} of the labels")
                    if metric == METRICS[0]:
                        differences += self._differences(cells, task, fraction, metric)
        return rows, differences

    def cells(self, one: Features, task: Task, table: Table, fraction: float, metric: str) -> list["Cell"]:
        """Score one feature set: its labels, and their macro where there are several, at each site."""
        scored = {
            label: self._score_label(one, task, label, table, fraction, metric) for label in task.labels
        }
        cells = []
        for site in _sites(task, table):
            cut = task.site is None and site != POOLED
            parts = [_cut(label, site, cut, scored[label], one, table) for label in task.labels]
            cells += parts
            if len(parts) > 1:
                cells.append(_macro(site, parts))
        return cells

    def _score_label(
        self, one: Features, task: Task, label: str, table: Table, fraction: float, metric: str
    ) -> "_Label":
        """Score the held-out images of one label with every model, or say why that cannot be done."""
        rows = labelled_rows(task, label, table)
        parts = divisions(task, rows, table, self.seed)
        trains = [d.train[probes.label_budget(table.patients[d.train], fraction, self.seed)] for d in parts]
        held_out = np.concatenate([d.test for d in parts])
        labels = table.labels[label]
        trained = int(np.mean([len(set(table.patients[t])) for t in trains]))
        reason = _why_not(labels[rows], [labels[t] for t in trains], len(held_out))
        if reason:
            return _Label(held_out, None, None, trained, reason)
        strata = np.concatenate([[f"{d.fold}|{s}" for s in table.sources[d.test]] for d in parts])
        scores = np.full((len(one.models), len(held_out)), np.nan)
        for m, x in enumerate(one.models):
            # A model whose site holds none of these images is never asked about them.
            if not one.sites or one.sites[m] in table.sites[held_out]:
                scores[m] = np.concatenate(
                    [self._score(x, d, t, labels, table, metric) for d, t in zip(parts, trains, strict=True)]
                )
        return _Label(held_out, scores, strata, trained, None, labels[held_out])

    def _score(
        self, x: np.ndarray, part: Division, train: np.ndarray, labels: np.ndarray, table: Table, metric: str
    ) -> np.ndarray:
        if metric == "knn_auroc":
            return probes.knn_scores(x[train], labels[train], x[part.test], self.neighbours)
        validation = (x[part.validation], labels[part.validation]) if len(part.validation) else None
        probe = probes.fit_probe(x[train], labels[train], table.patients[train], validation)
        return probe.scores(x[part.test])

    def _row(self, name: str, task: Task, fraction: float, metric: str, cell: "Cell") -> dict[str, Any]:
        found = None if cell.reason else probes.bootstrap(cell.scored, self.replicates, self.seed)
        return self._record(name, task, fraction, metric, cell, found)

    def _differences(
        self, cells: dict[str, list["Cell"]], task: Task, fraction: float, metric: str
    ) -> Iterator[dict[str, Any]]:
        first, *others = cells
        for name in others:
            for a, b in zip(cells[first], cells[name], strict=True):
                if a.reason or b.reason or (a.site != POOLED and task.site is None):
                    continue
                found = probes.paired_bootstrap(a.scored, b.scored, self.replicates, self.seed)
                yield self._record(f"{first} - {name}", task, fraction, f"{metric}_difference", a, found)

    def _record(
        self, name: str, task: Task, fraction: float, metric: str, cell: "Cell", found: Interval | None
    ) -> dict[str, Any]:
        reason = cell.reason
        if found is not None and found.low is None:
            reason = f"no interval: {found.skipped} of {self.replicates} resamples lost a class"
        return {
            "features": name, "task": task.name, "label": cell.label, "site": cell.site,
            "fraction": fraction, "metric": metric,
            "value": None if found is None else found.value,
            "low": None if found is None else found.low,
            "high": None if found is None else found.high,
            "n_patients": cell.patients, "n_images": cell.images, "n_positive": cell.positives,
            "n_train_patients": cell.trained,
            "labels_used": len(cell.scored), "labels_asked": len(task.labels) if cell.label == MACRO else 1,
            "skipped": 0 if found is None else found.skipped, "reason": reason,
        }  # fmt: skip


@dataclass(frozen=True)
class _Label:
    """Scores [M, n] of the held-out images of one label."""

    rows: np.ndarray
    scores: np.ndarray | None
    strata: np.ndarray | None
    trained: int
    reason: str | None
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class Cell:
    """One label or macro at one site; ``scored`` is empty where ``reason`` says why.

    ``rows`` says of each of ``scored`` which rows of the table it holds.
    """

    label: str
    site: str
    scored: tuple[Scored, ...]
    patients: int
    images: int
    positives: int
    trained: int
    reason: str | None
    rows: tuple[np.ndarray, ...] = ()


Keep = Callable[[str, Task, float, str, list[Cell]], None]


def _sites(task: Task, table: Table) -> list[str]:
    """Where a task is judged; one site needs no row beside the pooled one."""
    if task.site is not None:
        return [task.site]
    sites = sorted(set(table.sites.tolist()))
    return [POOLED, *sites] if len(sites) > 1 else [POOLED]


def _why_not(labels: np.ndarray, trains: list[np.ndarray], held_out: int) -> str | None:
    if not (labels == 1).any():
        return "not computable: no positives" if len(labels) else "not computable: no labelled image"
    if not (labels == 0).any():
        return "not computable: no negatives"
    if held_out == 0:
        return "not computable: no labelled image is held out"
    if any(not (t == 1).any() or not (t == 0).any() for t in trains):
        return "not computable: the label budget buys patients of one class only"
    return None


def _cut(label: str, site: str, cut: bool, found: _Label, one: Features, table: Table) -> Cell:
    """Cut a label's scores to a training site; pairs are compared within a source and fold only."""
    here = np.flatnonzero(table.sites[found.rows] == site) if cut else np.arange(len(found.rows))
    rows = found.rows[here]
    patients = table.patients[rows]
    truth = table.labels[label][rows]
    positives = int((truth == 1).sum())
    counts = (len(set(patients.tolist())), len(rows), positives, found.trained)
    reason = found.reason or _why_not_here(truth, None if found.strata is None else found.strata[here])
    if reason or found.scores is None or found.strata is None:
        return Cell(label, site, (), *counts, reason)
    weights = _weights(one, table.sites[rows])
    used = weights > 0
    if not used.any():
        return Cell(label, site, (), *counts, "not computable: no model was trained at these sites")
    scored = Scored(found.scores[used][:, here], truth, patients, found.strata[here], weights[used])
    return Cell(label, site, (scored,), *counts, None, (rows,))


def _why_not_here(truth: np.ndarray, strata: np.ndarray | None) -> str | None:
    if len(truth) == 0:
        return "not computable: no labelled image is held out"
    if not (truth == 1).any():
        return "not computable: no positives"
    if not (truth == 0).any():
        return "not computable: no negatives"
    if strata is not None and np.isnan(probes.auroc(np.zeros(len(truth)), truth, strata)):
        return "not computable: no source holds both classes"
    return None


def _weights(one: Features, sites: np.ndarray) -> np.ndarray:
    """Share of each model [M] in a cell whose images lie at ``sites``."""
    if not one.sites:
        return np.full(len(one.models), 1 / len(one.models))
    held = np.array([(sites == s).sum() for s in one.sites], dtype=float)
    return held / max(held.sum(), 1.0)


def _macro(site: str, parts: list[Cell]) -> Cell:
    """Mean over the labels that can be computed; how many those are is part of the row."""
    usable = [p for p in parts if not p.reason]
    largest = max(parts, key=lambda p: p.images)
    counts = (largest.patients, largest.images, sum(p.positives for p in usable), largest.trained)
    reason = None if usable else f"not computable: none of {len(parts)} labels can be judged"
    scored, rows = tuple(s for p in usable for s in p.scored), tuple(r for p in usable for r in p.rows)
    return Cell(MACRO, site, scored, *counts, reason, rows)
