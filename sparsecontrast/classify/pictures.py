"""Pictures of what the classifier read: the cell, the pixels that were read, and where it would look.

Also contact sheets of the same as one PNG file, for a look without a browser.
"""

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sparsecontrast.classify.augment import normalise
from sparsecontrast.classify.cells import Cells
from sparsecontrast.methods.sparse_attn_net import SparseAttnNet

SIDE = 160  # pixels of one panel
GROUND, RANGE = 70, 75  # grey levels of what was not read: darker than the outline, lighter than a nucleus
EDGE = (255, 255, 255)  # round each square, outside it: no pixel that was read is hidden


@dataclass(frozen=True)
class Seen:
    """One cell in three panels (uint8 [SIDE, SIDE, 3]: image, pixels read, map), and what was said of it."""

    panels: tuple[np.ndarray, ...]
    lab: str
    truth: str
    said: str
    probability: float
    runner_up: str
    runner_up_probability: float

    @property
    def right(self) -> bool:
        """Whether the class is the labelled one."""
        return self.truth == self.said

    def uris(self) -> list[str]:
        """Return the panels as data URIs."""
        return [_data_uri(panel) for panel in self.panels]


def pictures(network: SparseAttnNet, cells: Cells, rows: torch.Tensor, count: int, seed: int) -> list[Seen]:
    """Draw ``count`` of ``rows``: labs and classes in turn, in the order of a seeded hash of the groups."""
    chosen = _choose(cells, rows, count, seed)
    if not len(chosen):
        return []
    with torch.no_grad():
        seen = network.look(normalise(cells.images[chosen]))
    likely = seen.logits.softmax(1).numpy()
    drawn = []
    for i, row in enumerate(chosen.tolist()):
        order = likely[i].argsort()[::-1]
        image = cells.images[row].permute(1, 2, 0).numpy()
        read = _mask(seen.kept[i].numpy(), network.grid)
        wanted = seen.coarse[i].numpy().reshape(network.grid)
        drawn.append(
            Seen(
                (_large(image), _read(image, read), _heat(image, wanted)),
                str(cells.labs[row]), cells.classes[int(cells.labels[row])],
                cells.classes[order[0]], float(likely[i, order[0]]),
                cells.classes[order[1]], float(likely[i, order[1]]),
            )
        )  # fmt: skip
    return drawn


def sheet(seen: Sequence[Seen], columns: int = 4) -> np.ndarray:
    """Lay pictures side by side, three panels each: uint8 [H, W, 3]."""
    blocks = [np.concatenate(one.panels, axis=1) for one in seen]
    while len(blocks) % columns:
        blocks.append(np.zeros_like(blocks[0]))
    lines = [np.concatenate(blocks[i : i + columns], axis=1) for i in range(0, len(blocks), columns)]
    return np.concatenate(lines, axis=0)


def _choose(cells: Cells, rows: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Take one of each lab and class, then a second of each, and so on."""
    texts = {r: f"{seed}:{cells.groups[r]}:{r}" for r in map(int, rows.tolist())}
    rank = {r: hashlib.sha256(t.encode(errors="surrogateescape")).digest() for r, t in texts.items()}
    turns: dict[tuple[str, int], int] = {}
    keys = {}
    for row in sorted(rank, key=lambda r: rank[r]):
        stratum = (str(cells.labs[row]), int(cells.labels[row]))
        turns[stratum] = turns.get(stratum, 0) + 1
        keys[row] = (turns[stratum], stratum)
    return torch.tensor(sorted(keys, key=lambda r: keys[r])[:count], dtype=torch.long)


def _mask(kept: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(grid[0] * grid[1], dtype=bool)
    mask[kept] = True
    return mask.reshape(grid)


def _large(image: np.ndarray) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def _read(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Show the pixels that were read as they are, outlined; the rest is grey and dim."""
    from PIL import Image

    big = np.asarray(Image.fromarray(mask).resize((SIDE, SIDE), Image.Resampling.NEAREST))
    sharp = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.NEAREST))
    grey = np.asarray(Image.fromarray(_large(image)).convert("L"), dtype=np.float32)[..., None]
    drawn = np.where(big[..., None], sharp, (GROUND + RANGE * grey / 255).repeat(3, axis=2))
    drawn[_grown(big) & ~big] = EDGE
    return drawn.astype(np.uint8)


def _grown(mask: np.ndarray) -> np.ndarray:
    """Add to a mask [H, W] the pixels that touch it, corners too."""
    height, width = mask.shape
    wide = np.pad(mask, 1)
    return np.any([wide[y : y + height, x : x + width] for y in range(3) for x in range(3)], axis=0)


def _heat(image: np.ndarray, coarse: np.ndarray) -> np.ndarray:
    """Lay the coarse map, after its sigmoid and stretched to the picture's range, over the grey picture."""
    from matplotlib import colormaps
    from PIL import Image

    values = 1 / (1 + np.exp(-coarse))
    values = (values - values.min()) / max(1e-6, float(np.ptp(values)))
    smooth = Image.fromarray(values.astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    colour = colormaps["magma"](np.asarray(smooth))[..., :3]
    grey = np.asarray(Image.fromarray(_large(image)).convert("L"), dtype=np.float32)[..., None] / 255
    return ((0.35 * grey + 0.65 * colour) * 255).astype(np.uint8)


def _data_uri(panel: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(panel).save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
