"""How well kept cells meet annotated boxes: recall by kind and by size, intersection over union, spread."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sparsecontrast.collapse import collapse
from sparsecontrast.data.transforms import evaluation_view
from sparsecontrast.models.saliency import EXCLUDED, excluded_cells
from sparsecontrast.models.tokens import top_k
from sparsecontrast.overlays import box_recall, kept_mask

SIZES = {"under 2": (0, 2), "2 to 8": (2, 8), "8 to 32": (8, 32), "32 and more": (32, np.inf)}
BAR = "2 and more"
FEW = 5  # a mean over fewer boxes is no figure
BATCH = 128


@dataclass(frozen=True)
class Scene:
    """Boxed images, none of them seen in training.

    Attributes:
        name: of the data.
        images: uint8 [N, S, S].
        boxes: one [n, 4] an image, (x, y, w, h) in pixels; n >= 1.
        labels: one label a box.
    """

    name: str
    images: np.ndarray
    boxes: Sequence[np.ndarray]
    labels: Sequence[Sequence[str]]

    def groups(self, patch: int) -> dict[tuple[str, str], np.ndarray]:
        """Boxes of each (by, group) as a mask over all boxes: all, by kind, by area in patches."""
        areas = np.concatenate([b[:, 2] * b[:, 3] for b in self.boxes]) / patch**2
        kinds = np.array([label for labels in self.labels for label in labels])
        found = {("all", "all"): np.ones(len(areas), dtype=bool), ("patches", BAR): areas >= 2}
        found |= {("patches", n): (areas >= low) & (areas < high) for n, (low, high) in SIZES.items()}
        found |= {("kind", k): kinds == k for k in sorted(set(kinds.tolist()))}
        return {key: mask for key, mask in found.items() if mask.sum() >= FEW}


@dataclass(frozen=True)
class Overlap:
    """What one selector's choice is worth: recall of each box, and scalars over images."""

    recall: np.ndarray
    figures: Mapping[str, float]


def look(scene: Scene, selector: Callable, grid: tuple[int, int], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Score a scene's images as inference does.

    Returns:
        Scores [N, cells] with excluded cells last, and which those are, boolean [N, cells].
    """
    scores, excluded = [], []
    for start in range(0, len(scene.images), BATCH):
        view = evaluation_view(torch.from_numpy(scene.images[start : start + BATCH]), size)
        barred = excluded_cells(view, grid)
        with torch.no_grad():
            scores.append(selector(view).float() + EXCLUDED * barred)
        excluded.append(barred)
    return torch.cat(scores).numpy(), torch.cat(excluded).numpy()


def overlap(scene: Scene, scores: np.ndarray, excluded: np.ndarray, grid: tuple[int, int], m: int) -> Overlap:
    """Keep the m highest cells of each image and compare them with its boxes."""
    size = scene.images.shape[1]
    kept = [kept_mask(cells, grid) for cells in top_k(torch.from_numpy(scores), m).numpy()]
    recall = np.concatenate([box_recall(k, b, size) for k, b in zip(kept, scene.boxes, strict=True)])
    ious = [iou(k, b, size) for k, b in zip(kept, scene.boxes, strict=True)]
    spread = collapse(np.stack(kept).reshape(len(kept), -1), scores, excluded, grid)
    return Overlap(recall, {"iou": float(np.mean(ious)), **spread})


def iou(mask: np.ndarray, boxes: np.ndarray, size: int) -> float:
    """Intersection over union of kept cells [rows, columns] with the union of boxes, in whole pixels."""
    pixels = np.zeros((size, size), dtype=bool)
    for x, y, w, h in np.asarray(boxes, dtype=np.float64).reshape(-1, 4):
        across, down = slice(round(max(x, 0)), round(x + w)), slice(round(max(y, 0)), round(y + h))
        pixels[down, across] = True
    rows, columns = mask.shape
    kept = np.repeat(np.repeat(mask, size // rows, axis=0), size // columns, axis=1)
    return float((pixels & kept).sum() / max((pixels | kept).sum(), 1))
