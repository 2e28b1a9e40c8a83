"""The real blood cells of two labs, dealt to ten, and how well a classifier of theirs tells kinds apart."""

from pathlib import Path

import pandas as pd
from sklearn.metrics import roc_auc_score

from sparsecontrast import checkpoint
from sparsecontrast.classify.federated_run import read_federated
from sparsecontrast.classify.run import probabilities, run_cells

CELLS = Path("../shared/data/wbc")


def deal(count: int, folder: Path, source: Path = CELLS) -> Path:
    """Deal the groups of each lab and kind in turn to labs ``hospital_00`` and so on.

    Args:
        count: of the labs.
        folder: for the new table, beside a link to the pictures.
        source: folder with ``index.csv`` and ``images``.

    Returns:
        ``folder``, for ``cells.root``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "images").exists():
        (folder / "images").symlink_to(source.resolve() / "images")
    table = pd.read_csv(source / "index.csv", dtype=str, keep_default_na=False)
    firsts = table.drop_duplicates(["site", "group_id"]).sort_values(["label", "site", "group_id"])
    firsts = firsts.assign(dealt=[f"hospital_{i % count:02d}" for i in range(len(firsts))])
    joined = table.merge(firsts[["site", "group_id", "dealt"]], on=["site", "group_id"])
    # a group is one lab's: the same name at the two that the cells came from is two groups
    joined["group_id"] = joined["site"] + "/" + joined["group_id"]
    joined.drop(columns="site").rename(columns={"dealt": "site"}).to_csv(folder / "index.csv", index=False)
    return folder


def score(run: Path, number: int | None = None) -> float:
    """AUROC on the cells that no lab trained on: each kind against the rest, mean of the kinds.

    Args:
        run: a folder of a federation of classifiers.
        number: of the round; the newest, where it is None.
    """
    read = read_federated(run)
    if number is not None:
        read.network.load_state_dict(checkpoint.read_round(run, number).tensors)
    cells, split = run_cells(read)
    told = probabilities(read.network, cells, split.test)
    return float(roc_auc_score(cells.labels[split.test].numpy(), told, multi_class="ovr", average="macro"))
