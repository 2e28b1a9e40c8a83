"""The small vocabulary in which ``configs/data/*.yaml`` says how a data set becomes an index.

    recipe:
      images: train.csv            the table of images; or several sources, see ``Source``
      join: [TABLE, ...]           more columns, by keys
      derive: {name: FIELD}        new columns, made from others
      one_row_per: image_id        fold several rows an image (readers, boxes) into one, by ``reduce``
      reduce: majority | any
      path: "images/{name}.png"    or several patterns, the first that exists; * is allowed in the folders
                                   before the first {column}
      patient, study, site, view, split, height, width: FIELD
      labels: [LABELS, ...]
      boxes: [BOXES, ...]
      uncertain: ignore | positive | negative    what -1 means
      blank: ignore | negative                   what an empty cell beside filled ones means

A FIELD is a column; or a list of columns, each of which may be absent, the first filled one wins; or
``{column: ..., pattern: regex with one group, values: {old: new}}``; or ``{value: constant}``.

NaN means "not labelled". Rows without a patient are patients of their own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsecontrast.errors import RecipeError

KINDS = ("columns", "separated", "list", "long")
Names = tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Source:
    """A CSV or JSON file: the first of ``files`` (patterns allowed) that exists.

    ``columns`` names the columns of a file without a header; ``set`` adds constant columns.
    """

    files: tuple[str, ...]
    columns: tuple[str, ...] | None
    set: Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """Sources one below the other, and by which columns they join: ``on`` is {image column: table column}."""

    sources: tuple[Source, ...]
    on: Mapping[str, str]
    optional: bool


@dataclass(frozen=True)
class Field:
    """How one value of an image is found; see the module."""

    columns: tuple[str, ...] = ()
    optional: bool = False
    pattern: str | None = None
    values: Mapping[str, str] | None = None
    constant: str | None = None


@dataclass(frozen=True)
class Labels:
    """Labels of one ``kind``.

    columns: one column a label, cells 1, 0, -1 or empty.
    separated: one text column, names between ``separator``.
    list: one text column that holds a Python list of names.
    long: a ``table`` with one row an image and name; images it does not mention stay unlabelled.

    ``names`` pairs each label with the texts that mean it; None takes what is there. Rows that hold
    a text of ``unknown`` are not labelled.
    """

    kind: str
    names: Names | None
    column: Field | None
    separator: str
    unknown: tuple[str, ...]
    table: Table | None


@dataclass(frozen=True)
class Boxes:
    """Boxes: rows of ``table`` (None: of the images), four columns as ``xywh`` or ``xyxy``, in pixels."""

    table: Table | None
    corners: tuple[str, ...]
    is_xyxy: bool
    label: Field
    names: Names | None


@dataclass(frozen=True)
class Recipe:
    """A recipe, checked; see the module."""

    images: tuple[Source, ...]
    path: tuple[str, ...]
    derive: Mapping[str, Field]
    join: tuple[Table, ...]
    one_row_per: str | None
    reduce: str
    fields: Mapping[str, Field | None]
    labels: tuple[Labels, ...]
    boxes: tuple[Boxes, ...]
    uncertain: str
    blank: str


FIELDS = ("patient", "study", "site", "view", "split", "height", "width")
_KEYS = {"images", "path", "derive", "join", "one_row_per", "reduce", "labels", "boxes", "uncertain", "blank"}
_JOINED = {"file", "files", "on", "optional"}


def parse_recipe(recipe: Mapping[str, Any]) -> Recipe:
    """Check a recipe as YAML gives it.

    Raises:
        RecipeError: an unknown or missing key, or a value outside the vocabulary, by name.
    """
    _known(recipe, _KEYS | set(FIELDS), "recipe")
    return Recipe(
        images=_sources(recipe.get("images") or [], "recipe.images"),
        path=_texts(recipe.get("path") or [], "recipe.path"),
        derive={n: _need(_field(v, f"recipe.derive.{n}")) for n, v in (recipe.get("derive") or {}).items()},
        join=tuple(_table(t, f"recipe.join[{i}]") for i, t in enumerate(recipe.get("join") or [])),
        one_row_per=recipe.get("one_row_per"),
        reduce=_choice(recipe, "reduce", ("any", "majority"), "recipe"),
        fields={name: _field(recipe.get(name), f"recipe.{name}") for name in FIELDS},
        labels=tuple(_labels(x, f"recipe.labels[{i}]") for i, x in enumerate(recipe.get("labels") or [])),
        boxes=tuple(_boxes(x, f"recipe.boxes[{i}]") for i, x in enumerate(recipe.get("boxes") or [])),
        uncertain=_choice(recipe, "uncertain", ("ignore", "positive", "negative"), "recipe"),
        blank=_choice(recipe, "blank", ("ignore", "negative"), "recipe"),
    )


def _sources(value: Any, where: str) -> tuple[Source, ...]:
    entries = [value] if isinstance(value, str | Mapping) else list(value)
    return tuple(_source(e, f"{where}[{i}]") for i, e in enumerate(entries))


def _source(value: Any, where: str) -> Source:
    if isinstance(value, str):
        value = {"file": value}
    _known(value, {"file", "columns", "set"}, where)
    if not value.get("file"):
        raise RecipeError(f"{where}: 'file' is missing")
    columns = value.get("columns")
    return Source(
        _texts(value["file"], f"{where}.file"),
        None if columns is None else _texts(columns, f"{where}.columns"),
        {str(k): str(v) for k, v in (value.get("set") or {}).items()},
    )


def _table(value: Any, where: str) -> Table:
    _known(value, _JOINED, where)
    on = value.get("on")
    if not on:
        raise RecipeError(f"{where}: 'on' is missing, the columns by which it joins")
    if not isinstance(on, Mapping):
        on = {name: name for name in _texts(on, f"{where}.on")}
    files = value.get("files")
    sources = _sources({"file": value.get("file")} if files is None else files, where)
    return Table(sources, {str(k): str(v) for k, v in on.items()}, bool(value.get("optional", False)))


def _field(value: Any, where: str) -> Field | None:
    if value is None:
        return None
    if isinstance(value, str):
        return Field((value,))
    if not isinstance(value, Mapping):
        return Field(_texts(value, where), optional=True)
    _known(value, {"column", "pattern", "values", "value"}, where)
    if "value" in value:
        return None if value["value"] is None else Field(constant=str(value["value"]))
    column = value.get("column")
    if column is None:
        raise RecipeError(f"{where}: needs 'column' or 'value'")
    values = value.get("values")
    return Field(
        _texts(column, where),
        optional=not isinstance(column, str),
        pattern=value.get("pattern"),
        values=None if values is None else {str(k): str(v) for k, v in values.items()},
    )


def _labels(value: Any, where: str) -> Labels:
    _known(value, {"kind", "names", "column", "separator", "unknown"} | _JOINED, where)
    kind = value.get("kind")
    if kind not in KINDS:
        raise RecipeError(f"{where}: kind={kind!r} must be one of {', '.join(KINDS)}")
    if (kind == "columns") != (value.get("column") is None):
        raise RecipeError(f"{where}: 'column' goes with every kind but 'columns'")
    joined = {k: v for k, v in value.items() if k in _JOINED}
    if bool(joined) != (kind == "long"):
        raise RecipeError(f"{where}: 'file' and 'on' go with kind 'long', and only with it")
    return Labels(
        kind, _names(value.get("names"), where), _field(value.get("column"), f"{where}.column"),
        str(value.get("separator", "|")), _texts(value.get("unknown") or [], where),
        _table(joined, where) if joined else None,
    )  # fmt: skip


def _boxes(value: Any, where: str) -> Boxes:
    _known(value, {"xywh", "xyxy", "label", "names"} | _JOINED, where)
    if ("xywh" in value) == ("xyxy" in value):
        raise RecipeError(f"{where}: needs either 'xywh' or 'xyxy', four columns")
    corners = _texts(value.get("xywh") or value.get("xyxy") or [], where)
    if len(corners) != 4:
        raise RecipeError(f"{where}: four columns make a box, not {len(corners)}")
    joined = {k: v for k, v in value.items() if k in _JOINED}
    label = _need(_field(value.get("label"), f"{where}.label"), f"{where}: 'label' is missing")
    names = _names(value.get("names"), where)
    return Boxes(_table(joined, where) if joined else None, corners, "xyxy" in value, label, names)


def _names(value: Any, where: str) -> Names | None:
    """Read [Text, {name: Text}, {name: [Text, Other text]}]; "auto" or nothing gives None."""
    if value is None or value == "auto":
        return None
    names = []
    for entry in [value] if isinstance(value, Mapping) else value:
        for name, texts in entry.items() if isinstance(entry, Mapping) else [(snake(str(entry)), entry)]:
            names.append((str(name), _texts(texts, f"{where}.names.{name}")))
    known = [name for name, _ in names]
    if twice := sorted({n for n in known if known.count(n) > 1}):
        raise RecipeError(f"{where}.names: {twice} stand there twice")
    return tuple(names)


def snake(text: str) -> str:
    """Spell a label as the index does: ``Pleural_Thickening`` and ``Nodule/Mass`` become snake case."""
    return "_".join("".join(c.lower() if c.isalnum() else " " for c in text).split())


def _need(value: Field | None, message: str = "recipe.derive: a derived column needs a column") -> Field:
    if value is None:
        raise RecipeError(message)
    return value


def _known(value: Any, keys: set[str], where: str) -> None:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where}: expected keys {sorted(keys)}, got {value!r}")
    if unknown := sorted(set(map(str, value)) - keys):
        raise RecipeError(f"{where}: unknown {unknown}; known: {sorted(keys)}")


def _choice(value: Mapping[str, Any], key: str, options: Sequence[str], where: str) -> str:
    chosen = value.get(key) or options[0]
    if chosen not in options:
        raise RecipeError(f"{where}.{key}={chosen!r}: must be one of {', '.join(options)}")
    return chosen


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if isinstance(value, str | int | float):
        return (str(value),)
    if isinstance(value, Sequence):
        return tuple(str(v) for v in value)
    raise RecipeError(f"{where}: expected text or a list of texts, got {value!r}")
