"""Pictures of what the method looks at: image, score map, kept cells, annotated boxes.

Also the number behind the pictures: which share of the annotated boxes lies in kept cells, beside
the share that cells kept at random would cover.
"""

import base64
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sparsecontrast.collapse import FEW_IMAGES, alarms, collapse
from sparsecontrast.data.transforms import evaluation_view
from sparsecontrast.models.saliency import excluded_cells
from sparsecontrast.stamps import FILMS, marker_pull

if TYPE_CHECKING:
    from sparsecontrast.data.cache import Dataset

SIDE = 224  # pixels of one panel
BATCH = 64
DIM = 0.55  # brightness of what is not kept
SIZES = (
    ("under half a cell", 0.5),
    ("half a cell to 2 cells", 2.0),
    ("2 to 8 cells", 8.0),
    ("8 cells and more", float("inf")),
)  # of a box's area, each below its number


@dataclass(frozen=True)
class Overlay:
    """One image in four panels, as data URIs, and what may be said of it without naming anybody."""

    panels: tuple[str, ...]
    site: str
    findings: str
    kept_of_boxes: float | None


def overlays(method: Any, dataset: "Dataset", count: int, seed: int) -> list[Overlay]:
    """Draw ``count`` held-out images, annotated ones first, one hospital after the other.

    Args:
        method: in evaluation mode, with ``look``.
        dataset: whose ``boxes`` are in pixels of its images.
        count: how many.
        seed: of the choice, which depends on no pseudonym.
    """
    chosen = choose_rows(dataset, count, seed)
    if not chosen:
        return []
    scores, kept, grid = look(method, dataset.images[chosen])
    drawn = []
    for i, row in enumerate(chosen):
        mask = kept_mask(kept[i], grid)
        boxes = dataset.boxes[row]
        panels = _panels(dataset.images[row], scores[i].reshape(grid), mask, boxes, method.backbone.cell)
        share = box_recall(mask, boxes, dataset.images.shape[1])
        drawn.append(
            Overlay(panels, str(dataset.frame["site"].iloc[row]), findings_of(dataset, row),
                    float(share.mean()) if len(share) else None)
        )  # fmt: skip
    return drawn


def look(method: Any, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Return scores [N, cells], kept cells [N, m] and the grid, for uint8 images [N, S, S]."""
    scores, kept, grid = [], [], (1, 1)
    for view in _views(method, images):
        with torch.no_grad():
            seen = method.look(view)
        scores.append(seen.scores.float().cpu().numpy())
        kept.append(seen.kept.cpu().numpy())
        grid = seen.grid
    return np.concatenate(scores), np.concatenate(kept), grid


def selection_spread(method: Any, dataset: "Dataset", seed: int) -> Mapping[str, Any] | None:
    """Measure whether the choice of cells has collapsed, over all held-out images.

    Returns:
        What ``collapse.collapse`` says, ``n_images``, what ``stamps.marker_pull`` says of a few of them, and
        ``alarms``; None where all or no cells are kept, or the images are too few to say.
    """
    rows = _held_out(dataset)
    if len(rows) < FEW_IMAGES:
        return None
    images = dataset.images[rows]
    scores, kept, grid = look(method, images)
    if not 0 < kept.shape[1] < grid[0] * grid[1]:
        return None
    excluded = torch.cat([excluded_cells(view, grid).cpu() for view in _views(method, images)])
    measured: dict[str, Any] = dict(collapse(_masks(kept, grid), scores, excluded.numpy(), grid))
    films = images[np.random.Generator(np.random.PCG64(seed)).permutation(len(images))[:FILMS]]
    generator = torch.Generator().manual_seed(seed)
    measured |= marker_pull(lambda x: _masks(look(method, x)[1], grid), films, grid, generator)
    return {**measured, "n_images": len(rows), "alarms": alarms(measured)}


def kept_mask(kept: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Turn kept cell numbers [m] into a mask of the grid [rows, columns]."""
    mask = np.zeros(grid[0] * grid[1], dtype=bool)
    mask[kept] = True
    return mask.reshape(grid)


def _masks(kept: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Kept cell numbers of images [N, m] as masks [N, cells]."""
    return np.stack([kept_mask(cells, grid).ravel() for cells in kept])


def box_recall(mask: np.ndarray, boxes: np.ndarray, size: int) -> np.ndarray:
    """Share of each box's area [n] that lies in kept cells.

    Args:
        mask: [rows, columns] of the cells of a square image.
        boxes: [n, 4] x, y, w, h in pixels of the image; parts outside it count as not kept.
        size: side of the image in pixels.
    """
    rows, columns = mask.shape
    x, y, w, h = np.asarray(boxes, dtype=np.float64).reshape(-1, 4).T
    across = _overlap(x, w, size, columns)
    down = _overlap(y, h, size, rows)
    return np.einsum("nr,rc,nc->n", down, mask.astype(np.float64), across) / np.maximum(w * h, 1e-9)


def selection_recall(method: Any, dataset: "Dataset", replicates: int, seed: int) -> Mapping[str, Any] | None:
    """Mean ``box_recall`` of the held-out images by kind and by size, with intervals over patients.

    Returns:
        ``chance`` (the share of cells kept), ``n_images``, ``kinds`` and ``sizes``: label, value, low,
        high, n_boxes, n_patients of each. None without an annotated image.
    """
    import pandas as pd

    rows = [r for r in _held_out(dataset) if len(dataset.boxes[r])]
    if not rows:
        return None
    _, kept, grid = look(method, dataset.images[rows])
    patients = pd.factorize(dataset.frame["patient_id"].iloc[rows])[0]
    kinds: dict[str, list[tuple[int, float]]] = {}
    sizes: dict[str, list[tuple[int, float]]] = {name: [] for name, _ in SIZES}
    side = dataset.images.shape[1]
    for cells, row, patient in zip(kept, rows, patients.tolist(), strict=True):
        boxes = dataset.boxes[row]
        found = box_recall(kept_mask(cells, grid), boxes, side)
        areas = boxes[:, 2] * boxes[:, 3] * (grid[0] * grid[1] / side**2)
        for label, area, share in zip(dataset.box_labels[row], areas, found.tolist(), strict=True):
            kinds.setdefault(label, []).append((patient, share))
            sizes[next(name for name, below in SIZES if area < below)].append((patient, share))
    return {
        "chance": kept.shape[1] / (grid[0] * grid[1]), "n_images": len(rows),
        "kinds": [{"label": n, **_mean_share(kinds[n], replicates, seed)} for n in sorted(kinds)],
        "sizes": [{"label": n, **_mean_share(v, replicates, seed)} for n, v in sizes.items() if v],
    }  # fmt: skip


def _views(method: Any, images: np.ndarray) -> Iterator[torch.Tensor]:
    """Evaluation views of uint8 images [N, S, S], a batch at a time."""
    for start in range(0, len(images), BATCH):
        batch = torch.from_numpy(np.ascontiguousarray(images[start : start + BATCH]))
        yield evaluation_view(batch, method.backbone.img_size)


def _mean_share(shares: Sequence[tuple[int, float]], replicates: int, seed: int) -> dict[str, float | int]:
    """Mean over boxes and its interval over resampled patients."""
    patients, values = np.array([p for p, _ in shares]), np.array([v for _, v in shares])
    codes = np.unique(patients, return_inverse=True)[1]
    total = int(codes.max()) + 1
    generator = np.random.Generator(np.random.PCG64(seed))
    weights = generator.multinomial(total, np.full(total, 1 / total), size=replicates)[:, codes]
    resampled = (weights * values).sum(axis=1) / weights.sum(axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {"value": float(values.mean()), "low": float(low), "high": float(high),
            "n_boxes": len(values), "n_patients": total}  # fmt: skip


def _held_out(dataset: "Dataset") -> list[int]:
    splits = dataset.frame["split"].to_numpy(dtype=str)
    wanted = "test" if (splits == "test").any() else "val"
    return np.flatnonzero(splits == wanted).tolist()


def choose_rows(dataset: "Dataset", count: int, seed: int) -> list[int]:
    """Held-out rows: annotated before others, hospitals in turn, in the order of a seeded hash."""
    sites = dataset.frame["site"].astype(str).tolist()
    rank = {r: hashlib.sha256(f"{seed}:{r}".encode()).digest() for r in _held_out(dataset)}
    turn: dict[tuple[bool, str], int] = {}
    keys = {}
    for row in sorted(rank, key=lambda r: rank[r]):
        bare = len(dataset.boxes[row]) == 0
        turn[bare, sites[row]] = turn.get((bare, sites[row]), 0) + 1
        keys[row] = (bare, turn[bare, sites[row]], rank[row])
    return sorted(keys, key=lambda r: keys[r])[:count]


def findings_of(dataset: "Dataset", row: int) -> str:
    """Name an image's labels and boxes in words."""
    labels = [n for n in dataset.labels if dataset.frame[f"label_{n}"].iloc[row] == 1]
    text = ", ".join(labels) or "no finding labelled"
    boxes = sorted(set(dataset.box_labels[row]))
    return f"{text}; boxes: {', '.join(boxes)}" if boxes else text


def _overlap(start: np.ndarray, length: np.ndarray, size: int, cells: int) -> np.ndarray:
    """Length [n, cells] that each interval shares with each cell."""
    edges = np.linspace(0, size, cells + 1)
    shared = np.minimum(edges[1:], (start + length)[:, None]) - np.maximum(edges[:-1], start[:, None])
    return np.clip(shared, 0, None)


def _panels(
    image: np.ndarray, scores: np.ndarray, mask: np.ndarray, boxes: np.ndarray, cell: int
) -> tuple[str, ...]:
    grey = np.repeat(enlarged(image.astype(np.float32) / 255)[..., None], 3, axis=2)
    panels = [grey, _heat(grey, scores), _kept(image, grey, mask, cell), _boxed(grey, boxes, image.shape[0])]
    return tuple(data_uri(p) for p in panels)


def enlarged(pixels: np.ndarray) -> np.ndarray:
    """Bring pixels [H, W] in [0, 1] to the size of a panel."""
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def data_uri(panel: np.ndarray) -> str:
    """Write pixels [H, W] or [H, W, 3] in [0, 1], cut there, as a picture within a page."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray((np.clip(panel, 0, 1) * 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _heat(grey: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Scores by rank, so that one outlier does not hide the rest; excluded cells stay plain."""
    from matplotlib import colormaps
    from PIL import Image

    ranks = scores.ravel().argsort().argsort().reshape(scores.shape) / max(1, scores.size - 1)
    smooth = Image.fromarray(ranks.astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    colour = colormaps["magma"](np.asarray(smooth))[..., :3]
    return 0.45 * grey + 0.55 * colour


def _kept(image: np.ndarray, grey: np.ndarray, mask: np.ndarray, cell: int) -> np.ndarray:
    """What is not kept, as coarse as the network gets it, and dimmed; a line around what is kept."""
    from PIL import Image

    small = max(1, image.shape[0] // cell)
    coarse = (
        Image.fromarray(image)
        .resize((small, small), Image.Resampling.BOX)
        .resize((SIDE, SIDE), Image.Resampling.NEAREST)
    )
    low = DIM * np.asarray(coarse, dtype=np.float32)[..., None] / 255
    big = np.asarray(Image.fromarray(mask).resize((SIDE, SIDE), Image.Resampling.NEAREST))
    out = np.where(big[..., None], grey, low)
    edge = np.zeros_like(big)
    edge[:, 1:] |= big[:, 1:] != big[:, :-1]
    edge[1:, :] |= big[1:, :] != big[:-1, :]
    return np.where(edge[..., None], np.array([0.35, 0.78, 0.98]), out)


def _boxed(grey: np.ndarray, boxes: Sequence[Any] | np.ndarray, size: int) -> np.ndarray:
    from PIL import Image, ImageDraw

    picture = Image.fromarray((np.clip(grey, 0, 1) * 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for x, y, w, h in np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * SIDE / size:
        draw.rectangle((x, y, max(x, x + w - 1), max(y, y + h - 1)), outline=(255, 176, 59), width=2)
    return np.asarray(picture, dtype=np.float32) / 255
