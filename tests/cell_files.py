"""A folder of drawn cells of two labs: dark discs and dark rings on a bright smear, off the middle."""

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

CLASSES = ("disc", "ring")
SIDE = 32


def draw_cell(kind: str, lab: str, seed: int) -> np.ndarray:
    """Draw one cell: uint8 [SIDE, SIDE, 3]."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    cy, cx = draw.uniform(10, SIDE - 10, 2)
    far = np.hypot(y - cy, x - cx)
    ground = np.array([235, 215, 160] if lab == "yellow" else [200, 195, 215], dtype=np.float64)
    image = np.broadcast_to(ground, (SIDE, SIDE, 3)) + draw.normal(0, 4, (SIDE, SIDE, 3))
    inside = far < 7 if kind == "disc" else (far < 8.5) & (far > 4.5)
    image = np.where(inside[..., None], np.array([95, 45, 130]) + draw.normal(0, 8, (SIDE, SIDE, 3)), image)
    return image.clip(0, 255).astype(np.uint8)


def write_cells(folder: Path, each: int = 12, rare: int = 0) -> Path:
    """Write ``each`` cells of each class and lab with an index.csv; ``rare`` of a third class."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for lab in ("yellow", "grey"):
        for kind in CLASSES:
            rows += [(lab, kind, i) for i in range(each)]
    rows += [("grey", "rare", i) for i in range(rare)]
    found = []
    for number, (lab, kind, i) in enumerate(rows):
        path = f"images/{lab}_{kind}_{i}.png"
        Image.fromarray(draw_cell("disc" if kind == "rare" else kind, lab, number)).save(folder / path)
        found.append({"path": path, "label": kind, "site": lab, "group_id": f"{lab}-{kind}-{i // 2}"})
    pd.DataFrame(found).to_csv(folder / "index.csv", index=False)
    return folder


WORDS = (
    "train.image_size=32", "train.epochs=4", "train.batch_size=16", "method.width=16", "method.heads=2",
    "cells.min_images=8", "evaluation.bootstrap=50", "evaluation.overlays=5",
)  # fmt: skip
