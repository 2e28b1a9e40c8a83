"""Labels and boxes of images out of the tables of a recipe."""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from sparsecontrast.data.recipe import Boxes, Labels, Names, Recipe, Table, snake
from sparsecontrast.errors import RecipeError

Reader = Callable[[Table], pd.DataFrame | None]
_QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")
_SIGNS = {"1": 1.0, "1.0": 1.0, "0": 0.0, "0.0": 0.0, "-1": -1.0, "-1.0": -1.0, "": math.nan}
_MOST_NAMES = 100


def image_labels(rows: pd.DataFrame, recipe: Recipe, read: Reader) -> pd.DataFrame:
    """Read all label blocks of a recipe.

    Args:
        rows: the joined table, maybe several rows an image.
        recipe: says which blocks, and how rows of one image fold into one.
        read: gives the table of a ``long`` block.

    Returns:
        float64 columns ``label_<name>`` of 1, 0 and NaN: one row an image, in the order of ``rows``.

    Raises:
        RecipeError: a missing column, a cell that is no label, a label that two blocks define.
    """
    found: dict[str, pd.Series] = {}
    for block in recipe.labels:
        for name, column in _block(rows, recipe, block, read).items():
            if name in found:
                raise RecipeError(f"recipe.labels: two blocks define {name!r}")
            found[str(name)] = column
    frame = pd.DataFrame(found, index=rows.index, dtype=float).add_prefix("label_")
    if recipe.one_row_per is None:
        return frame
    groups = frame.groupby(rows[recipe.one_row_per].to_numpy(), sort=False)
    if recipe.reduce == "any":
        return groups.max().reset_index(drop=True)
    share = groups.mean().reset_index(drop=True)
    return (share > 0.5).astype(float).where(share.notna())


def _block(rows: pd.DataFrame, recipe: Recipe, block: Labels, read: Reader) -> pd.DataFrame:
    if block.kind == "columns":
        return _columns(rows, recipe, block)
    if block.kind == "long":
        return _long(rows, block, read)
    assert block.column is not None
    cells = _column(rows, block)
    if cells is None:
        return pd.DataFrame(index=rows.index)
    split = _separated(block.separator) if block.kind == "separated" else _listed
    return _membership([split(cell) for cell in cells], block, rows.index)


def _columns(rows: pd.DataFrame, recipe: Recipe, block: Labels) -> pd.DataFrame:
    names = _auto_columns(rows, recipe) if block.names is None else block.names
    found = {}
    for name, sources in names:
        there = [s for s in sources if s in rows]
        if not there:
            raise RecipeError(f"label {name!r}: no column {list(sources)}; there are {list(rows.columns)}")
        found[name] = _agreed(name, [_numbers(rows[s]) for s in there])
    frame = pd.DataFrame(found, index=rows.index, dtype=float)
    if recipe.blank == "negative":  # beside at least one filled cell: without any, nobody looked
        looked = frame.notna().any(axis=1)
        frame.loc[looked] = frame.loc[looked].fillna(0.0)
    return frame.replace(-1.0, {"ignore": np.nan, "positive": 1.0, "negative": 0.0}[recipe.uncertain])


def _auto_columns(rows: pd.DataFrame, recipe: Recipe) -> Names:
    """Take every column that holds nothing but 1, 0, -1 and empty cells, and has no other role."""
    roles = {c for field in recipe.fields.values() if field for c in field.columns}
    found: dict[str, list[str]] = {}
    for column in rows.columns:
        values = set(rows[column].unique())
        if column not in roles and values - {""} and values <= set(_SIGNS):
            found.setdefault(snake(column), []).append(column)
    return tuple((name, tuple(columns)) for name, columns in found.items())


def _agreed(name: str, columns: Sequence[pd.Series]) -> pd.Series:
    """Fold columns of one meaning (Pneumonia and pneumonia) into one; they must not contradict."""
    found = columns[0]
    for other in columns[1:]:
        if (found.notna() & other.notna() & (found != other)).any():
            raise RecipeError(f"label {name!r}: two columns of that name contradict each other")
        found = found.where(found.notna(), other)
    return found


def _numbers(cells: pd.Series) -> pd.Series:
    if wrong := sorted(set(cells.unique()) - set(_SIGNS)):
        raise RecipeError(f"label column {cells.name!r}: {wrong[:3]} are none of 1, 0, -1 or empty")
    return cells.map(_SIGNS).astype(float)


def _long(rows: pd.DataFrame, block: Labels, read: Reader) -> pd.DataFrame:
    assert block.table is not None
    table = read(block.table)
    if table is None:
        return pd.DataFrame(index=rows.index)
    need(rows, block.table.on, "the images")
    need(table, block.table.on.values(), "the labels")
    cells = _column(table, block)
    if cells is None:
        return pd.DataFrame(index=rows.index)
    texts: dict[tuple[str, ...], set[str]] = {}
    for key, text in zip(_keys(table, list(block.table.on.values())), cells, strict=True):
        texts.setdefault(key, set()).add(text)
    found = [texts.get(key) for key in _keys(rows, list(block.table.on))]
    return _membership(found, block, rows.index)


def _membership(found: Sequence[set[str] | None], block: Labels, index: pd.Index) -> pd.DataFrame:
    """Turn sets of texts into 1 and 0 a label; a row without any text is not labelled."""
    names = block.names
    if names is None:
        texts = sorted({t for row in found if row for t in row if t})
        if set(texts) <= set(_SIGNS):  # numbers name nothing: a block of kind columns reads them
            texts = []
        if len(texts) > _MOST_NAMES:
            raise RecipeError(f"more than {_MOST_NAMES} different labels: list those you mean under 'names'")
        names = tuple((snake(t), (t,)) for t in texts)
    unknown = set(block.unknown)
    known = np.array([bool(row) and row != {""} and not row & unknown for row in found])
    columns = {name: _means(found, frozenset(t)) for name, t in names}
    frame = pd.DataFrame(columns, index=index, dtype=float)
    frame.loc[~known] = np.nan
    return frame


def _means(found: Sequence[set[str] | None], texts: frozenset[str]) -> list[float]:
    return [float(bool(row and not texts.isdisjoint(row))) for row in found]


def _separated(separator: str) -> Callable[[str], set[str]]:
    return lambda cell: {part.strip() for part in cell.split(separator)} - {""}


def _listed(cell: str) -> set[str]:
    """Read the names in ``['nodule', ' mass', nan]``, as PadChest writes them."""
    return {(one or other).strip() for one, other in _QUOTED.findall(cell)} - {""}


def _column(rows: pd.DataFrame, block: Labels) -> pd.Series | None:
    """Return the first column of a block that is there; None if it may be absent and is."""
    assert block.column is not None
    there = [name for name in block.column.columns if name in rows]
    if not there and not block.column.optional:
        need(rows, block.column.columns, "the labels")
    return rows[there[0]] if there else None


def image_boxes(rows: pd.DataFrame, recipe: Recipe, read: Reader) -> pd.Series:
    """Gather the boxes of each row's image as JSON: a list of {label, x, y, w, h} in pixels of the file.

    A row without four finite numbers, or without area, is no box: that is how some sets write "none".
    """
    found: list[list[dict[str, Any]]] = [[] for _ in range(len(rows))]
    for block in recipe.boxes:
        if block.table is None:
            if recipe.one_row_per is None:
                raise RecipeError("recipe.boxes without 'file': boxes in the image table need one_row_per")
            table, here, there = rows, [recipe.one_row_per], [recipe.one_row_per]
        else:
            table, here, there = read(block.table), list(block.table.on), list(block.table.on.values())
        if table is None:
            continue
        need(rows, here, "the images")
        need(
            table,
            [*there, *block.corners, *([] if block.label.optional else block.label.columns)],
            "the boxes",
        )
        by_key: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for key, box in _read_boxes(table, block, there):
            by_key.setdefault(key, []).append(box)
        for boxes, key in zip(found, _keys(rows, here), strict=True):
            boxes.extend(by_key.get(key, []))
    return pd.Series([json.dumps(boxes) for boxes in found], index=rows.index, dtype=str, name="boxes")


def _read_boxes(
    table: pd.DataFrame, block: Boxes, keys: Sequence[str]
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    named = {text: name for name, texts in block.names or () for text in texts}
    numbers = [pd.to_numeric(table[c], errors="coerce").to_numpy(float) for c in block.corners]
    column = next((c for c in block.label.columns if c in table), None)
    texts = (
        [block.label.constant or ""] * len(table) if column is None else table[column].str.strip().tolist()
    )
    for key, text, x, y, w, h in zip(_keys(table, keys), texts, *numbers, strict=True):
        if block.is_xyxy:
            w, h = w - x, h - y
        if math.isfinite(x + y + w + h) and w > 0 and h > 0:
            sides = {"x": float(x), "y": float(y), "w": float(w), "h": float(h)}
            yield key, {"label": named.get(text, snake(text)), **sides}


def _keys(rows: pd.DataFrame, columns: Sequence[str]) -> list[tuple[str, ...]]:
    return list(zip(*(rows[c].str.strip().tolist() for c in columns), strict=True))


def need(rows: pd.DataFrame, columns: Iterable[str], where: str) -> None:
    """Raise a RecipeError that names the columns that are missing and those that are there."""
    if missing := [name for name in columns if name not in rows]:
        raise RecipeError(f"{where}: no column {missing}; there are {list(rows.columns)}")
