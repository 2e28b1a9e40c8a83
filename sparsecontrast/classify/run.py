"""A run of ``classify``: train into a folder, read it back, judge it.

    config.yaml  metrics.jsonl (one row an epoch)  model.safetensors  model.json
    evaluation.json  report.html                   (after ``classify evaluate``)

``model.json`` comes last: a folder without it holds no trained network.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from sparsecontrast.checkpoint import has_rounds, read_tensors, write_tensors
from sparsecontrast.classify import scores
from sparsecontrast.classify.augment import normalise
from sparsecontrast.classify.cells import Cells, Split, class_weights, load_cells, split_cells
from sparsecontrast.classify.federated_run import read_federated, read_local_only
from sparsecontrast.classify.fit import BATCH
from sparsecontrast.classify.recipe import train_classifier
from sparsecontrast.classify.settings import ClassifyConfig, compose_classify
from sparsecontrast.classify.trained import Trained
from sparsecontrast.config import anchored, as_dict
from sparsecontrast.durable import write_bytes
from sparsecontrast.errors import CheckpointError, ConfigError, MissingDataError
from sparsecontrast.methods.sparse_attn_net import SparseAttnNet
from sparsecontrast.overrides import merge
from sparsecontrast.progress import progress
from sparsecontrast.structure import build as build_dataclass

CONFIG, METRICS, WEIGHTS, MODEL, EVALUATION = (
    "config.yaml", "metrics.jsonl", "model.safetensors", "model.json", "evaluation.json",
)  # fmt: skip


def train(config: ClassifyConfig, show: bool = True) -> Path:
    """Train one classifier and return its run folder.

    Raises:
        ConfigError: ``output_dir`` already holds a run.
        MethodError: the training diverged; nothing is left in the folder.
        DataError: the pictures cannot be used as asked.
        StorageError: the folder cannot be written.
    """
    folder = anchored(config.output_dir)
    if (folder / MODEL).exists() or (folder / CONFIG).exists():
        raise ConfigError(f"output_dir={folder}: already holds a run; choose another folder or remove it")
    torch.set_num_threads(config.train.threads)
    cells = load_cells(config.cells, config.train.image_size)
    split = split_cells(cells, config.cells, config.seed)
    config = dataclasses.replace(config, output_dir=str(folder))
    text = yaml.safe_dump({**as_dict(config), "overrides": list(config.overrides)}, sort_keys=False)
    write_bytes(folder / CONFIG, text.encode())
    try:
        passes = 1 + (config.train.refit and config.method.share_floor < config.method.share)
        with progress("Training", passes * config.train.epochs, show) as tick:
            network, done = train_classifier(
                lambda rows: build(config, cells, rows), cells, split, config.train, config.seed, tick
            )
    except BaseException:  # an interrupt too: a folder with a configuration alone would be taken for a run
        _take_back(folder)
        raise
    lines = (json.dumps(row, allow_nan=False) + "\n" for row in done.rows)
    write_bytes(folder / METRICS, "".join(lines).encode())
    facts = {
        "classes": list(cells.classes), "k": network.k, "ceiling": network.ceiling, "epoch": done.epoch,
        "refit": config.train.refit,
        "seconds": round(done.seconds, 2), "images": {n: len(r) for n, r in vars(split).items()},
        "sha256": write_tensors(folder / WEIGHTS, network.state_dict()),
    }  # fmt: skip
    write_bytes(folder / MODEL, json.dumps(facts, indent=1).encode())
    return folder


def _take_back(folder: Path) -> None:
    """Remove what ``train`` wrote before it trained; the folder goes if nothing else is in it."""
    with contextlib.suppress(OSError):
        (folder / CONFIG).unlink()
        folder.rmdir()


def build(config: ClassifyConfig, cells: Cells, rows: torch.Tensor) -> SparseAttnNet:
    """Build the network of a run that trains on ``rows``; the same seed gives the same weights."""
    count = len(cells.classes)
    weights = class_weights(cells.labels[rows], count, config.train.balance)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return SparseAttnNet(
            config.method, count, config.train.image_size, weights, config.train.label_smoothing
        )


def read_trained(folder: str | Path, overrides: Sequence[str] = ()) -> Trained:
    """Read a run folder, of one machine or of a federation.

    Raises:
        MissingDataError: no such folder, or nothing was trained in it.
        CheckpointError: the weights are torn, changed, or of another network.
    """
    folder = anchored(folder)
    if has_rounds(folder):
        return read_federated(folder, overrides)
    if not (folder / MODEL).is_file() or not (folder / CONFIG).is_file():
        raise MissingDataError(
            f"{folder}: holds no trained classifier; run `sparsecontrast classify train` first"
        )
    try:
        facts = json.loads((folder / MODEL).read_text())
        saved = yaml.safe_load((folder / CONFIG).read_text())
        rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{folder}: torn run folder ({type(error).__name__})") from error
    config = _configured(saved, overrides)
    data = folder / WEIGHTS
    if data.is_file() and hashlib.sha256(data.read_bytes()).hexdigest() != facts["sha256"]:
        raise CheckpointError(f"{data}: torn or changed, its sha256 is not the one in {MODEL}")
    network = SparseAttnNet(config.method, len(facts["classes"]), config.train.image_size)
    try:
        network.load_state_dict(read_tensors(data))
    except RuntimeError as error:
        raise CheckpointError(f"{data}: weights of another network than {CONFIG} names") from error
    network.k = facts["k"]
    return Trained(folder, config, network.eval(), facts, rows)


def _configured(saved: dict[str, Any], overrides: Sequence[str]) -> ClassifyConfig:
    """Read the saved configuration; overrides may move the data, never the network or its training."""
    config = build_dataclass(ClassifyConfig, saved, "")
    if not overrides:
        return config
    told = compose_classify(merge(saved["overrides"], overrides))
    return dataclasses.replace(told, method=config.method, train=config.train, seed=config.seed)


def evaluate(run: Trained) -> dict[str, Any]:
    """Judge a run on its test pictures, write ``evaluation.json`` and return it.

    Raises:
        CheckpointError: the pictures have other classes than those of the run.
    """
    cells, split = run_cells(run)
    bootstrap, seed = run.config.evaluation.bootstrap, run.config.seed

    def judged(network: SparseAttnNet) -> list[dict[str, Any]]:
        said = probabilities(network, cells, split.test).argmax(axis=1)
        return judge(cells, split.test.numpy(), said, bootstrap, seed)

    found = {
        "classes": list(cells.classes), "k": run.network.k, "pixel_share": run.network.pixel_share(),
        "parameters": sum(p.numel() for p in run.network.parameters()),
        "bootstrap": bootstrap, "left_out": len(cells.left_out), "tested": judged(run.network),
        "local_only": {lab: judged(network) for lab, network in read_local_only(run).items()},
    }  # fmt: skip
    write_bytes(run.folder / EVALUATION, json.dumps(found, indent=1, allow_nan=False).encode())
    return found


def judge(
    cells: Cells, rows: np.ndarray, said: np.ndarray, replicates: int, seed: int
) -> list[dict[str, Any]]:
    """Score rows [N] of ``cells`` by what was said of them [N]: all labs together, then each."""
    labels, groups, count = cells.labels.numpy()[rows], cells.own_groups()[rows], len(cells.classes)
    found = []
    for lab in ("all", *sorted(set(cells.labs[rows]))):
        of = np.flatnonzero((cells.labs[rows] == lab) | (lab == "all"))
        entry: dict[str, Any] = {"lab": lab, "images": len(of)}
        for name, score in (("accuracy", scores.accuracy), ("macro_f1", scores.macro_f1)):
            one = scores.bootstrap(score, labels[of], said[of], groups[of], count, replicates, seed)
            entry[name] = vars(one)
        entry["confusion"] = scores.confusion(labels[of], said[of], count).tolist()
        found.append(entry)
    return found


def run_cells(run: Trained) -> tuple[Cells, Split]:
    """Load the pictures of a run and split them as it did.

    Raises:
        CheckpointError: they have other classes.
    """
    classes = run.federated.classes if run.federated else None
    cells = load_cells(run.config.cells, run.config.train.image_size, classes)
    if list(cells.classes) != run.facts["classes"]:
        raise CheckpointError(
            f"{run.folder}: trained on {', '.join(run.facts['classes'])}, but the pictures are of "
            f"{', '.join(cells.classes)}; give cells.classes and cells.root as they were"
        )
    return cells, split_cells(cells, run.config.cells, run.config.seed)


@torch.no_grad()
def probabilities(network: SparseAttnNet, cells: Cells, rows: torch.Tensor) -> np.ndarray:
    """Return the probability of each class [N, C]."""
    parts = [network.logits(normalise(cells.images[r])).softmax(1) for r in rows.split(BATCH)]
    return torch.cat(parts).numpy()
