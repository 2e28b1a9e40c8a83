"""``evaluation.keep=auto``: calibrate a network, then compute each image at the lowest rung that it needs.

``auto_keep.py`` holds the statistics; here is what they cost and what they save. Calibration reads
the validation images densely and at every rung; no scored image takes part in it. The scored images
are then read densely once more, only to say how well the promise was kept.

Dense means the same network at the same ``evaluation.precision``. What cannot be proven is computed
densely, and the record says why.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsecontrast.auto_keep import AutoKeep, calibrate, rungs_for, uncovered_mass
from sparsecontrast.data.transforms import evaluation_view
from sparsecontrast.features import BATCH, Tick, frozen_method
from sparsecontrast.settings import Config
from sparsecontrast.tasks import Table

LADDER = (0.0, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.92, 1.0)
"""Shares of the tokens; the first stands for the smallest that the backbone can compute."""


@dataclass(frozen=True)
class Reader:
    """Reads images with one frozen network.

    Attributes:
        method: in evaluation mode, on the device that is to compute.
        cells: kept at each rung, rising; the last is all.
        shares: of the tokens, at each rung.
    """

    method: Any
    cells: tuple[int, ...]
    shares: tuple[float, ...]

    @torch.no_grad()
    def encode(self, view: Tensor, threshold: float | None) -> tuple[Tensor, np.ndarray]:
        """Embed images [B, 1, H, W] at the rungs of a threshold: [B, D], and the rungs [B].

        The images of one rung go through the network together, so every pass has a fixed shape.
        """
        scores, ranking = self.method.score(view)
        rungs = rungs_for(self.uncovered(scores), threshold)
        rows = [torch.from_numpy(np.flatnonzero(rungs == r)).to(view.device) for r in np.unique(rungs)]
        parts = [
            self.at(view[mine], ranking[mine], r) for mine, r in zip(rows, np.unique(rungs), strict=True)
        ]
        return torch.cat(parts)[torch.cat(rows).argsort()], rungs

    @torch.no_grad()
    def compare(self, view: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return the cosine distance of every rung from dense, and its uncovered mass: each [B, rungs]."""
        scores, ranking = self.method.score(view)
        every = [self.at(view, ranking, r) for r in range(len(self.cells))]
        apart = np.stack([distance(one, every[-1]) for one in every], axis=1)
        return apart, self.uncovered(scores)

    def dense(self, view: Tensor) -> Tensor:
        """Embed images [B, 1, H, W] with every cell in full detail."""
        return self.method.encode(view, "dense")

    def at(self, view: Tensor, ranking: Tensor, rung: int) -> Tensor:
        """Embed images [B, 1, H, W] at one rung, their cells in the order of ``ranking`` [B, cells]."""
        return self.method.backbone(view, *self.method.choose_among(ranking, self.cells[rung]))

    def uncovered(self, scores: Tensor) -> np.ndarray:
        """Mass that each rung leaves out [B, rungs], of scores [B, cells]."""
        return uncovered_mass(scores, self.cells).cpu().numpy()


def make_reader(method: Any) -> Reader:
    """Fit the ladder to a method's backbone; shares that keep as many cells are one rung."""
    backbone = method.backbone
    cells = sorted({backbone.kept_cells(max(share, backbone.least_keep)) for share in LADDER})
    return Reader(method, tuple(cells), tuple(backbone.share(m) for m in cells))


def distance(first: Tensor, second: Tensor) -> np.ndarray:
    """Cosine distance of the rows of [B, D] and [B, D]: [B] in [0, 2]."""
    return (1 - torch.cosine_similarity(first.float(), second.float(), dim=1)).cpu().numpy()


def encode_auto(
    config: Config, tensors: Mapping[str, Tensor], images: np.ndarray, table: Table, tick: Tick, name: str
) -> tuple[np.ndarray, dict[str, Any]]:
    """Embed uint8 images [N, S, S] -> float32 [N, D], each at the rung it needs.

    Returns:
        The embeddings, and what ``evaluation.json`` says of them under ``auto_keep``.
    """
    method, device = frozen_method(config, tensors)
    reader, auto = make_reader(method), config.evaluation.auto
    rows = calibration_rows(table)
    views = _views(images[rows], config, device, tick, f"{name}, calibration")
    found = calibrate_reader(reader, views, table.patients[rows], 1 - auto.confidence, auto.tolerance)
    features, rungs = [], []
    for view in _views(images, config, device, tick, name):
        embedded, at = reader.encode(view, found.threshold)
        features.append(embedded.float().cpu())
        rungs.append(at)
    rows = np.flatnonzero(table.splits == table.scored_split)
    views = _views(images[rows], config, device, tick, f"{name}, check")
    embeddings, taken = torch.cat(features), np.concatenate(rungs)[rows]
    dense = torch.cat([embeddings[:0], *(reader.dense(view).float().cpu() for view in views)])
    apart = distance(embeddings[torch.from_numpy(rows)], dense)
    promise = {"confidence": auto.confidence, "tolerance": auto.tolerance}
    kept = _kept(reader, taken, apart > auto.tolerance, table.patients[rows])
    return embeddings.numpy(), promise | _found(found) | kept


def calibrate_reader(
    reader: Reader, views: Iterator[Tensor], patients: np.ndarray, alpha: float, tolerance: float
) -> AutoKeep:
    """Calibrate on views of images whose patients [N] are given; without any, dense with the reason."""
    if len(patients) == 0:
        return AutoKeep(None, 0, (), (), "no validation image is left to calibrate on beside the scored ones")
    apart, uncovered = zip(*(reader.compare(view) for view in views), strict=True)
    both = np.concatenate(apart), np.concatenate(uncovered)
    return calibrate(*both, patients, reader.shares, alpha, tolerance)


def calibration_rows(table: Table) -> np.ndarray:
    """Row numbers of the validation images; none where the validation split is itself scored."""
    return np.flatnonzero((table.splits == "val") & (table.scored_split != "val"))


def extra_ticks(table: Table) -> int:
    """Ticks of ``encode_auto`` beside those of the images themselves: calibration and check."""
    counts = (len(calibration_rows(table)), int((table.splits == table.scored_split).sum()))
    return sum(-(-n // BATCH) for n in counts)


def _views(
    images: np.ndarray, config: Config, device: torch.device, tick: Tick, name: str
) -> Iterator[Tensor]:
    for start in range(0, len(images), BATCH):
        batch = torch.from_numpy(np.ascontiguousarray(images[start : start + BATCH]))
        yield evaluation_view(batch, config.backbone.img_size).to(device)
        tick(f"{name}, image {start + len(batch)} of {len(images)}")


def _found(found: AutoKeep) -> dict[str, Any]:
    return dataclasses.asdict(found) | {
        "curve": [vars(p) for p in found.curve], "fixed": [vars(p) for p in found.fixed],
    }  # fmt: skip


def _kept(reader: Reader, taken: np.ndarray, off: np.ndarray, patients: np.ndarray) -> dict[str, Any]:
    """How the scored images [n] were read: their rungs, the mean share, how many are off, per patient."""
    counts: Sequence[int] = np.bincount(taken, minlength=len(reader.cells)).tolist()
    rungs = [
        {"share": share, "cells": cells, "images": count}
        for share, cells, count in zip(reader.shares, reader.cells, counts, strict=True)
    ]
    number = np.unique(patients, return_inverse=True)[1]
    risks = np.bincount(number, off) / np.bincount(number)
    return {
        "rungs": rungs,
        "mean_share": float(np.asarray(reader.shares)[taken].mean()) if len(taken) else 1.0,
        "risk": float(risks.mean()) if len(taken) else 0.0,
        "risk_error": float(risks.std() / math.sqrt(len(risks))) if len(taken) else 0.0,
        "scored_images": len(taken),
        "scored_patients": len(risks),
    }
