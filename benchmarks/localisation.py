"""Where does each selector look, without any label? Recall of annotated lesions in the cells it keeps.

    python -m benchmarks.localisation [--quick] [--json FILE] [--root ../shared/data/cxr_multisite]

Selectors learn on training images and are judged on others, whose boxes nobody saw. A row is one data
set, selector, budget of m cells and group of boxes. ``recall`` is the mean share of a box's area that
lies in kept cells, ``over_chance`` the same over m / cells, what cells kept at random would cover;
both hold one value a seed. The bar: on every seed, lesions of two patches and more (a patch is 8 x 8
of 112 x 112 pixels) are kept at least twice as often as chance, ``worst_seed`` >= 2. Boxes are
those of procedural phantoms, and of 19 real films: masses and nodules, drawn by others than NIH but for
a few. Lungs are reported apart, because a lung is no lesion. All films of patients with a real lesion
box stay out of training.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.films import NAMES, load_films
from benchmarks.overlap import Overlap, Scene, look, overlap
from benchmarks.record import print_table, write_result
from benchmarks.selectors import NAMES as SELECTORS
from benchmarks.selectors import Budget, Protocol, Trial, selectors
from sparsecontrast.data.dataset import Dataset

LUNGS = {"right_lung", "left_lung"}
CELLS = (7, 12)  # of 49: a token budget of .35, and a quarter of the cells
QUICK = Protocol(size=64, patch=8, depth=1, steps=20, batch=16, contrast_steps=2, contrast_batch=8)
QUICK_CELLS = (2, 4)  # of 16


def main(argv: Sequence[str] | None = None) -> None:
    """Train and judge all selectors, print what decides, and record every row."""
    args = _arguments(argv)
    torch.set_num_threads(1)
    protocol, budgets = (QUICK, QUICK_CELLS) if args.quick else (Protocol(), tuple(args.cells))
    tallies = [Tally(*parts(load(args, protocol, data), data), protocol) for data in args.data]
    rows: list[dict[str, Any]] = []
    for number, seed in enumerate(args.seeds, 1):
        for tally in tallies:
            tally.add(seed, budgets, args.selectors)
        rows = [row for tally in tallies for row in tally.rows()]
        if args.json:  # whole seeds are kept should the rest not come to an end
            write_result("localisation", _command(args, args.seeds[:number]), rows, args.json)
    for m in budgets:
        title = f"Recall over chance at {m} cells: mean over seeds, worst seed in brackets"
        print_table(title, _table([r for r in rows if r["m"] == m]))


@dataclass
class Tally:
    """What the selectors of one data set were found to do, seed by seed.

    Attributes:
        train: images that selectors learn on, uint8 [N, S, S].
        scenes: boxed images that they are judged on.
        protocol: of their training.
        judged: by scene, selector and number of kept cells, one a seed.
        spent: what each selector's training took, one a seed.
    """

    train: np.ndarray
    scenes: list[Scene]
    protocol: Protocol
    judged: dict[tuple[str, str, int], list[Overlap]] = field(default_factory=dict)
    spent: dict[str, list[Budget]] = field(default_factory=dict)

    def add(self, seed: int, budgets: Sequence[int], names: Sequence[str] = SELECTORS) -> None:
        """Train selectors from one seed and judge each at every number of kept cells."""
        grid = self.protocol.grid
        for name, selector, spent in selectors(Trial(self.train, self.protocol, seed), names):
            self.spent.setdefault(name, []).append(spent)
            for scene in self.scenes:
                scores, excluded = look(scene, selector, grid, self.protocol.size)
                for m in budgets:
                    one = overlap(scene, scores, excluded, grid, m)
                    self.judged.setdefault((scene.name, name, m), []).append(one)
                    told = f"{scene.name}, seed {seed}, {name}: recall {one.recall.mean():.3f} at {m} cells"
                    print(told, flush=True)

    def rows(self) -> list[dict[str, Any]]:
        """One row a scene, selector, number of kept cells and group of boxes."""
        named = {scene.name: scene for scene in self.scenes}
        return [
            row
            for (scene, name, m), judged in self.judged.items()
            for row in _rows(named[scene], name, m, judged, self.protocol, self._budget(name))
        ]

    def _budget(self, name: str) -> dict[str, Any]:
        """What a selector learnt from and for how long; seconds and losses have one value a seed."""
        spent = self.spent[name]
        same = {
            "trained_on_images": len(self.train),
            "steps": spent[0]["steps"],
            "step_images": spent[0]["step_images"],
        }
        each = [key for key in spent[0] if key not in same]
        return same | {key: _rounded([one[key] for one in spent]) for key in each}


def parts(dataset: Dataset, data: str) -> tuple[np.ndarray, list[Scene]]:
    """Cut a data set into training images and boxed images that are held out."""
    lesions = np.array([bool(set(labels) - LUNGS) for labels in dataset.box_labels])
    train = dataset.frame["split"].to_numpy(dtype=str) == "train"
    if data == "phantoms":
        return _pixels(dataset, train), [_scene(dataset, data, lesions & ~train, False)]
    # too few films bear a lesion box: none of their patients is trained on, and all are judged
    codes = dataset.patient_codes
    lungs = np.array([bool(set(labels) & LUNGS) for labels in dataset.box_labels]) & ~train
    held_out = np.isin(codes, codes[lesions])
    scenes = [_scene(dataset, data, lesions, False), _scene(dataset, f"{data} lungs", lungs, True)]
    return _pixels(dataset, train & ~held_out), scenes


def load(args: argparse.Namespace, protocol: Protocol, data: str) -> Dataset:
    """Load the images of one data set; the phantoms do not depend on the seed."""
    patients = 12 if args.quick else 200
    return load_films(data, protocol.size, protocol.patch, patients, args.root, args.out)


def _scene(dataset: Dataset, name: str, rows: np.ndarray, lungs: bool) -> Scene:
    """Boxed images with their lung boxes alone, or with all others."""
    chosen = np.flatnonzero(rows)
    mine = [[(label in LUNGS) == lungs for label in dataset.box_labels[i]] for i in chosen]
    boxes = [dataset.boxes[i][keep] for i, keep in zip(chosen, mine, strict=True)]
    labels = [
        [label for label, kept in zip(dataset.box_labels[i], keep, strict=True) if kept]
        for i, keep in zip(chosen, mine, strict=True)
    ]
    return Scene(name, _pixels(dataset, rows), boxes, labels)


def _rows(
    scene: Scene, name: str, m: int, judged: Sequence[Overlap], protocol: Protocol, facts: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """One row for each group of boxes; what describes the whole choice stands in the row of all."""
    cells = protocol.grid[0] * protocol.grid[1]
    chance = m / cells
    for (by, group), boxes in scene.groups(protocol.patch).items():
        recall = [float(one.recall[boxes].mean()) for one in judged]
        ratios = [value / chance for value in recall]
        yield {
            "data": scene.name, "selector": name, "m": m, "cells": cells, "chance": round(chance, 4),
            "by": by, "group": group, "boxes": int(boxes.sum()),
            "recall": _rounded(recall), "over_chance": _rounded(ratios),
            "mean_over_chance": round(float(np.mean(ratios)), 3), "worst_seed": round(min(ratios), 3),
            **(_whole(judged, facts) | {"images": len(scene.images)} if by == "all" else {}),
        }  # fmt: skip


def _whole(judged: Sequence[Overlap], facts: dict[str, Any]) -> dict[str, Any]:
    return {key: _rounded([one.figures[key] for one in judged]) for key in judged[0].figures} | facts


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _pixels(dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    return np.array(dataset.images[np.flatnonzero(rows)])


def _table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a data set and selector, one column a size of lesion; of lungs, one a lung."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault(
            (row["data"], row["selector"]), {"data": row["data"], "selector": row["selector"]}
        )
        if row["by"] == "patches" or row["group"] in LUNGS:
            line[row["group"]] = f"{row['mean_over_chance']:.2f} ({row['worst_seed']:.2f})"
        if row["by"] == "all":
            line |= {key: f"{np.mean(row[key]):.2f}" for key in ("iou", "sameness")}
    return list(lines.values())


def _command(args: argparse.Namespace, done: Sequence[int]) -> str:
    seeds = " ".join(map(str, done))
    told = "" if set(args.selectors) == set(SELECTORS) else f" --selectors {' '.join(args.selectors)}"
    told += "" if tuple(args.cells) == CELLS else f" --cells {' '.join(map(str, args.cells))}"
    return f"python -m benchmarks.localisation --seeds {seeds}{told}{' --quick' if args.quick else ''}"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", default="../shared/data/cxr_multisite", help="folder with index.csv")
    parser.add_argument("--out", default="outputs/localisation", help="folder of the decoded images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--data", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--selectors", nargs="+", default=list(SELECTORS), choices=SELECTORS)
    parser.add_argument("--cells", type=int, nargs="+", default=list(CELLS), help="kept, of 49")
    parser.add_argument("--quick", action="store_true", help="phantoms of 64 pixels, two seeds, few steps")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(argv)
    if args.quick:
        args.seeds, args.data = args.seeds[:2], args.data[:1]
    return args


if __name__ == "__main__":
    main()
