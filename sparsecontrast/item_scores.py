"""``scores.csv``: every score behind the intervals of a run, so that runs can be judged together.

One row an item: a held-out image under a probe, or a patient under the test of membership. Items and
patients are named by their place below ``data.root``, not by pseudonyms or row numbers: those differ from
run folder to run folder, and a mean over seeds must pair the same films.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sparsecontrast.config import anchored
from sparsecontrast.durable import write_bytes
from sparsecontrast.errors import EvaluationError
from sparsecontrast.probes import Scored
from sparsecontrast.runs import SCORES
from sparsecontrast.scoring import MACRO, METRICS, POOLED, Cell
from sparsecontrast.settings import DataConfig
from sparsecontrast.tasks import Task

if TYPE_CHECKING:
    import pandas as pd


Found = dict["Question", tuple[np.ndarray, Scored]]
"""Names of the items, and their scores by one model; patients are named as in ``item_names``."""


class Question(NamedTuple):
    """What was scored by what: a task's label by the probe of some features, or membership by a score."""

    task: str
    label: str
    features: str


@dataclasses.dataclass(frozen=True)
class Keeper:
    """Takes linear probes' scores as they are made; a ``keep`` of ``scoring.Scorer.rows``.

    Attributes:
        names: of the images and of their patients, [N] each.
        fraction: of the labels, whose probes are kept.
        found: what was kept.
    """

    names: tuple[np.ndarray, np.ndarray]
    fraction: float
    found: Found = dataclasses.field(default_factory=dict)

    def __call__(self, features: str, task: Task, fraction: float, metric: str, cells: list[Cell]) -> None:
        """Keep labels' scores where all sites are asked at once; a model for each site has no one score."""
        images, patients = self.names
        for cell in cells if (fraction, metric) == (self.fraction, METRICS[0]) else ():
            alone = cell.label != MACRO and cell.site in (POOLED, task.site)
            if alone and not cell.reason and len(cell.scored[0].scores) == 1:
                (scored,), (rows,) = cell.scored, cell.rows
                own = dataclasses.replace(scored, patients=patients[rows])
                self.found[Question(task.name, cell.label, features)] = (images[rows], own)


def item_names(frame: "pd.DataFrame", data: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Name the images of an index and their patients, text [N] each; a patient as their first image.

    Digests, so that the table shows no file's name; who has the files can compute them.
    """
    root = "" if data.root is None else f"{anchored(data.root)}/"
    paths = frame["path"].astype(str)
    first = paths.groupby(frame["patient_id"].to_numpy()).transform("min")
    images, patients = (
        np.array([_digest(p.removeprefix(root)) for p in of.tolist()]) for of in (paths, first)
    )
    return images, patients


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:16]


def write_scores(folder: Path, found: Found) -> None:
    """Write the table of one run into its folder."""
    import pandas as pd

    tables = [
        pd.DataFrame(
            {**question._asdict(), "item": items, "patient": scored.patients, "stratum": scored.strata,
             "truth": scored.labels.astype(int), "score": scored.scores[0]}
        )
        for question, (items, scored) in found.items()
    ]  # fmt: skip
    text = pd.concat(tables).to_csv(index=False) if tables else ""
    write_bytes(folder / SCORES, text.encode())


def read_scores(folder: Path) -> "dict[Question, pd.DataFrame]":
    """Read the table of one run, rows in the order of their items; nothing where it is not there."""
    import pandas as pd

    path = folder / SCORES
    if not path.is_file() or path.stat().st_size == 0:
        return {}
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table = table.assign(truth=table["truth"].astype(int), score=table["score"].astype(float))
    groups = table.groupby(list(Question._fields), sort=False)
    return {
        Question(*map(str, key)): part.sort_values("item", ignore_index=True)
        for key, part in groups  # type: ignore[misc]
    }


def pooled(tables: "Sequence[pd.DataFrame]") -> Scored:
    """Join one question's tables of several runs: one model each, on the same items.

    Raises:
        EvaluationError: they hold other items, or say other things of them.
    """
    first, *others = tables
    for other in others:
        same = ("item", "patient", "stratum", "truth")
        if not first[list(same)].equals(other[list(same)]):
            raise EvaluationError(
                f"{SCORES}: these runs were not scored on the same {len(first)} items, a mean says nothing"
            )
    scores = np.stack([table["score"].to_numpy(float) for table in tables])
    return _scored(first, scores)


def _scored(table: "pd.DataFrame", scores: np.ndarray) -> Scored:
    return Scored(
        scores, table["truth"].to_numpy(float), table["patient"].to_numpy(dtype=str),
        table["stratum"].to_numpy(dtype=str), np.full(len(scores), 1 / len(scores)),
    )  # fmt: skip
