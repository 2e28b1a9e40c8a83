"""A data set in memory-mapped form: pixels, their index rows, and boxes in the pixels' own frame."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from sparsecontrast.data.decode import placement
from sparsecontrast.errors import ConfigError, EmptySiteError

if TYPE_CHECKING:
    import pandas as pd

LABEL = "label_"  # prefix of label columns in an index
CANARY = "canary"  # column of an index whose patients tossed coins: in, out, or empty
HELD_OUT = "out"
UNNAMED = "unnamed-"  # prefix of a pseudonym made of a study or a file, whose patient nobody tells


@dataclass(frozen=True)
class Dataset:
    """Readable images and what is known of them; row i is the same image everywhere.

    Attributes:
        images: uint8 [N, S, S]; a memory map, or a view of one for neighbouring rows. Writing to it
            never reaches the disk.
        frame: index rows by site and split, among equals in the order of the source; its index is 0..N-1.
        boxes: one float32 [n, 4] an image, (x, y, w, h) in pixels of ``images``.
        box_labels: one label a box.
        quarantine: what was left out: path, reason, stage.
    """

    images: np.ndarray
    frame: pd.DataFrame
    boxes: list[np.ndarray]
    box_labels: list[list[str]]
    quarantine: pd.DataFrame

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def labels(self) -> list[str]:
        """Names of the label columns, without their prefix."""
        return [c.removeprefix(LABEL) for c in self.frame.columns if c.startswith(LABEL)]

    @property
    def patient_codes(self) -> np.ndarray:
        """One int64 code an image, equal for equal patients; meaningless outside this data set.

        Patients are numbered by their first row, not by pseudonyms: these depend on the site's random key,
        and draws of patients by a seed must not.
        """
        _, first, codes = np.unique(
            self.frame["patient_id"].to_numpy(dtype=str), return_index=True, return_inverse=True
        )
        return np.argsort(np.argsort(first))[codes].astype(np.int64)

    def select(self, rows: np.ndarray | Sequence[int] | Sequence[bool]) -> Dataset:
        """Keep rows given by a boolean mask [N] or by numbers, in that order.

        Neighbouring rows in rising order, as those of one site or of one site's split are, stay in
        the memory map; any other choice is copied into memory.
        """
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        run = len(rows) > 0 and rows[0] >= 0 and (np.diff(rows) == 1).all()
        return replace(
            self,
            images=self.images[rows[0] : rows[-1] + 1] if run else self.images[rows],
            frame=self.frame.iloc[rows].reset_index(drop=True),
            boxes=[self.boxes[i] for i in rows],
            box_labels=[self.box_labels[i] for i in rows],
        )

    def site(self, name: str) -> Dataset:
        """Keep one site.

        Raises:
            EmptySiteError: it has no usable image.
        """
        mask = (self.frame["site"] == name).to_numpy()
        if not mask.any():
            known = ", ".join(sorted(self.frame["site"].unique())[:20])
            raise EmptySiteError(f"site {name!r} has no usable image; sites with images: {known}")
        return self.select(mask)

    def split(self, name: str) -> Dataset:
        """Keep train, val or test; may be empty."""
        return self.select((self.frame["split"] == name).to_numpy())

    def training(self, canaries: float = 0.0) -> Dataset:
        """Keep what may be trained on: the split train, less the canaries who drew tails; may be empty.

        Raises:
            ConfigError: ``canaries`` is a share, but no coin was tossed: nobody would be held out.
        """
        if canaries > 0 and CANARY not in self.frame:
            raise ConfigError(
                f"audit.canaries={canaries}: the index has no column {CANARY}; run it with `python -m "
                "simulation`, or make the index with `python -m simulation.partition`"
            )
        return self.select((self.frame["split"] == "train").to_numpy() & ~held_out(self.frame))

    def named(self) -> Dataset:
        """Keep the images that tell their patient: of the others, a person may have several budgets."""
        return self.select(~self.frame["patient_id"].astype(str).str.startswith(UNNAMED).to_numpy(dtype=bool))


def held_out(frame: pd.DataFrame) -> np.ndarray:
    """Whether each image, bool [N], is of a canary who drew tails."""
    if CANARY not in frame:
        return np.zeros(len(frame), dtype=bool)
    return (frame[CANARY] == HELD_OUT).to_numpy(dtype=bool)


def cached_boxes(
    frame: pd.DataFrame, shapes: np.ndarray, size: int
) -> tuple[list[np.ndarray], list[list[str]]]:
    """Map an index's boxes into cache pixels.

    Args:
        frame: index rows; ``boxes`` are in pixels of ``width`` x ``height`` (0 = as decoded).
        shapes: int [N, 2], (height, width) as decoded.
        size: side of the cached squares.

    Returns:
        float32 [n, 4] (x, y, w, h) and labels, one of each an image.
    """
    boxes = [np.zeros((0, 4), dtype=np.float32) for _ in range(len(frame))]
    labels: list[list[str]] = [[] for _ in range(len(frame))]
    texts, heights, widths = (frame[name].to_list() for name in ("boxes", "height", "width"))
    for row in (row for row, text in enumerate(texts) if text != "[]"):
        found, shape = json.loads(texts[row]), shapes[row].tolist()
        table = np.array([[b["x"], b["y"], b["w"], b["h"]] for b in found], dtype=np.float64).reshape(-1, 4)
        left, top, w, h = placement(shape[0], shape[1], size)
        across, down = w / (widths[row] or shape[1]), h / (heights[row] or shape[0])
        boxes[row] = (table * [across, down, across, down] + [left, top, 0, 0]).astype(np.float32)
        labels[row] = [str(b["label"]) for b in found]
    return boxes, labels
