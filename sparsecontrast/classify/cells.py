"""Labelled pictures of cells, and how they are split: by lab and by group, never through a group."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sparsecontrast.classify.listing import common_classes, find_pictures, given_classes
from sparsecontrast.classify.settings import CellsConfig
from sparsecontrast.data.colour import read_colour
from sparsecontrast.errors import ConfigError, EmptySiteError, ImageReadError


@dataclass(frozen=True)
class Cells:
    """Pictures in memory.

    Attributes:
        images: uint8 [N, 3, S, S].
        labels: index into ``classes`` [N].
        classes: names, sorted.
        labs: of each picture [N].
        groups: of each picture [N]; a group of one lab stands in one split.
        left_out: rows (path, reason) that are not among them.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    labs: np.ndarray
    groups: np.ndarray
    left_out: pd.DataFrame

    def __len__(self) -> int:
        return len(self.labels)

    def own_groups(self) -> np.ndarray:
        """Number the groups [N], in the order of their names; the same name at two labs is two groups."""
        table = pd.DataFrame({"group": self.groups, "lab": self.labs})
        return table.groupby(["group", "lab"], sort=True).ngroup().to_numpy()

    def select(self, rows: Tensor) -> "Cells":
        """Keep rows, in the order given."""
        at = rows.numpy()
        return replace(
            self, images=self.images[rows], labels=self.labels[rows], labs=self.labs[at],
            groups=self.groups[at],
        )  # fmt: skip


@dataclass(frozen=True)
class Split:
    """Rows of each part, ascending."""

    train: Tensor
    val: Tensor
    test: Tensor


def load_cells(config: CellsConfig, image_size: int, classes: Sequence[str] | None = None) -> Cells:
    """Read every picture of the classes that are common enough.

    Args:
        config: where the pictures are, and what is asked of them.
        image_size: pixels of a side.
        classes: those of a network that is there already, sorted: they are taken as they are, some may have
            no picture, and pictures of others are left out. None finds them in the pictures.

    Raises:
        MissingDataError: no root, or no such folder or table.
        IndexSchemaError: a column that is not there, or no table at all.
        EmptySiteError: fewer than two classes are left.
        ConfigError: a class that was asked for is not there, or a pattern that is none.
    """
    root, table = find_pictures(config)
    table, left_out = common_classes(table, config) if classes is None else given_classes(table, classes)
    images, kept = [], []
    for row in table.itertuples():
        try:
            images.append(read_colour(root / str(row.path), image_size))
            kept.append(row.Index)
        except ImageReadError as error:
            left_out.append((str(row.path), str(error)))
    table = table.loc[kept]
    found = tuple(sorted(table["label"].unique()))
    if len(found) < (2 if classes is None else 1):
        asked = f"cells.min_images={config.min_images}" if classes is None else f"cells.classes={classes}"
        raise EmptySiteError(f"{root}: {len(found)} classes with {asked}")
    classes = found if classes is None else tuple(classes)
    return Cells(
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        torch.tensor([classes.index(name) for name in table["label"]]),
        classes,
        table["lab"].to_numpy(dtype=str),
        table["group"].to_numpy(dtype=str),
        pd.DataFrame(left_out, columns=["path", "reason"]),
    )


def lab_names(config: CellsConfig) -> list[str]:
    """Names of the labs that train, sorted; no picture is opened.

    Raises:
        DataError: as ``load_cells``.
    """
    _, table = find_pictures(config)
    if config.classes:
        table = table[table["label"].isin(config.classes)]
    known = sorted(table["lab"].astype(str).unique())
    _refuse_unknown(config.train_labs, known)
    return sorted(config.train_labs) or known


def split_cells(cells: Cells, config: CellsConfig, seed: int) -> Split:
    """Split by lab and group, stratified by lab and class; the seed shuffles the groups.

    A group is one lab's: labs count their patients from 1, each for itself, so the same name at two labs is
    two groups, and how a lab is split depends on its own pictures alone. A group goes where the class of its
    first picture sends it. Labs that are only tested are tested whole; of those that are trained and tested,
    ``test_fraction`` of the groups; ``val_fraction`` of what is left of the training labs is held out.

    Raises:
        ConfigError: a lab that is not there.
        EmptySiteError: a part without pictures.
    """
    parts = _parts(cells, config, seed)
    found = {name: torch.from_numpy(np.flatnonzero(parts == name)) for name in ("train", "val", "test")}
    empty = [name for name, rows in found.items() if not len(rows)]
    if empty:
        raise EmptySiteError(
            f"cells: no picture for {', '.join(empty)}; see cells.*_labs and cells.*_fraction"
        )
    return Split(**found)


def training_rows(cells: Cells, config: CellsConfig, seed: int) -> Tensor:
    """Rows of all groups that ``split_cells`` would not test on, ascending: nothing is chosen on ``val``.

    Raises:
        ConfigError: a lab that is not there.
    """
    return torch.from_numpy(np.flatnonzero(np.isin(_parts(cells, config, seed), ("train", "val"))))


def _parts(cells: Cells, config: CellsConfig, seed: int) -> np.ndarray:
    """Part of each picture [N]: train, val, test, or none."""
    known = sorted(set(cells.labs))
    trained, tested = config.train_labs or tuple(known), config.test_labs or config.train_labs or tuple(known)
    _refuse_unknown((*trained, *tested), known)
    place: dict[tuple[str, str], str] = {}
    for (lab, _), groups in _strata(cells).items():
        # by the name alone, without the lab: the splits of committed benchmarks rest on this order
        order = sorted(groups, key=lambda g: _rank(f"{seed}:{g}"))
        n_test = round(config.test_fraction * len(order)) if lab in trained else len(order)
        n_test = n_test if lab in tested else 0
        rest = order[n_test:] if lab in trained else []
        n_val = max(1, round(config.val_fraction * len(rest)))
        for part, names in (("test", order[:n_test]), ("val", rest[:n_val]), ("train", rest[n_val:])):
            place |= {(lab, name): part for name in names}
    return np.array([place.get(one, "") for one in zip(cells.labs, cells.groups, strict=True)])


def _rank(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()


def _refuse_unknown(labs: Sequence[str], known: Sequence[str]) -> None:
    for lab in labs:
        if lab not in known:
            raise ConfigError(f"cells: no lab {lab!r} among {', '.join(known)}")


def class_weights(labels: Tensor, classes: int, balance: float) -> Tensor:
    """Weights [C] in proportion to 1/count^balance, of mean 1 over pictures; an absent class counts once."""
    counts = torch.bincount(labels, minlength=classes).float().clamp_min(1)
    weights = counts**-balance
    return weights * counts.sum() / (weights * counts).sum()


def _strata(cells: Cells) -> dict[tuple[str, int], list[str]]:
    """Groups of each lab by the class of their first picture there."""
    first: dict[tuple[str, str], int] = {}
    for lab, group, label in zip(cells.labs, cells.groups, cells.labels.tolist(), strict=True):
        first.setdefault((lab, group), label)
    found: dict[tuple[str, int], list[str]] = {}
    for (lab, group), label in first.items():
        found.setdefault((lab, label), []).append(group)
    return found
