"""Two labs of drawn cells, their files, and the run that joins them; fixtures in ``conftest.py``."""

import pandas as pd
import yaml
from PIL import Image

from sparsecontrast import checkpoint
from sparsecontrast.overrides import assign
from tests.cell_files import draw_cell
from tests.federations import partitions, serve

MODEL = (
    "experiment=cells", "cells.classes=[disc,ring]", "train.image_size=32", "train.batch_size=8",
    "train.local_epochs=1", "method.width=16", "method.heads=2", "federation.rounds=2",
    "federation.connect_timeout=60", "evaluation.bootstrap=20", "evaluation.overlays=2",
)  # fmt: skip
ALONE = ("federation.sites=1", "federation.min_sites=1", "federation.rounds=1", "cells.train_labs=[grey]")


def told(root, out, *more):
    return [*MODEL, assign("cells.root", root), assign("output_dir", out), *more]


def join(root, out):
    """Two labs, two rounds: the run's folder, and what the labs sent."""
    return out, serve(partitions(2), told(root, out)).sent


def weights(folder, number=2):
    return checkpoint.round_file(folder, number).read_bytes()


def lab(folder, name, root=None, *more):
    """A lab's own file; its pictures lie below its folder, or nowhere."""
    told = {
        "name": name, "state_dir": str(folder / name / "state"),
        "overrides": [*([assign("cells.root", root)] if root else []), *more],
    }  # fmt: skip
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "site.yaml").write_text(yaml.safe_dump(told))
    return {"site-config": str(folder / name / "site.yaml")}


def one_lab(folder, lab_name, *kinds):
    """Write the pictures of one lab, of some kinds."""
    (folder / "images").mkdir(parents=True)
    found = []
    for kind_of_cell in kinds:
        for i in range(10):
            path = f"images/{kind_of_cell}_{i}.png"
            drawn = draw_cell("disc" if kind_of_cell == "blast" else kind_of_cell, lab_name, i)
            Image.fromarray(drawn).save(folder / path)
            found.append({"path": path, "label": kind_of_cell, "site": lab_name, "group_id": path})
    pd.DataFrame(found).to_csv(folder / "index.csv", index=False)
    return folder
