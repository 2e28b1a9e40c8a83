"""What is asked of frozen features: tasks, the images they speak about, and who trains whom.

A task is an entry of ``evaluation.tasks``::

    {name: bacterial vs viral, label: bacterial, site: guangzhou_wcmc, where: pneumonia}
    {name: NIH findings, labels: [mass, nodule], site: nih_bethesda, cross_validate: 5}

``site`` is the original source within which the task is judged, ``where`` a label that must be 1,
``cross_validate`` a number of folds by patient in place of the split. Without ``site`` a task is
judged pooled and at every site. Without any entry there is one task: all labels of the data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsecontrast.data.dataset import held_out
from sparsecontrast.errors import ConfigError, LabelError, PatientLeakError
from sparsecontrast.probes import patient_folds

if TYPE_CHECKING:
    import pandas as pd

SPLITS = ("train", "val", "test")
KEYS = {"name", "label", "labels", "site", "where", "cross_validate"}


@dataclass(frozen=True)
class Task:
    """One question; ``site`` None means pooled and at every site, ``folds`` None means the split."""

    name: str
    labels: tuple[str, ...]
    site: str | None = None
    where: str | None = None
    folds: int | None = None


@dataclass(frozen=True)
class Table:
    """The columns that an evaluation needs, aligned with the images: all [N].

    Attributes:
        patients: numbered by their first row.
        sites: where each image lay in training.
        sources: where it was taken; differs from ``sites`` when small sources were merged.
        splits: train, val or test.
        held_out: whether chance kept an image of the split train from being trained on.
        labels: 1, 0 or NaN (not labelled), by name.
    """

    patients: np.ndarray
    sites: np.ndarray
    sources: np.ndarray
    splits: np.ndarray
    held_out: np.ndarray
    labels: Mapping[str, np.ndarray]

    @property
    def scored_split(self) -> str:
        """The split that is scored: test, or val where the data has no test split."""
        return "test" if (self.splits == "test").any() else "val"


@dataclass(frozen=True)
class Division:
    """Row numbers of one train / validation / test division, and the number of its fold."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    fold: int = 0


def make_table(frame: "pd.DataFrame", sites: Sequence[str] | None = None) -> Table:
    """Take the columns of an index; ``sites`` replaces its sites where a run cut them otherwise.

    Raises:
        PatientLeakError: a patient stands in two splits.
    """
    patients = frame["patient_id"].to_numpy(dtype=str)
    splits = frame["split"].to_numpy(dtype=str)
    _refuse_leaks(patients, splits)
    source = frame["source_site"] if "source_site" in frame.columns else frame["site"]
    return Table(
        patients=_anonymous(patients),
        sites=np.array(frame["site"] if sites is None else sites, dtype=str),
        sources=source.to_numpy(dtype=str),
        splits=splits,
        held_out=held_out(frame),
        labels={
            str(c).removeprefix("label_"): frame[c].to_numpy(dtype=float)
            for c in frame.columns
            if str(c).startswith("label_")
        },
    )


def _anonymous(patients: np.ndarray) -> np.ndarray:
    """Number patients in the order of the rows.

    Pseudonyms depend on the site's random key; label budgets and folds are drawn by patient, and a
    seed must draw the same ones everywhere.
    """
    first: dict[str, str] = {}
    return np.array([first.setdefault(p, f"patient {len(first)}") for p in patients.tolist()], dtype=str)


def parse_tasks(entries: Sequence[Mapping[str, Any]], table: Table) -> tuple[Task, ...]:
    """Check ``evaluation.tasks`` against the data.

    Raises:
        ConfigError: an unknown key, a source that is not in the data, fewer than two folds.
        LabelError: a label that is not in the data, or no label at all.
    """
    if not table.labels:
        raise LabelError(
            "the data has no label column, so there is nothing to score; name labels in its recipe"
        )
    if not entries:
        return (Task("all findings", tuple(table.labels)),)
    tasks = tuple(_parse(entry, f"evaluation.tasks[{i}]", table) for i, entry in enumerate(entries))
    names = [t.name for t in tasks]
    if len(set(names)) < len(names):
        raise ConfigError(f"evaluation.tasks: every task needs a name of its own, got {names}")
    return tasks


def labelled_rows(task: Task, label: str, table: Table) -> np.ndarray:
    """Row numbers of the images that the task speaks about and whose label is known."""
    keep = np.isfinite(table.labels[label])
    if task.site is not None:
        keep &= table.sources == task.site
    if task.where is not None:
        keep &= table.labels[task.where] == 1
    return np.flatnonzero(keep)


def divisions(task: Task, rows: np.ndarray, table: Table, seed: int) -> list[Division]:
    """Cut labelled rows into one division by split, or into one per fold of patients.

    Where the data has no test split, val is scored and nothing is left to validate on.
    """
    none = rows[:0]
    if task.folds is not None:
        fold = patient_folds(table.patients[rows], task.folds, seed)
        return [Division(rows[fold != f], none, rows[fold == f], f) for f in range(task.folds)]
    split = table.splits[rows]
    scored = table.scored_split
    return [
        Division(
            rows[split == "train"], rows[split == "val"] if scored == "test" else none, rows[split == scored]
        )
    ]


def _parse(entry: Mapping[str, Any], where: str, table: Table) -> Task:
    unknown = sorted(set(entry) - KEYS)
    if unknown:
        raise ConfigError(f"{where}: unknown {unknown}; known: {sorted(KEYS)}")
    if ("label" in entry) == ("labels" in entry):
        raise ConfigError(f"{where}: give either label (one) or labels (a list)")
    labels = tuple(entry["labels"]) if "labels" in entry else (entry["label"],)
    condition = entry.get("where")
    # an index spells labels in lower case, whatever its table did
    known = {name.casefold(): name for name in table.labels} | {name: name for name in table.labels}
    spelt = {str(x): known.get(str(x), known.get(str(x).casefold())) for x in (*labels, condition) if x}
    absent = [name for name, found in spelt.items() if found is None]
    if absent or not labels:
        raise LabelError(f"{where}: the data has no label {absent}; known: {sorted(table.labels)}")
    labels, condition = tuple(str(spelt[str(x)]) for x in labels), spelt.get(str(condition))
    site, folds = entry.get("site"), entry.get("cross_validate")
    sources = sorted(set(table.sources.tolist()))
    if site is not None and site not in sources:
        raise ConfigError(f"{where}.site={site!r}: no image of that source; known: {sources}")
    if folds is not None and (not isinstance(folds, int) or folds < 2):
        raise ConfigError(f"{where}.cross_validate={folds!r}: must be a whole number of at least 2")
    return Task(str(entry.get("name") or labels[0]), labels, site, condition, folds)


def _refuse_leaks(patients: np.ndarray, splits: np.ndarray) -> None:
    unknown = sorted(set(splits.tolist()) - set(SPLITS))
    if unknown:
        raise PatientLeakError(f"splits {unknown} are none of {SPLITS}: no claim about leakage can be made")
    seen: dict[str, str] = {}
    leaked = [
        p for p, s in zip(patients.tolist(), splits.tolist(), strict=True) if seen.setdefault(p, s) != s
    ]
    if leaked:
        raise PatientLeakError(
            f"{len(set(leaked))} patients stand in two splits (first: {leaked[0]}): scores would lie; "
            "rebuild the index, or split by patient"
        )
