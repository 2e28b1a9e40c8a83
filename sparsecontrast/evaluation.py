"""A run folder -> ``evaluation.json``: what the frozen features are worth, beside their baselines.

Nothing is fine-tuned. A linear probe and a nearest-neighbour vote read the embedding of the newest
round; ``tasks.py`` says what is asked, ``scoring.py`` how a cell is scored, ``features.py`` what the
run is compared with.
"""

import contextlib
import dataclasses
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecontrast.auto_encode import encode_auto, extra_ticks
from sparsecontrast.checkpoint import Round
from sparsecontrast.config import anchored, as_dict, shared_state_dir
from sparsecontrast.durable import write_bytes
from sparsecontrast.errors import ConfigError, PatientLeakError
from sparsecontrast.features import (
    BATCH,
    Baselines,
    Budget,
    encode,
    load_method,
    presented_images,
    trained_round,
)
from sparsecontrast.item_scores import Keeper, item_names, write_scores
from sparsecontrast.membership import membership
from sparsecontrast.methods.method import Method
from sparsecontrast.overlays import selection_recall, selection_spread
from sparsecontrast.progress import progress
from sparsecontrast.runs import EVALUATION, PARTITION, Run, read_run, read_table
from sparsecontrast.scoring import METRICS, Features, Scorer
from sparsecontrast.settings import DataConfig, MethodConfig
from sparsecontrast.tasks import make_table, parse_tasks

if TYPE_CHECKING:
    from sparsecontrast.data.cache import Dataset

VERSION = 1
LEARNED = ("surprise", "attention")  # values of ``selection`` that a collapse can befall


def evaluate_run(
    run_dir: str | Path, overrides: Sequence[str] = (), show: bool = True, against: Sequence[str | Path] = ()
) -> dict[str, Any]:
    """Score a run and write ``<run_dir>/evaluation.json``, and the scores behind it to ``scores.csv``.

    Args:
        run_dir: a run folder with at least one trained round.
        overrides: on top of the run's own, such as ``evaluation.keep=sparse``.
        show: progress on stderr.
        against: other run folders on the same data, scored beside this one.

    Returns:
        What was written: ``rows`` and ``differences`` of ``scoring.Scorer.rows``, ``budgets``, what
        ``membership`` found where ``audit.views`` asks for them, and how it was made.

    Raises:
        UntrainedError, PatientLeakError, LabelError, ConfigError: there is nothing honest to score.
    """
    run = read_run(run_dir, overrides)
    found = trained_round(run)
    dataset = run_dataset(run, show)
    sites = run_sites(run, dataset)
    table = make_table(dataset.frame, sites)
    tasks = parse_tasks(run.config.evaluation.tasks, table)
    baselines = Baselines(run, found.number, dataset.images, table, tasks)
    sets, budgets, auto = _feature_sets(baselines, found, against, show)
    evaluation = run.config.evaluation
    scorer = Scorer(
        evaluation.label_fractions, evaluation.knn_neighbours, evaluation.bootstrap, run.config.seed
    )
    keep = Keeper(item_names(dataset.frame, run.config.data), max(scorer.fractions))
    total = len(tasks) * len(scorer.fractions) * len(METRICS) * len(sets)
    with progress("Probes", total, show) as tick:
        rows, differences = scorer.rows(sets, table, tasks, tick, keep)
    told, of_patients = membership(run, found, dataset, sites) if run.config.audit.views else (None, {})
    write_scores(run.folder, {**keep.found, **of_patients})
    method = load_method(run.config, found.tensors)
    result = {
        "version": VERSION, "round": found.number, "seed": run.config.seed,
        "trained": sets[0].name, "features": [s.name for s in sets],
        "keep": evaluation.keep, "auto_keep": auto, "precision": evaluation.precision,
        "overrides": list(overrides),
        "scored_split": table.scored_split,
        "tasks": [as_dict(vars(t)) for t in tasks], "bootstrap": evaluation.bootstrap,
        "budgets": {name: vars(b) for name, b in budgets.items()},
        "versions": versions(), "rows": rows, "differences": differences,
        "selection": _selection(run, method, dataset), "membership": told,
    }  # fmt: skip
    write_bytes(run.folder / EVALUATION, json.dumps(result, indent=1, allow_nan=False).encode())
    return result


def run_dataset(run: Run, show: bool = True) -> "Dataset":
    """Load the images that a run's configuration names, from its cache where that is whole."""
    from sparsecontrast.data.cache import load_dataset

    cache = run.config.data.cache_dir
    folder = anchored(cache) if cache else run.folder / "cache"
    return load_dataset(run.config, folder, shared_state_dir(run.config), progress=show)


def run_sites(run: Run, dataset: "Dataset") -> list[str] | None:
    """Return where each image lay in training: as ``partition.csv`` says, else as the index does.

    Raises:
        PatientLeakError: the partition speaks of other images than the data holds.
    """
    partition = read_table(run.folder, PARTITION)
    if partition is None or not {"image_id", "site"} <= set(partition.columns):
        return None
    known = dict(zip(partition["image_id"], partition["site"], strict=True))
    ids = dataset.frame["image_id"].astype(str).tolist()
    missing = sum(i not in known for i in ids)
    if missing:
        raise PatientLeakError(
            f"{missing} of {len(ids)} images are not in {PARTITION}: the data changed since the run, so it "
            "cannot be said what was trained on; evaluate on the data of the run"
        )
    return [known[i] for i in ids]


def run_name(run: Run) -> str:
    """Name a run in tables: federated, or pretrained where one site trained alone."""
    return "federated" if len({row["site"] for row in run.sites}) != 1 else "pretrained"


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("sparsecontrast", "torch", "timm", "flwr", "scikit-learn", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _selection(run: Run, method: Method, dataset: "Dataset") -> dict[str, Any] | None:
    """What the choice of cells is worth: recall of boxes, and whether a learned choice has collapsed.

    None of a method that chooses nothing.
    """
    config = run.config
    if not isinstance(config.method, MethodConfig):
        return None
    found = selection_recall(method, dataset, config.evaluation.bootstrap, config.seed)
    chooses = config.method.keep < 1 and config.method.selection in LEARNED
    spread = selection_spread(method, dataset, config.seed) if chooses else None
    if found is None and spread is None:
        return None
    return {**(found or {}), **({"spread": spread} if spread else {})}


def _feature_sets(
    baselines: Baselines, found: Round, against: Sequence[str | Path], show: bool
) -> tuple[list[Features], dict[str, Budget], dict[str, Any]]:
    """Encode the run, the runs it is set against, and its baselines; the run stands first.

    Returns:
        The features, the budgets of what was trained, and what ``keep=auto`` did for each run by name.
    """
    run, images = baselines.run, baselines.images
    names = run.config.evaluation.baselines
    trained = [(run_name(run), run, found), *_others(run, against, names)]
    adaptive = run.config.evaluation.keep == "auto"
    ticks = -(-len(images) // BATCH) + (extra_ticks(baselines.table) if adaptive else 0)
    total = len(trained) * ticks + sum(baselines.ticks(name) for name in names)
    sets, budgets, auto = [], {}, {}
    with progress("Features", total, show) as tick:
        for name, one, weights in trained:
            if adaptive:
                rows, auto[name] = encode_auto(
                    one.config, weights.tensors, images, baselines.table, tick, name
                )
            else:
                rows = encode(one.config, weights.tensors, images, tick, name)
            sets.append(Features(name, (rows,)))
            budgets[name] = Budget(weights.number, sum(presented_images(one).values()))
        for name in names:
            features, budget = baselines.make(name, tick)
            sets.append(features)
            budgets |= {name: budget} if budget else {}
    return sets, budgets, auto


def _others(run: Run, folders: Sequence[str | Path], taken: Sequence[str]) -> list[tuple[str, Run, Round]]:
    """Open the runs of ``--against``, at this run's keep and precision; they are named by their folders.

    Raises:
        ConfigError: one was made on other data, or with other splits.
    """
    found, asked = [], run.config.evaluation
    for folder in folders:
        words = [f"evaluation.keep={asked.keep}", f"evaluation.precision={asked.precision}"]
        words += [f"evaluation.auto.{key}={value}" for key, value in vars(asked.auto).items()]
        other = read_run(folder, words)
        if _source(other) != _source(run):
            raise ConfigError(
                f"--against {folder}: made on other data than {run.folder}, it cannot be paired"
            )
        used = {run_name(run), *taken, *(name for name, _, _ in found)}
        short, long = other.folder.name, "/".join(other.folder.parts[-2:])
        found.append((long if short in used else short, other, trained_round(other)))
    return found


def _source(run: Run) -> DataConfig:
    """What decides images, labels and splits; where the files of one run lie does not."""
    return dataclasses.replace(run.config.data, index=None, cache_dir=None)
