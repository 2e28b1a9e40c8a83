"""The folder of a federated ``classify``, read as one of a training on one machine; and each lab's own model.

Beside what every federation writes (``config.yaml``, ``metrics.jsonl``, ``rounds/``) it may hold
``local_only/LAB.safetensors``: trained at one lab alone, as many rounds as the federation, never averaged.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsecontrast import checkpoint
from sparsecontrast.checkpoint import read_tensors, write_tensors
from sparsecontrast.classify.federation import CellsRun, as_classify, check_cells
from sparsecontrast.classify.lab import LabTrainer, build_network
from sparsecontrast.classify.trained import Trained
from sparsecontrast.config import anchored, shared_state_dir
from sparsecontrast.errors import CheckpointError, ConfigError
from sparsecontrast.federated import Place, compose_run
from sparsecontrast.overrides import merge
from sparsecontrast.progress import progress
from sparsecontrast.runs import read_metrics, read_saved
from sparsecontrast.structure import build

LOCAL_ONLY = "local_only"


def read_federated(folder: str | Path, overrides: Sequence[str] = ()) -> Trained:
    """Read the newest whole round of a federated run.

    Args:
        folder: of the run.
        overrides: of the data; the network and its classes stay those of the run.

    Raises:
        ConfigError: it is a run of something else.
        CheckpointError: no whole round, or weights of another network.
    """
    folder = anchored(folder)
    config = _configured(folder, overrides)
    number = checkpoint.latest(folder)
    if number is None:
        raise CheckpointError(f"{folder}: no whole round; continue the run with resume={folder}")
    network = build_network(config)
    _load(network, checkpoint.read_round(folder, number).tensors, folder)
    rows = read_metrics(folder)
    last = [r for r in rows if r["round"] == number and r["site"] is not None and r["status"] == "ok"]
    facts = {
        "classes": list(config.classes), "k": network.k, "ceiling": network.ceiling, "epoch": number,
        "seconds": sum(r.get("seconds", 0.0) for r in rows if r["site"] is not None),
        "images": {"train": sum(r["num_examples"] for r in last), "val": 0},
        "labs": [r["site"] for r in last], "strategy": config.federation.strategy,
    }  # fmt: skip
    return Trained(folder, as_classify(config), network.eval(), facts, rows, config)


def train_local_only(run: Trained) -> None:
    """Train each lab's own model into the run folder, where ``evaluation.baselines`` asks for it.

    A lab trains as in the federation, with the same batches, rates and rounds, from the same weights; but it
    starts a round from what it ended the last one with.

    Raises:
        DataError: the pictures are no longer there.
    """
    config = run.federated
    assert config is not None
    if LOCAL_ONLY not in config.evaluation.baselines:
        return
    from sparsecontrast.federated.cells import training_set

    torch.set_num_threads(config.train.threads)
    labs, rounds, home = run.facts["labs"], config.federation.rounds, shared_state_dir(config)
    with progress("Each lab alone", len(labs) * rounds, True) as tick:
        for lab in labs:
            own = training_set(config, Place(lab, True, home, home, run_key=""))
            network = build_network(config)
            trainer = LabTrainer(network, config, lab, own.labels)
            for number in range(1, rounds + 1):
                trainer.run(own.images, own.labels, number, rounds)
                tick(f"{lab}, round {number}")
            write_tensors(run.folder / LOCAL_ONLY / f"{lab}.safetensors", network.state_dict())


def read_local_only(run: Trained) -> dict[str, Any]:
    """Networks of the labs that trained alone, by lab; none for a run on one machine.

    Raises:
        CheckpointError: a file is torn, or of another network.
    """
    found = {}
    if run.federated is None:
        return found
    for path in sorted((run.folder / LOCAL_ONLY).glob("*.safetensors")):
        network = build_network(run.federated)
        _load(network, read_tensors(path), path)
        found[path.stem] = network.eval()
    return found


def _configured(folder: Path, overrides: Sequence[str]) -> CellsRun:
    saved = read_saved(folder)
    if (saved.get("method") or {}).get("name") != "sparse_attn_net":
        raise ConfigError(f"{folder}: a federation of another method; run `sparsecontrast evaluate`")
    config = build(CellsRun, saved, "")
    if overrides:
        told = compose_run(merge(saved["overrides"], overrides))
        if not isinstance(told, CellsRun):
            raise ConfigError(f"{folder}: overrides that make it another run")
        cells = dataclasses.replace(told.cells, classes=config.cells.classes)
        config = dataclasses.replace(config, cells=cells, evaluation=told.evaluation)
    check_cells(config)
    return config


def _load(network: Any, tensors: dict[str, Tensor], where: Path) -> None:
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{where}: weights of another network than the run's") from error
