"""The index: one row an image, pseudonymised, with site, view, split, labels and boxes.

Made once at a site from a folder of DICOM files or from the tables of a data set; what cannot be
read is quarantined with its reason, and the rest goes on. Nothing of a DICOM header is kept but what
stands in ``COLUMNS``. The index and its quarantine hold paths and stay at the site.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from sparsecontrast.config import anchored
from sparsecontrast.data.csv_files import read_table, write_table
from sparsecontrast.data.dataset import UNNAMED
from sparsecontrast.data.filters import is_chest, is_frontal, normal_view
from sparsecontrast.data.images import Header, read_header
from sparsecontrast.data.pseudonyms import load_key, pseudonym
from sparsecontrast.data.recipe import FIELDS, Recipe, parse_recipe
from sparsecontrast.data.sites import merge_sites, one_site_a_patient, safe_name
from sparsecontrast.data.splits import SPLITS, published_splits
from sparsecontrast.data.tables import field_of, read_rows
from sparsecontrast.errors import (
    ConfigError,
    EmptySiteError,
    ImageReadError,
    IndexSchemaError,
    MissingDataError,
    PatientLeakError,
)
from sparsecontrast.progress import track
from sparsecontrast.settings import DataConfig

TEXTS = ("image_id", "path", "patient_id", "study_id", "site", "view", "split")
COLUMNS = (*TEXTS, "height", "width")
QUARANTINE = ("path", "reason", "stage")
LABEL = "label_"
SOURCE = "source_site"  # of an image whose site was merged or cut: scores are made within it

# Files that lie beside images everywhere; anything else in a DICOM folder is tried.
_NO_IMAGE = {
    ".csv", ".tsv", ".txt", ".json", ".xml", ".html", ".pdf", ".md", ".yaml", ".yml", ".zip", ".gz", ".tar",
    ".log", ".db", ".ini", ".exe", ".dll", ".inf", ".py", ".key", ".png", ".jpg", ".jpeg", ".xlsx",
}  # fmt: skip
_DICOM_NAMES = (".dcm", ".dicom", ".ima")
_READERS = min(32, 4 * (os.cpu_count() or 1))  # network drives wait more than they work


@dataclass(frozen=True)
class Index:
    """An index, what was left out, and how many were of each kind, of ``files``."""

    frame: pd.DataFrame
    quarantine: pd.DataFrame
    counts: dict[str, int]


def build_index(config: DataConfig, state_dir: Path, progress: bool = True) -> Index:
    """Index a folder of DICOM files (``kind: dicom``) or the tables of a recipe (``kind: csv``).

    Splits are drawn from the identifiers themselves, so they do not depend on the site's key; the
    identifiers are then replaced by pseudonyms. A patient found at two sites goes to one of them.
    Rows keep the order of the table, or of the sorted paths: sort by nothing that depends on the key.

    Args:
        config: ``root``, ``recipe``, filters, fractions, ``merge_sites_to``.
        state_dir: the site's folder of durable state, where the key of its pseudonyms lies.
        progress: show it while headers are read.

    Raises:
        ConfigError: no root, or a kind that is not indexed.
        MissingDataError: the root or a table is not there.
        RecipeError: the recipe does not fit the tables.
        PatientLeakError: the published split of a recipe divides a patient.
        EmptySiteError: nothing usable is left.
    """
    root, recipe = _root(config), parse_recipe(config.recipe)
    rows = _folder_rows(root, recipe) if config.kind == "dicom" else read_rows(root, recipe)
    rows["file"] = [os.path.relpath(path, root).replace(os.sep, "/") for path in rows["path"]]
    counts = {"files": len(rows)}
    rows, quarantine = _probe(rows, progress)
    counts["unreadable"] = len(quarantine)
    rows = _filtered(rows, config, counts)
    if rows.empty:
        raise EmptySiteError(f"{root}: no usable image: {_told(counts, quarantine)}")
    rows["site"], counts["moved"] = one_site_a_patient(rows["patient"].tolist(), rows["site"].tolist())
    if config.merge_sites_to is not None:
        rows = merge_sites(rows, config.merge_sites_to)
    patients, published = rows["patient"].tolist(), rows["split"].tolist()
    fractions = (config.val_fraction, config.test_fraction)
    rows["split"] = published_splits(patients, published, config.salt, *fractions)
    frame = _pseudonymised(rows, load_key(state_dir))
    _check(frame)
    return Index(frame, quarantine, counts)


def _root(config: DataConfig) -> Path:
    if config.kind not in ("csv", "dicom"):
        raise ConfigError(f"data.kind={config.kind}: only folders and tables are indexed, csv or dicom")
    if not config.root:
        raise ConfigError(f"data.root: say where the files of data={config.name} lie")
    root = anchored(config.root)
    if not root.is_dir():
        raise MissingDataError(f"data.root={root}: no such folder")
    return root


def _folder_rows(root: Path, recipe: Recipe) -> pd.DataFrame:
    """List candidate files below a folder, sorted; a recipe may read fields off the column ``file``."""
    paths = []
    for above, below, names in os.walk(root):
        below[:] = [name for name in below if not name.startswith(".")]
        paths += [Path(above) / name for name in names if not name.startswith(".") and name != "DICOMDIR"]
    paths = sorted(p for p in paths if p.suffix.lower() not in _NO_IMAGE)
    files = pd.DataFrame({"file": [p.relative_to(root).as_posix() for p in paths]}, dtype=str)
    found = {name: field_of(files, recipe.fields[name]) for name in FIELDS}
    return pd.DataFrame({"path": [str(p) for p in paths], **found, "boxes": "[]"})


def _probe(rows: pd.DataFrame, progress: bool) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read the headers that are needed, in parallel, and part the readable from the rest."""
    is_dicom = np.array([path.lower().endswith(_DICOM_NAMES) for path in rows["path"]], dtype=bool)
    asks = (rows["height"] == "") | (rows["width"] == "") | (is_dicom & (rows["view"] == ""))
    with ThreadPoolExecutor(_READERS) as pool:
        answers = pool.map(_answer, rows["path"], asks)
        found = list(track(answers, len(rows), "reading headers", progress and bool(asks.any())))
    wrong = pd.Series([isinstance(f, str) for f in found], index=rows.index, dtype=bool)
    quarantine = pd.DataFrame(
        {"path": rows["path"][wrong], "reason": [f for f in found if isinstance(f, str)], "stage": "index"},
        columns=list(QUARANTINE),
    )
    headers = [f for f in found if not isinstance(f, str)]
    return _with_headers(rows[~wrong].reset_index(drop=True), headers), quarantine.reset_index(drop=True)


def _answer(path: str, asks: bool) -> Header | str | None:
    """Return the header where it is asked for, None where the file is merely there, else the reason."""
    try:
        if asks:
            return read_header(path)
        return None if os.path.isfile(path) else "no such file"
    except ImageReadError as error:
        return str(error)


def _with_headers(rows: pd.DataFrame, headers: list[Header | None]) -> pd.DataFrame:
    """Fill what the tables left open from the headers; the tables win, but for the size."""
    rows["view"] = rows["view"].map(normal_view)
    for name in ("patient", "study", "view"):
        read = pd.Series([getattr(h, name) if h else "" for h in headers], index=rows.index, dtype=str)
        rows[name] = rows[name].where(rows[name] != "", read)
    for name in ("height", "width"):
        known = pd.to_numeric(rows[name], errors="coerce").fillna(0).astype(int)
        rows[name] = [getattr(h, name) if h else n for h, n in zip(headers, known, strict=True)]
    rows["chest"] = np.array([h is None or is_chest(h) for h in headers], dtype=bool)
    return rows


def _filtered(rows: pd.DataFrame, config: DataConfig, counts: dict[str, int]) -> pd.DataFrame:
    chest = rows.pop("chest") | (not config.chest_only)
    frontal = rows["view"].map(is_frontal).astype(bool) | (not config.frontal_only)
    counts["not_chest"] = int((~chest).sum())
    counts["not_frontal"] = int((chest & ~frontal).sum())
    rows = rows[chest & frontal].reset_index(drop=True)
    counts["kept"] = len(rows)
    rows["named"] = rows["patient"] != ""
    counts["without_a_patient"] = int((~rows["named"]).sum())
    for blank in ("study", "file"):  # a file of nobody is a patient of its own
        rows["patient"] = rows["patient"].where(rows["patient"] != "", rows[blank])
    rows["study"] = rows["study"].where(rows["study"] != "", rows["file"])
    rows["site"] = [safe_name(site or config.name) for site in rows["site"]]
    return rows


def _told(counts: dict[str, int], quarantine: pd.DataFrame) -> str:
    said = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items())
    reasons = quarantine["reason"].value_counts()
    return said + (f"; most often: {reasons.index[0]}" if len(reasons) else "")


def _pseudonymised(rows: pd.DataFrame, key: bytes) -> pd.DataFrame:
    """Replace every identifier by its pseudonym, and put the columns in order."""
    studies = rows["patient"] + "/" + rows["study"]  # "study1" is the name of many
    marked = zip(rows["patient"], rows["named"], strict=True)
    patients = [("" if named else UNNAMED) + pseudonym(key, "patient", p) for p, named in marked]
    labels = [name for name in rows.columns if name.startswith(LABEL)]
    frame = pd.DataFrame(
        {
            "image_id": [pseudonym(key, "image", file) for file in rows["file"]],
            "path": rows["path"],
            "patient_id": patients,
            "study_id": [pseudonym(key, "study", study) for study in studies],
        }
    )
    source = [SOURCE] if SOURCE in rows else []
    return pd.concat([frame, rows[[*COLUMNS[4:], *source, *labels, "boxes"]]], axis=1)


def label_names(frame: pd.DataFrame) -> list[str]:
    """Return the labels of an index, without their prefix, in the order of its columns."""
    return [name.removeprefix(LABEL) for name in frame.columns if name.startswith(LABEL)]


def write_index(frame: pd.DataFrame, csv: Path) -> None:
    """Write an index whole or not at all.

    Raises:
        IndexSchemaError: not an index.
        StorageError: it cannot be written; a file that was there before is still there.
    """
    _check(frame)
    write_table(frame, csv)


def read_index(csv: Path) -> pd.DataFrame:
    """Read an index and check it.

    Raises:
        MissingDataError: no such file, or one that cannot be read, such as a folder.
        IndexSchemaError: not a table in UTF-8, a column is missing or holds values of the wrong kind.
        PatientLeakError: a patient in two splits.
    """
    try:
        frame = read_table(csv)
    except FileNotFoundError:
        raise MissingDataError(f"{csv}: no such index; make one with `sparsecontrast index`") from None
    except OSError as error:
        reason = error.strerror or error
        raise MissingDataError(
            f"{csv}: cannot be read: {reason}; name the index.csv that `sparsecontrast index` made"
        ) from error
    except ValueError as error:
        raise IndexSchemaError(f"{csv}: not a table: {error}") from error
    try:
        numbers = {name: frame[name].astype(int) for name in ("height", "width") if name in frame}
        labels = {n: pd.to_numeric(frame[n]).astype(float) for n in frame.columns if n.startswith(LABEL)}
    except (ValueError, OverflowError) as error:
        raise IndexSchemaError(f"{csv}: {error}") from error
    frame = frame.assign(**numbers, **labels)
    _check(frame)
    return frame


def _check(frame: pd.DataFrame) -> None:
    """Hold an index to its schema."""
    if missing := [name for name in (*COLUMNS, "boxes") if name not in frame]:
        raise IndexSchemaError(f"not an index: no column {missing}; there are {list(frame.columns)[:12]}")
    if frame["image_id"].duplicated().any() or (frame[["image_id", "path", "patient_id", "site"]] == "").any(
        axis=None
    ):
        raise IndexSchemaError("an index needs image_id (each once), path, patient_id and site in every row")
    if strange := sorted(set(frame["split"]) - set(SPLITS)):
        raise IndexSchemaError(f"split: {strange[:3]} are none of {SPLITS}")
    for name in label_names(frame):
        values = frame[LABEL + name].dropna()
        if not values.isin((0.0, 1.0)).all():
            raise IndexSchemaError(f"{LABEL}{name}: only 1, 0 and empty cells are labels")
    if not frame["boxes"].map(_is_boxes).all():
        raise IndexSchemaError('boxes: each cell is a JSON list of {"label", "x", "y", "w", "h"}')
    if torn := int((frame.groupby("patient_id")["split"].nunique() > 1).sum()):
        raise PatientLeakError(f"{torn} patients stand in two splits: give all images of a patient one split")


def _is_boxes(cell: str) -> bool:
    if cell == "[]":
        return True
    try:
        return all(set(box) == {"label", "x", "y", "w", "h"} for box in json.loads(cell))
    except (TypeError, ValueError):
        return False
