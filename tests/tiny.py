"""A real run of a few seconds' size: phantoms, a small ViT, two rounds."""

import json
from pathlib import Path

from sparsecontrast.config import compose
from sparsecontrast.pretrain import pretrain

WORDS = (
    "data.phantom.sites=3", "data.phantom.patients_per_site=16", "federation.rounds=2", "train.batch_size=8",
    "backbone.img_size=32", "backbone.patch_size=4", "backbone.depth=1",
    "method.projection_hidden=32", "method.projection_dim=16", "method.distill_every=2",
    "evaluation.bootstrap=20", "evaluation.label_fractions=[0.5,1.0]", "evaluation.knn_neighbours=3",
    "evaluation.overlays=3", "evaluation.tasks=[{name: two findings, labels: [nodule, effusion]}]",
)  # fmt: skip


def make_run(folder: Path, *words: str) -> Path:
    """Train at one place."""
    return pretrain(compose([*WORDS, f"output_dir={folder}", *words]), show=False)


def say_federated(folder: Path) -> Path:
    """Rewrite the metrics as three hospitals would have left them; the weights stay."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = []
    for row in rows:
        if row["site"] is None:
            told.append(row | {"bytes_up": 3000, "bytes_down": 3300})
            continue
        for i in range(3):
            share = {
                "images": 8 * (2 + i),
                "num_examples": 20,
                "weight": 1 / 3,
                "bytes_up": 1000,
                "bytes_down": 1100,
            }
            told.append(row | share | {"site": f"hospital_{i:02d}"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in told))
    return folder
