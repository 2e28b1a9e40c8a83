"""What ``evaluation.keep=auto`` saves, by what it promises, and what the promise was worth.

    python -m benchmarks.auto_keep RUN [RUN ...] [--quick] [--json FILE]

RUN is a trained run folder; several differ in their seed alone, as those of
``python -m simulation experiment=laptop seed=S output_dir=RUN``. Every row is one promise (or, ``fixed``,
every image at one share), the mean over runs: the share of tokens that held-out images were computed with,
the share of patients whose embedding is off by more than the tolerance, and AUROC of the linear probe less
that of dense inference, its interval over patients and seeds together. ``time_of_dense`` is CPU time on one
thread, the scorer in it, the median of interleaved ratios, of 64 images at once and of one. ``dense_runs``
counts runs for which nothing could be promised: dense, and says so.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import print_table, write_result
from sparsecontrast import probes
from sparsecontrast.auto_encode import Reader, calibration_rows, distance, make_reader
from sparsecontrast.auto_keep import calibrate, patient_weights, rungs_for
from sparsecontrast.data.transforms import evaluation_view
from sparsecontrast.errors import ConfigError
from sparsecontrast.evaluation import run_dataset, run_sites
from sparsecontrast.features import BATCH, frozen_method, trained_round
from sparsecontrast.runs import Run, read_run
from sparsecontrast.scoring import METRICS, POOLED, Features, Scorer
from sparsecontrast.tasks import Table, Task, make_table, parse_tasks

CONFIDENCES, TOLERANCES = (0.8, 0.9, 0.95, 0.99), (0.02, 0.05, 0.1)
REPLICATES, REPEATS = 1000, 15
Row = dict[str, Any]


@dataclass(frozen=True)
class Ladder:
    """One run's images, read at every rung.

    Attributes:
        reader: of its network.
        embeddings: [rungs, N, D], the last dense.
        uncovered: [N, rungs].
        views: some images of the scored split, for the clock [B, 1, H, W].
    """

    reader: Reader
    embeddings: np.ndarray
    uncovered: np.ndarray
    views: torch.Tensor

    def distances(self) -> np.ndarray:
        """Cosine distance of each rung from dense [N, rungs]."""
        dense = torch.from_numpy(self.embeddings[-1])
        return np.stack([distance(torch.from_numpy(e), dense) for e in self.embeddings], axis=1)


def main(argv: Sequence[str] | None = None) -> None:
    """Read, judge, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--quick", action="store_true", help="one promise, few resamples")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    runs = [read_run(folder) for folder in args.runs]
    ladders, table, tasks = read_all(runs)
    rows = measure(ladders, table, tasks, args.quick)
    print_table("keep=auto", rows)
    if args.json:
        seeds = " ".join(f"RUN_{run.config.seed}" for run in runs)
        write_result(
            "auto_keep",
            f"python -m benchmarks.auto_keep {seeds}{' --quick' if args.quick else ''}",
            rows,
            args.json,
        )


def read_all(runs: Sequence[Run]) -> tuple[list[Ladder], Table, tuple[Task, ...]]:
    """Read every run's images at every rung.

    Raises:
        ConfigError: the runs are of other images or splits, so that their scores do not pair.
    """
    ladders, tables = [], []
    for run in runs:
        dataset = run_dataset(run)
        tables.append(make_table(dataset.frame, run_sites(run, dataset)))
        ladders.append(_climb(run, dataset.images, tables[-1]))
        if not np.array_equal(tables[-1].splits, tables[0].splits):
            raise ConfigError(f"{run.folder}: its images or splits are not those of {runs[0].folder}")
    return ladders, tables[0], parse_tasks(runs[0].config.evaluation.tasks, tables[0])


@torch.no_grad()
def _climb(run: Run, images: np.ndarray, table: Table) -> Ladder:
    method, device = frozen_method(run.config, trained_round(run).tensors)
    reader = make_reader(method)
    every, uncovered = [], []
    for start in range(0, len(images), BATCH):
        view = _view(images[start : start + BATCH], run).to(device)
        scores, ranking = method.score(view)
        rungs = [reader.at(view, ranking, rung).float().cpu() for rung in range(len(reader.cells))]
        every.append(torch.stack(rungs))
        uncovered.append(reader.uncovered(scores))
    scored = np.flatnonzero(table.splits == table.scored_split)[:BATCH]
    views = _view(images[scored], run).to(device)
    return Ladder(reader, torch.cat(every, 1).numpy(), np.concatenate(uncovered), views)


def _view(images: np.ndarray, run: Run) -> torch.Tensor:
    return evaluation_view(torch.from_numpy(np.ascontiguousarray(images)), run.config.backbone.img_size)


def measure(ladders: Sequence[Ladder], table: Table, tasks: Sequence[Task], quick: bool = False) -> list[Row]:
    """Give the rows: dense, every promise, every fixed share."""
    replicates, repeats = (50, 2) if quick else (REPLICATES, REPEATS)
    scorer, count = Scorer((1.0,), 20, replicates, 0), len(ladders[0].reader.cells)
    judge = Judge(scorer, table, tasks, tuple(one.embeddings[-1] for one in ladders))
    promises = [(0.95, 0.05)] if quick else list(itertools.product(CONFIDENCES, TOLERANCES))
    rows = [promise(ladders, table, judge, *one, repeats) for one in promises]
    for rung in range(1 if quick else count):
        taken = [np.full(len(table.splits), rung) for _ in ladders]
        runs = [lambda x, one=one, rung=rung: _fixed(one.reader, x, rung) for one in ladders]
        row = {"keep": "fixed", **_share(ladders, taken, table), **judge(_chosen(ladders, taken))}
        rows.append({**row, **_times(ladders, runs, repeats)})
    return rows


def promise(
    ladders: Sequence[Ladder], table: Table, judge: "Judge", confidence: float, tolerance: float, repeats: int
) -> Row:
    """Calibrate every run for one promise, and hold it to its held-out patients."""
    rows, scored = calibration_rows(table), np.flatnonzero(table.splits == table.scored_split)
    taken, thresholds, risks = [], [], []
    for one in ladders:
        distances = one.distances()
        told = (distances[rows], one.uncovered[rows], table.patients[rows], one.reader.shares)
        found = calibrate(*told, 1 - confidence, tolerance)
        taken.append(rungs_for(one.uncovered, found.threshold))
        thresholds.append(found.threshold)
        off = distances[scored, taken[-1][scored]] > tolerance
        risks.append(float(patient_weights(table.patients[scored]) @ off))
    runs = [
        lambda x, one=one, t=t: one.reader.encode(x, t) for one, t in zip(ladders, thresholds, strict=True)
    ]
    return {
        "keep": "auto", "confidence": confidence, "tolerance": tolerance,
        **_share(ladders, taken, table), "allowed_risk": round(1 - confidence, 4),
        "measured_risk": round(statistics.mean(risks), 4), "worst_risk": round(max(risks), 4),
        "dense_runs": sum(t is None for t in thresholds),
        **judge(_chosen(ladders, taken)), **_times(ladders, runs, repeats),
    }  # fmt: skip


@dataclass(frozen=True)
class Judge:
    """Compares features [N, D] of each run with its dense ones: AUROC over all tasks, and the difference."""

    scorer: Scorer
    table: Table
    tasks: Sequence[Task]
    dense: tuple[np.ndarray, ...]

    def __call__(self, chosen: tuple[np.ndarray, ...]) -> Row:
        """Return AUROC, the mean over runs and labels, minus dense with its interval."""
        mine, other = self._cells(chosen), self._cells(self.dense)
        found = probes.seeds_bootstrap(mine, other, self.scorer.replicates, 0)
        told = {"auroc": probes.mean_auroc(mine), "minus_dense": found.value,
                "minus_dense_low": found.low, "minus_dense_high": found.high}  # fmt: skip
        return {key: None if value is None else round(float(value), 4) for key, value in told.items()}

    def _cells(self, models: tuple[np.ndarray, ...]) -> list[probes.Scored]:
        one = Features("chosen", models)
        found = [
            cell
            for task in self.tasks
            for cell in self.scorer.cells(one, task, self.table, 1.0, METRICS[0])
            if cell.site in (POOLED, task.site) and not cell.reason and len(cell.scored) == 1
        ]
        return [scored for cell in found for scored in cell.scored]


def _chosen(ladders: Sequence[Ladder], taken: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    pairs = zip(ladders, taken, strict=True)
    return tuple(one.embeddings[rungs, np.arange(len(rungs))] for one, rungs in pairs)


def _share(ladders: Sequence[Ladder], taken: Sequence[np.ndarray], table: Table) -> Row:
    scored = table.splits == table.scored_split
    pairs = zip(ladders, taken, strict=True)
    shares = [float(np.asarray(one.reader.shares)[rungs[scored]].mean()) for one, rungs in pairs]
    return {"runs": len(ladders), "share": round(statistics.mean(shares), 4)}


def _fixed(reader: Reader, view: torch.Tensor, rung: int) -> torch.Tensor:
    return reader.at(view, reader.method.score(view)[1], rung)


def _times(ladders: Sequence[Ladder], runs: Sequence[Callable[[torch.Tensor], Any]], repeats: int) -> Row:
    """CPU time over that of dense inference, interleaved: of a batch, and of one image after the other."""
    pairs = list(zip(ladders, runs, strict=True))
    batch = [_ratio(one.reader.dense, run, [one.views] * repeats) for one, run in pairs]
    single = [_ratio(one.reader.dense, run, list(one.views[: 2 * repeats].split(1))) for one, run in pairs]
    return {
        "time_of_dense": round(statistics.mean(batch), 3),
        "time_of_dense_one": round(statistics.mean(single), 3),
    }


@torch.no_grad()
def _ratio(dense: Callable[..., Any], run: Callable[..., Any], views: Sequence[torch.Tensor]) -> float:
    ratios = []
    for view in views:
        spent = []
        for work in (dense, run):
            start = time.process_time()
            work(view)
            spent.append(time.process_time() - start)
        ratios.append(spent[1] / spent[0])
    return statistics.median(ratios)


if __name__ == "__main__":
    main()
