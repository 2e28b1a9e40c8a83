"""Is sparse as good as dense? Probe AUROC of every arm, paired seeds, on phantoms and real films.

    python -m benchmarks.quality [--quick] [--json FILE] [--root ../shared/data/cxr_multisite]
    python -m benchmarks.quality --method miram [--mammograms ../shared/data/mias] [...]
    python -m benchmarks.quality --protocol gpu|gpu_small|cnn [...]     # needs a GPU, a GPU, nothing

All arms of a seed start from equal backbones and see the same batches and views for the same number of
steps; two more get as much CPU time as the dense arm took. Whatever is trained is asked by a linear
probe on patients that training never saw. Runs are kept under ``--out`` and continued when the command
is given again; ``--workers`` of them run at a time, one thread each.

With ``--method miram`` the arms are those of ``quality_miram.py``, set against a plain masked autoencoder.
Mammograms are too few for one split: there alone the probe is cross-validated by patient, and films of the
split train were seen in pretraining, without their labels, by every arm alike.
"""

import argparse
import dataclasses
import itertools
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import quality_arms as qa
from benchmarks import quality_miram as qm
from benchmarks.films import NAMES, PARTS, labels_by_size, load_films
from benchmarks.record import print_table, write_result
from sparsecontrast import probes
from sparsecontrast.config import compose
from sparsecontrast.data.dataset import Dataset
from sparsecontrast.scoring import Cell, Features, Scorer
from sparsecontrast.tasks import Task, make_table, parse_tasks

METRIC = "linear_probe_auroc"
SEEDS = [0, 1, 2, 3, 4]
QUICK = qa.Protocol(size=32, patch=4, depth=1, steps=2, batch=8)
CHEST_TASKS = (
    "evaluation.tasks=[{name: bacterial against viral, label: bacterial, where: pneumonia},"
    "{name: pneumonia against normal, label: pneumonia}]"
)
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


@dataclasses.dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        reference: the arm that all others are set against, and whose time is theirs.
        ours: the arm that is set against all others.
        data: names that ``films.load_films`` knows.
        protocols: the budgets by name, ``cpu`` first, and ``quick``, a toy.
        arms: the arms of a budget, by name.
        train: as ``quality_arms.train_arm``.
        untrained: features of the backbone that a seed starts from, of (protocol, seed, images).
    """

    reference: str
    ours: str
    data: tuple[str, ...]
    protocols: Mapping[str, qa.Protocol]
    quick: qa.Protocol
    arms: Callable[[Any], dict[str, Any]]
    train: Callable[..., qa.Trained]
    untrained: Callable[[Any, int, np.ndarray], np.ndarray]


STUDIES = {
    "sparse_contrast": Study(
        "dense", "ours", NAMES, qa.PROTOCOLS, QUICK, qa.arms, qa.train_arm, qa.untrained
    ),
    "miram": Study(
        "mae", "miram", ("phantoms", *PARTS), qm.PROTOCOLS, qm.QUICK, qm.arms, qm.train_arm, qm.untrained
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, then score all and record the table."""
    args = _arguments(argv)
    study = STUDIES[args.method]
    protocol = study.quick if args.quick else study.protocols[args.protocol]
    if args.steps is not None:
        protocol = dataclasses.replace(protocol, steps=args.steps)
    if args.one:
        train_one(args, protocol, *args.one)
        return
    jobs = [job for job in _jobs(args, protocol) if not _trained(args, protocol, job)]
    with ThreadPoolExecutor(args.workers) as pool:
        for data in dict.fromkeys(job[0] for job in jobs):
            dataset(args, protocol, data)  # the cache that all workers read
        list(pool.map(lambda job: _call(args, job), jobs))
    rows = [row for data in args.data for row in score(args, protocol, data)]
    print_table("Linear-probe AUROC, mean over seeds", rows)
    if args.json:
        name = "quality" if args.method == "sparse_contrast" else f"quality-{args.method}"
        name += "" if args.protocol == "cpu" else f"-{args.protocol}"
        write_result(name, _command(args), rows, args.json)


def train_one(args: argparse.Namespace, protocol: qa.Protocol, data: str, seed: str, name: str) -> None:
    """Train one arm of one seed and keep its features."""
    torch.set_num_threads(1)
    study = STUDIES[args.method]
    arm = study.arms(protocol)[name]
    found = dataset(args, protocol, data)
    train = np.flatnonzero(found.frame["split"].to_numpy(dtype=str) == "train")
    steps = protocol.steps
    if arm.same_time_as:
        steps = qa.equal_time_steps(
            *(qa.load(_file(args, data, seed, n)) for n in (study.reference, arm.same_time_as))
        )
    trained = study.train(arm, protocol, found.images, train, int(seed), steps)
    qa.save(trained, _file(args, data, seed, name))


def dataset(args: argparse.Namespace, protocol: qa.Protocol, data: str) -> Dataset:
    """Load the images of one data set; the phantoms do not depend on the seed."""
    patients = 12 if args.quick else 400
    root = args.mammograms if data == "mias" else args.root
    return load_films(data, protocol.size, protocol.patch, patients, root, args.out)


def score(args: argparse.Namespace, protocol: qa.Protocol, data: str) -> list[dict[str, Any]]:
    """Rows of one data set: each arm and mode, each label and macro, beside its differences."""
    study = STUDIES[args.method]
    found = dataset(args, protocol, data)
    table = make_table(found.frame)
    tasks = parse_tasks(compose(_tasks(args, data)).evaluation.tasks, table)
    if data == "phantoms":
        sized = labels_by_size(found, protocol.grain)
        table = dataclasses.replace(table, labels={**table.labels, **sized})
        tasks = (*tasks, Task("by size", tuple(sized)))
    replicates = 50 if args.quick else 1000
    scorer = Scorer((1.0,), 20, replicates, 0)
    sets = list(_feature_sets(args, protocol, data, found))
    rows = []
    for task in tasks:
        cells = {
            one.name: [
                c for c in scorer.cells(one, task, table, 1.0, METRIC) if c.site in ("pooled", task.site)
            ]
            for one, _ in sets
        }
        for number, label in enumerate(cell.label for cell in cells[study.reference]):
            judged = {name: Judged.of(found[number], replicates) for name, found in cells.items()}
            for one, facts in sets:
                row = {"data": data, "task": task.name, "label": label, "arm": one.name}
                rows.append({**row, **_figures(one.name, judged, study), **facts})
    return rows


@dataclasses.dataclass(frozen=True)
class Judged:
    """One arm's answers to one question.

    Attributes:
        cell: as scored.
        seeds: AUROC of each seed's model.
        resampled: the same in each resample of patients [seeds, R].
    """

    cell: Cell
    seeds: list[float]
    resampled: np.ndarray

    @classmethod
    def of(cls, cell: Cell, replicates: int) -> "Judged":
        """Score each model by itself; nothing where the question could not be asked."""
        if cell.reason:
            return cls(cell, [], np.zeros((0, replicates)))
        return cls(cell, _by_seed(cell), probes.resampled_models(cell.scored, replicates, 0))

    def minus(self, other: "Judged") -> probes.Interval | None:
        """Difference of the means, its interval over patients and seeds; None where seeds do not pair."""
        if not self.seeds or len(self.seeds) != len(other.seeds):
            return None
        value = statistics.mean(self.seeds) - statistics.mean(other.seeds)
        return probes.paired_interval(value, self.resampled, other.resampled, 0)


def _figures(name: str, judged: dict[str, Judged], study: Study) -> dict[str, Any]:
    """Mean over seeds with its interval over patients, and the paired differences.

    ``minus_dense``, or another reference: this arm minus that; ``ours_minus``: ours minus this arm, both at
    equal time where this one is. Intervals over patients and seeds together; that to the reference also over
    seeds alone (Student's t).
    """
    mine, reference = judged[name], judged[study.reference]
    cell = mine.cell
    if cell.reason or reference.cell.reason:
        return {"reason": cell.reason or reference.cell.reason}
    low, high = np.nanpercentile(mine.resampled.mean(0), [2.5, 97.5])
    figures: dict[str, Any] = {
        "auroc": statistics.mean(mine.seeds), "low": low, "high": high,
        "patients": cell.patients, "positives": cell.positives, "seeds": [round(v, 4) for v in mine.seeds],
    }  # fmt: skip
    if (found := mine.minus(reference)) is not None:
        figures |= _interval(f"minus_{study.reference}", found)
        differences = [a - b for a, b in zip(mine.seeds, reference.seeds, strict=True)]
        figures["seeds_low"], figures["seeds_high"] = _t_interval(differences)
    ours = judged.get(f"{study.ours}_at_equal_time" if "_at_equal_time" in name else study.ours)
    if ours is not None and (found := ours.minus(mine)) is not None:
        figures |= _interval("ours_minus", found)
    return {k: round(float(v), 4) if isinstance(v, float) else v for k, v in figures.items()}


def _interval(name: str, found: probes.Interval) -> dict[str, Any]:
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def _by_seed(cell: Cell) -> list[float]:
    """AUROC of each seed's model, the mean over a macro's labels."""
    values = [[probes.auroc(s, c.labels, c.strata) for s in c.scores] for c in cell.scored]
    return [float(v) for v in np.mean(values, axis=0)]


def _t_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """95 % interval of the mean over seeds, by Student's t."""
    if len(values) not in T_975:
        return None, None
    half = T_975[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values) - half, statistics.mean(values) + half


def _feature_sets(
    args: argparse.Namespace, protocol: qa.Protocol, data: str, found: Dataset
) -> Iterator[tuple[Features, dict[str, Any]]]:
    """Features of each arm and mode, one model a seed; then raw pixels and an untrained net."""
    study = STUDIES[args.method]
    for name in study.arms(protocol):
        files = [_file(args, data, str(seed), name) for seed in args.seeds]
        if not all(file.exists() for file in files):  # a mean over other seeds could not be paired
            continue
        trained = [qa.load(file) for file in files]
        names = sorted({key for t in trained for key in t.facts})
        facts = {f"mean_{k}": round(statistics.mean(t.facts[k] for t in trained), 3) for k in names}
        for mode in trained[0].features:
            label = name if mode == "own" else f"{name}, asked {mode}"
            yield Features(label, tuple(t.features[mode] for t in trained)), facts
    yield Features("pixels_16x16", (probes.downsampled_pixels(np.asarray(found.images)),)), {}
    fresh = tuple(study.untrained(protocol, seed, found.images) for seed in args.seeds)
    yield Features("random_init", fresh), {}


def _tasks(args: argparse.Namespace, data: str) -> list[str]:
    return {
        "phantoms": [],
        "multisite": ["experiment=multisite_cxr", f"data.root={args.root}"],
        "guangzhou": [CHEST_TASKS],
        "mias": ["experiment=mammograms", f"data.root={args.mammograms}"],
    }[data]


def _jobs(args: argparse.Namespace, protocol: qa.Protocol) -> list[tuple[str, str, str]]:
    """Everything to train, whole seeds first; an arm of equal time comes after those that say how long."""
    study = STUDIES[args.method]
    known = study.arms(protocol)
    asked = set(known if args.arms is None else args.arms)
    needed = asked | {study.reference} | {same for n in asked if (same := known[n].same_time_as)}
    first = [n for n in known if n in needed and not known[n].same_time_as]
    later = [n for n in known if n in needed and known[n].same_time_as]
    return [
        (data, str(seed), name)
        for seed, data, group in itertools.product(args.seeds, args.data, (first, later))
        for name in group
    ]


def _trained(args: argparse.Namespace, protocol: qa.Protocol, job: tuple[str, str, str]) -> bool:
    """Tell whether a run is there; one of another protocol is never taken for it."""
    file = _file(args, *job)
    arms = STUDIES[args.method].arms(protocol)
    if file.exists() and qa.load(file).told != qa.told(arms[job[2]], protocol):
        raise SystemExit(f"{file}: made with another protocol; delete it, or give another --out")
    return file.exists()


def _call(args: argparse.Namespace, job: tuple[str, str, str]) -> None:
    """Train one arm in a process of its own, one thread."""
    words = ["--method", args.method, "--root", str(args.root), "--mammograms", str(args.mammograms)]
    words += ["--out", str(args.out), *(["--quick"] if args.quick else [])]
    words += ["--protocol", args.protocol]
    words += [] if args.steps is None else ["--steps", str(args.steps)]
    command = [sys.executable, "-m", "benchmarks.quality", *words, "--one", *job]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    facts = qa.load(_file(args, *job)).facts
    print(" ".join(job), {k: round(v, 2) for k, v in facts.items()}, flush=True)


def _file(args: argparse.Namespace, data: str, seed: str, name: str) -> Path:
    return Path(args.out) / data / f"seed{seed}" / f"{name}.npz"


def _command(args: argparse.Namespace) -> str:
    told = "" if args.method == "sparse_contrast" else f" --method {args.method}"
    told += "" if args.protocol == "cpu" else f" --protocol {args.protocol}"
    told += "" if args.steps is None else f" --steps {args.steps}"
    told += "" if args.quick or args.seeds == SEEDS else f" --seeds {' '.join(map(str, args.seeds))}"
    told += "" if args.arms is None else f" --arms {' '.join(args.arms)}"
    every = args.quick or list(args.data) == list(STUDIES[args.method].data)
    told += "" if every else f" --data {' '.join(args.data)}"
    return f"python -m benchmarks.quality{told} --root {args.root}{' --quick' if args.quick else ''}"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--method", default="sparse_contrast", choices=STUDIES, help="what is compared")
    parser.add_argument("--root", default="../shared/data/cxr_multisite", help="folder with index.csv")
    parser.add_argument("--mammograms", default="../shared/data/mias", help="folder with index.csv")
    parser.add_argument("--out", default=None, help="folder of the runs; default outputs/quality")
    budgets = sorted({name for study in STUDIES.values() for name in study.protocols})
    parser.add_argument("--protocol", default="cpu", choices=budgets, help="network, size and steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--data", nargs="+", default=None, choices=(*NAMES, *PARTS))
    parser.add_argument("--arms", nargs="+", default=None, help="train these alone")
    parser.add_argument("--steps", type=int, default=None, help="of every arm, in place of the protocol's")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a toy: two steps of a one-block network")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--one", nargs=3, metavar=("DATA", "SEED", "ARM"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.data = list(STUDIES[args.method].data) if args.data is None else args.data
    if args.protocol not in STUDIES[args.method].protocols:
        parser.error(f"--method {args.method} has no protocol {args.protocol}")
    if args.out is None:
        method = "" if args.method == "sparse_contrast" else f"-{args.method}"
        budget = "" if args.protocol == "cpu" else f"-{args.protocol}"
        args.out = f"outputs/quality{method}{budget}{'-quick' if args.quick else ''}"
    if args.quick:
        args.seeds, args.data = args.seeds[:2], args.data[:1]
    return args


if __name__ == "__main__":
    main()
