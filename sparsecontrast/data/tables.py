"""Tables of a data set, joined into one row an image, as a recipe says. All cells are text; "" is empty."""

import os
import re
import string
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sparsecontrast.data.labels import image_boxes, image_labels, need
from sparsecontrast.data.recipe import FIELDS, Field, Recipe, Source, Table
from sparsecontrast.errors import MissingDataError, RecipeError

_EMPTY = {"nan", "NaN", "NA", "N/A", "None", "null", "NULL"}


def read_rows(root: Path, recipe: Recipe) -> pd.DataFrame:
    """Read, join, derive, fold and locate: everything about the images that no image file need tell.

    Args:
        root: the folder of the data set; files of the recipe are relative to it.
        recipe: checked by ``parse_recipe``.

    Returns:
        One row an image: ``path`` (under root as the recipe says; the file need not exist), the text
        columns patient, study, site, view, split, height, width ("" where unknown), ``label_<name>``
        as 1, 0 or NaN, ``boxes`` as JSON.

    Raises:
        MissingDataError: a table is not there.
        RecipeError: a table lacks a column, joins nothing, or two rows claim one image.
    """
    if not recipe.images or not recipe.path:
        raise RecipeError("recipe: 'images' (the table) and 'path' (where a row's file lies) are needed")
    rows = read_sources(root, recipe.images)
    for table in recipe.join:
        rows = _join(rows, root, table)
    for name, field in recipe.derive.items():
        rows[name] = field_of(rows, field)
    if recipe.one_row_per is not None:
        need(rows, [recipe.one_row_per], "the images")
    labels = image_labels(rows, recipe, lambda table: read_table(root, table))
    boxes = image_boxes(rows, recipe, lambda table: read_table(root, table))
    if recipe.one_row_per is not None:
        first = ~rows[recipe.one_row_per].duplicated()
        rows, boxes = rows[first].reset_index(drop=True), boxes[first].reset_index(drop=True)
    found = {name: field_of(rows, recipe.fields[name]) for name in FIELDS}
    paths = locate(root, recipe.path, rows)
    if twice := [p for p, again in zip(paths, pd.Series(paths).duplicated(), strict=True) if again]:
        raise RecipeError(
            f"{len(twice)} rows name a file that another row names, first {twice[0]}: set recipe.one_row_per"
        )
    return pd.concat([pd.DataFrame({"path": paths, **found}), labels, boxes], axis=1)


def read_table(root: Path, table: Table) -> pd.DataFrame | None:
    """Read a table to join; None where it is optional and absent."""
    if table.optional and not all(_resolve(root, source) for source in table.sources):
        return None
    return read_sources(root, table.sources)


def read_sources(root: Path, sources: Sequence[Source]) -> pd.DataFrame:
    """Read sources and put them one below the other; columns that only some have are "" elsewhere."""
    parts = []
    for source in sources:
        file = _resolve(root, source)
        if file is None:
            raise MissingDataError(f"no file {' or '.join(source.files)} in {root}: is data.root right?")
        parts.append(_read(file, source).assign(**source.set))
    return pd.concat(parts, ignore_index=True).fillna("")


def field_of(rows: pd.DataFrame, field: Field | None) -> pd.Series:
    """Find one value a row: text, "" where there is none.

    Raises:
        RecipeError: a column that is not optional is missing.
    """
    if field is None or field.constant is not None:
        return pd.Series("" if field is None else field.constant, index=rows.index, dtype=str)
    if not field.optional:
        need(rows, field.columns, "the images")
    found = pd.Series("", index=rows.index, dtype=str)
    for name in field.columns:
        if name in rows:
            found = found.where(found != "", _matched(rows[name].str.strip(), field.pattern))
    return found if field.values is None else found.replace(dict(field.values))


def locate(root: Path, patterns: Sequence[str], rows: pd.DataFrame) -> list[str]:
    """Fill path patterns, one path a row: the first that exists, else the first at all.

    A ``*`` may stand in the folders before the first ``{column}``; those folders are listed once,
    not searched for every row. A pattern with a column that the table lacks is passed over.
    """
    usable = [p for p in patterns if _columns(p) <= set(rows.columns)]
    if not usable:
        raise RecipeError(f"recipe.path {list(patterns)}: no pattern fits the columns {list(rows.columns)}")
    chosen = pd.Series("", index=rows.index, dtype=str)
    for pattern in usable:
        empty = chosen == ""
        if not empty.any():
            break
        chosen = chosen.where(~empty, pd.Series(_existing(root, pattern, rows[empty]), dtype=str))
        chosen = chosen.fillna("")
    fallback = _fill(usable[0], rows)
    return [str(c or root / f) for c, f in zip(chosen, fallback, strict=True)]


def _existing(root: Path, pattern: str, rows: pd.DataFrame) -> dict[object, str]:
    """Map row to path for the rows whose file exists under this pattern."""
    folders = pattern.split("{", 1)[0].rsplit("/", 1)[0] if "/" in pattern.split("{", 1)[0] else ""
    rest = pattern[len(folders) :].lstrip("/")
    filled = list(zip(rows.index, _fill(rest, rows), strict=True))
    if "*" not in folders:
        candidates = ((i, os.path.join(root, folders, name)) for i, name in filled)
        return {i: path for i, path in candidates if os.path.isfile(path)}
    there = _listing(sorted(root.glob(folders)), deep=any("/" in name for _, name in filled))
    return {i: there[name] for i, name in filled if name in there}


def _listing(folders: Sequence[Path], deep: bool) -> dict[str, str]:
    """List the files of folders once, by their path below the folder; the first folder wins."""
    there: dict[str, str] = {}
    for folder in folders:
        for above, below, names in os.walk(folder):
            if not deep:
                below.clear()
            inside = os.path.relpath(above, folder).replace(os.sep, "/")
            for name in names:
                there.setdefault(name if inside == "." else f"{inside}/{name}", os.path.join(above, name))
    return there


def _fill(pattern: str, rows: pd.DataFrame) -> list[str]:
    records = rows[sorted(_columns(pattern))].to_dict("records")
    return [string.Formatter().vformat(pattern, (), record) for record in records]  # type: ignore[arg-type]


def _columns(pattern: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(pattern) if name}


def _join(rows: pd.DataFrame, root: Path, table: Table) -> pd.DataFrame:
    """Add the columns of a table by its keys; the first of several equal keys counts."""
    other = read_table(root, table)
    if other is None:
        return rows
    need(rows, table.on, "the images")
    need(other, table.on.values(), f"{table.sources[0].files[0]}")
    left, right = list(table.on), list(table.on.values())
    other = other.drop_duplicates(right)
    clash = [c for c in other.columns if c in rows.columns and c not in right]
    other = other.drop(columns=clash).rename(columns=dict(zip(right, left, strict=True)))
    joined = rows.merge(other, how="left", on=left, indicator="_from")
    if not table.optional and not (joined["_from"] == "both").any():
        raise RecipeError(f"{table.sources[0].files[0]}: no row joins the images by {dict(table.on)}")
    return joined.drop(columns="_from").fillna("")


def _matched(cells: pd.Series, pattern: str | None) -> pd.Series:
    if pattern is None:
        return cells
    try:
        return cells.str.extract(pattern, expand=True)[0].fillna("")
    except (re.error, ValueError) as error:
        raise RecipeError(f"pattern {pattern!r}: {error}") from error


def _resolve(root: Path, source: Source) -> Path | None:
    for pattern in source.files:
        if found := sorted(root.glob(pattern)):
            return found[0]
    return None


def _read(file: Path, source: Source) -> pd.DataFrame:
    named: dict[str, Any] = {}
    if source.columns is not None:
        named = {"header": None, "names": list(source.columns)}
    try:
        if file.suffix == ".json":
            return pd.read_json(file, dtype=False).astype(str)
        with warnings.catch_warnings():
            # NIH rows end in a comma that the header of some copies lacks
            warnings.simplefilter("ignore", pd.errors.ParserWarning)
            rows = pd.read_csv(
                file, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig", **named
            )
    except (pd.errors.ParserError, pd.errors.EmptyDataError, ValueError) as error:
        raise RecipeError(f"{file}: not a table that can be read: {error}") from error
    rows.columns = rows.columns.str.strip()
    return rows.replace(dict.fromkeys(_EMPTY, ""))
