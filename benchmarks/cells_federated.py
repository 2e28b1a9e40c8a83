"""Blood cells: one classifier of labs that keep their pictures, against each lab alone and against pooling.

    python -m benchmarks.cells_federated [--quick] [--json FILE] [--root ../shared/data/wbc]

``experiment=cells`` on both labs, but 20 rounds, so that 100 epochs are as many as in ``benchmarks.cells``;
the splits are those of its task ``mixed``. Every seed has a split, weights and batches of its own. All arms
see each of their pictures as often and are tested on the same held-out cells:

    federated    the simulation's last round
    pooled       all pictures at one place, otherwise trained as a lab trains in the federation
    own          each lab's cells are judged by that lab's own model, trained alone
    other        each lab's cells are judged by the other lab's model, trained alone

``mean`` is the mean over labs of macro-F1, ``all`` that of all cells together. ``low`` and ``high`` are 95 %
t-intervals over seeds; ``minus`` is macro-F1 of the federated one minus the arm's, paired by seed. The test
cells of two seeds overlap, so the intervals are rather too narrow. What is trained lies under ``--out``; a
second call goes on where the first was stopped, in the middle of a federation too.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cells import spread
from benchmarks.record import print_table, write_result
from sparsecontrast.classify import scores
from sparsecontrast.classify.cells import Cells, load_cells, split_cells, training_rows
from sparsecontrast.classify.federated_run import read_federated, read_local_only, train_local_only
from sparsecontrast.classify.federation import CellsRun
from sparsecontrast.classify.fit import logits
from sparsecontrast.classify.lab import LabTrainer, build_network
from sparsecontrast.config import as_dict
from sparsecontrast.durable import write_bytes
from sparsecontrast.federated import compose_run
from sparsecontrast.methods.sparse_attn_net import SparseAttnNet
from sparsecontrast.overrides import assign
from sparsecontrast.runs import CONFIG

REFERENCE = "federated"
ARMS = (REFERENCE, "pooled", "own", "other")
FULL = ("federation.rounds=20",)
QUICK = ("federation.rounds=2", "train.local_epochs=1")
Networks = dict[str, SparseAttnNet]  # by the lab whose cells it judges
Found = dict[str, dict[str, float]]  # macro-F1 by arm, then by lab, ``mean`` and ``all``


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, print and record the table."""
    args = _arguments(argv)
    torch.set_num_threads(1)
    found = {seed: one_seed(words(args, seed), Path(args.out)) for seed in args.seeds}
    rows = summarise(found)
    print_table("Cells of two labs: macro-F1, mean over seeds", rows)
    if args.json:
        command = f"python -m benchmarks.cells_federated{' --quick' if args.quick else ''}"
        write_result("cells_federated", command, rows, args.json)


def words(args: argparse.Namespace, seed: int) -> list[str]:
    """Overrides of a seed's federation."""
    root = assign("cells.root", Path(args.root).resolve())
    more = QUICK if args.quick else FULL
    return ["experiment=cells", root, f"seed={seed}", "federation.workers=1", *more]


def one_seed(told: Sequence[str], out: Path) -> Found:
    """Train and score all arms of one seed, or read what an earlier call with the same configuration had."""
    config = compose_run([*told, "output_dir=run"])
    assert isinstance(config, CellsRun)
    facts = json.dumps({**as_dict(config), "overrides": None, "output_dir": None}, sort_keys=True)
    folder = out.resolve() / f"seed{config.seed}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"
    kept = folder / "found.json"
    if not kept.is_file():
        cells = load_cells(config.cells, config.train.image_size, config.classes)
        networks = federated_and_alone(told, folder / "run")
        networks["pooled"] = dict.fromkeys(networks[REFERENCE], pooled(config, cells))
        found = judge(networks, cells, split_cells(cells, config.cells, config.seed).test)
        write_bytes(kept, json.dumps(found).encode())
        print(f"seed {config.seed}: {found}", flush=True)
    return json.loads(kept.read_text())


def federated_and_alone(told: Sequence[str], folder: Path) -> dict[str, Networks]:
    """Simulate the federation, or what is left of it, then train each lab alone, as long."""
    started = (folder / CONFIG).exists()
    simulate([assign("resume", folder)] if started else [*told, assign("output_dir", folder)])
    run = read_federated(folder)
    train_local_only(run)
    alone = read_local_only(run)
    labs = sorted(alone)
    others = {lab: alone[other] for lab, other in zip(labs, [*labs[1:], labs[0]], strict=True)}
    return {REFERENCE: dict.fromkeys(labs, run.network), "own": alone, "other": others}


def simulate(told: Sequence[str]) -> None:
    """Run ``python -m simulation`` to its last round."""
    subprocess.run([sys.executable, "-m", "simulation", *told, "--no-evaluation"], check=True)


def pooled(config: CellsRun, cells: Cells) -> SparseAttnNet:
    """Train on all labs' pictures as one lab would in a federation of its own."""
    own, rounds = cells.select(training_rows(cells, config.cells, config.seed)), config.federation.rounds
    network = build_network(config)
    trainer = LabTrainer(network, config, "pooled", own.labels)
    for number in range(1, rounds + 1):
        trainer.run(own.images, own.labels, number, rounds)
    return network.eval()


def judge(networks: Mapping[str, Networks], cells: Cells, rows: torch.Tensor) -> Found:
    """Score each arm on rows [N] of ``cells``: macro-F1 at each lab, the mean over labs, and all together."""
    tested, found, count = cells.select(rows), {}, len(cells.classes)
    labels = tested.labels.numpy()
    for arm in ARMS:
        said, of_labs = np.full(len(labels), -1), {}
        for lab, network in networks[arm].items():
            at = np.flatnonzero(tested.labs == lab)
            said[at] = logits(network, tested.images[torch.from_numpy(at)]).argmax(1).numpy()
            of_labs[lab] = scores.macro_f1(labels[at], said[at], count)
        mean = float(np.mean(list(of_labs.values())))
        found[arm] = {**of_labs, "mean": mean, "all": scores.macro_f1(labels, said, count)}
    return found


def summarise(found: Mapping[int, Found]) -> list[dict[str, Any]]:
    """One row an arm and lab: the mean over seeds and what the federated one has more, with t-intervals."""
    rows = []
    for arm in ARMS:
        for cells in next(iter(found.values()))[arm]:
            mine = [one[arm][cells] for one in found.values()]
            row = {"arm": arm, "cells": cells, "seeds": len(mine), **spread("macro_f1", mine)}
            if arm != REFERENCE:
                ours = [one[REFERENCE][cells] for one in found.values()]
                row |= spread("minus", [a - b for a, b in zip(ours, mine, strict=True)])
            rows.append(row | {"each_seed": " ".join(f"{value:.3f}" for value in mine)})
    return rows


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", default="../shared/data/wbc", help="folder with index.csv")
    parser.add_argument("--out", default="outputs/cells-federated", help="folder of what was trained")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="default 0 to 4; --quick: 0 and 1")
    parser.add_argument("--quick", action="store_true", help="two seeds, two rounds of one epoch")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(argv)
    args.seeds = args.seeds or ([0, 1] if args.quick else list(range(5)))
    return args


if __name__ == "__main__":
    main()
