"""Which pictures a lab has, before any is opened: path, label, lab and group of each."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from sparsecontrast.classify.settings import CellsConfig
from sparsecontrast.config import anchored
from sparsecontrast.errors import ConfigError, IndexSchemaError, MissingDataError

PICTURES = (".png", ".jpg", ".jpeg")


def find_pictures(config: CellsConfig) -> tuple[Path, pd.DataFrame]:
    """Find the pictures, and open none: their folder, and a table of path, label, lab and group.

    Raises:
        MissingDataError: no root, or no such folder or table.
        IndexSchemaError: a column that is not there, or no table at all.
    """
    if config.root is None:
        raise MissingDataError("cells.root: not set; give the folder of the pictures, cells.root=FOLDER")
    root = anchored(config.root)
    if not root.is_dir():
        raise MissingDataError(f"cells.root={root}: no such folder")
    return root, _from_index(config, root) if config.layout == "index" else _from_folders(config, root)


def _from_index(config: CellsConfig, root: Path) -> pd.DataFrame:
    path = root / str(config.index)
    if not path.is_file():
        raise MissingDataError(f"{path}: no such table; see cells.index, or cells.layout=folders")
    table = _read_table(path)
    columns = {"path": config.path, "label": config.label, "lab": config.lab, "group": config.group}
    absent = [f"cells.{key}={name}" for key, name in columns.items() if name not in table]
    if absent:
        raise IndexSchemaError(
            f"{path}: no column for {', '.join(absent)}; it has {', '.join(table.columns)}"
        )
    found = pd.DataFrame({key: table[name] for key, name in columns.items()})
    found["group"] = found["group"].where(found["group"] != "", found["path"])
    return found


def _read_table(path: Path) -> pd.DataFrame:
    """Read every field as text; pandas would fill a row that is too short and move one that is too long."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file, strict=True) if line]
    except OSError as error:
        raise MissingDataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise IndexSchemaError(f"{path}: not a table in UTF-8 with commas: {error}") from error
    if not lines:
        raise IndexSchemaError(f"{path}: empty; its first line must name the columns")
    for number, line in enumerate(lines[1:], 1):
        if len(line) != len(lines[0]):
            raise IndexSchemaError(
                f"{path}: row {number} below the header has {len(line)} fields, the header {len(lines[0])}; "
                "write an empty field between commas, and a comma within quotes"
            )
    table = pd.DataFrame(lines[1:], columns=lines[0], dtype=str)
    return table.loc[:, ~table.columns.duplicated()]


def _from_folders(config: CellsConfig, root: Path) -> pd.DataFrame:
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in PICTURES and p.parent != root)
    if not files:
        raise MissingDataError(f"{root}: no folder with pictures; expected ROOT/CLASS/*.jpeg")
    names = [str(p.relative_to(root)) for p in files]
    groups = _groups([p.stem for p in files], config.group_pattern)
    return pd.DataFrame({
        "path": names, "label": [_told(p.parent.name) for p in files],
        "lab": config.lab_name or config.name, "group": groups,
    })  # fmt: skip


def _told(name: str) -> str:
    """Write a folder's name as a class can be told everywhere, bytes that are no UTF-8 in hexadecimals."""
    return name.encode(errors="backslashreplace").decode()


def _groups(stems: Sequence[str], pattern: str | None) -> list[str]:
    """Group of each file's name: the pattern's first bracket, else the name."""
    if pattern is None:
        return list(stems)
    try:
        matches = [re.search(pattern, stem) for stem in stems]
        return [m[1] if m else stem for m, stem in zip(matches, stems, strict=True)]
    except (re.error, IndexError) as error:
        raise ConfigError(
            f"cells.group_pattern={pattern}: not a regular expression with a bracket ({error})"
        ) from None


def given_classes(table: pd.DataFrame, classes: Sequence[str]) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """Keep the pictures of these classes; names the others."""
    out = table[~table["label"].isin(classes)]
    reasons = [
        (path, f"class {label}: none of this run's" if label else "no label")
        for path, label in zip(out["path"].astype(str), out["label"].astype(str), strict=True)
    ]
    return table[table["label"].isin(classes)], reasons


def common_classes(table: pd.DataFrame, config: CellsConfig) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """Keep the wanted classes; names the pictures of rare ones, and those without a label.

    Raises:
        ConfigError: a class that was asked for is not there.
    """
    counts = table["label"].value_counts()
    unknown = [name for name in config.classes if name not in counts]
    if unknown:
        raise ConfigError(
            f"cells.classes: no picture of {', '.join(unknown)}; there are {', '.join(counts.index)}"
        )
    wanted = set(config.classes or counts[counts >= config.min_images].index) - {""}
    out = table[~table["label"].isin(wanted)]
    reasons = [
        (path, f"class {label}: {counts[label]} pictures, too few" if label else "no label")
        for path, label in zip(out["path"].astype(str), out["label"].astype(str), strict=True)
        if not config.classes or not label
    ]
    return table[table["label"].isin(wanted)], reasons
