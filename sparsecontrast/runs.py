"""A run folder, read back: what was configured, what happened, what came of it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecontrast.config import anchored, as_dict, compose
from sparsecontrast.differences import differences
from sparsecontrast.errors import ConfigError, EvaluationError, MissingDataError
from sparsecontrast.overrides import assign, merge
from sparsecontrast.settings import Config

if TYPE_CHECKING:
    import pandas as pd

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
PARTITION = "partition.csv"
QUARANTINE = "quarantine.csv"
EVALUATION = "evaluation.json"
SCORES = "scores.csv"
# keys of the config that hold a path, and may hold one into the run folder
PATHS = (("data", "root"), ("cells", "root"), ("data", "index"), ("data", "cache_dir"), ("site", "state_dir"),
         ("backbone", "pretrained"))  # fmt: skip


@dataclass(frozen=True)
class Run:
    """The small files of a run folder; what is not there is empty.

    Attributes:
        folder: absolute.
        config: as saved, with later overrides on top and ``output_dir`` where the folder lies now.
        sites: ``metrics.jsonl`` rows of one site in one round.
        rounds: ``metrics.jsonl`` rows of a whole round (site is null).
    """

    folder: Path
    config: Config
    sites: tuple[Mapping[str, Any], ...]
    rounds: tuple[Mapping[str, Any], ...]


def read_run(folder: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Read a run folder.

    Raises:
        MissingDataError: no such folder, or no run in it.
        ConfigError: an override that does not fit.
    """
    folder = anchored(folder)
    if not (folder / CONFIG).is_file():
        raise MissingDataError(f"{folder}: no run folder, it has no {CONFIG}; give the output_dir of a run")
    rows = read_metrics(folder)
    return Run(
        folder,
        read_config(folder, overrides),
        tuple(r for r in rows if r.get("site") is not None),
        tuple(r for r in rows if r.get("site") is None),
    )


def read_config(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """Compose what the run was told, then ``overrides``; a later word on the same key wins.

    Raises:
        ConfigError: what decides the network is not what the run had, and no override says so.
    """
    saved = read_saved(folder)
    config = compose(merge(saved["overrides"], overrides))
    _refuse_other_network(saved, as_dict(config), overrides, folder)
    return dataclasses.replace(config, output_dir=str(folder))


def read_saved(folder: Path) -> dict[str, Any]:
    """Read ``config.yaml`` as the run would have written it here: its config, and its ``overrides``.

    A run folder may be moved or copied: paths into the place where it was written become paths into
    the folder, in the config and in the overrides.

    Raises:
        ConfigError: the file is not the config of a run.
    """
    saved = _saved(folder / CONFIG)
    words = [str(word) for word in saved.get("overrides") or ()]
    home = anchored(str(saved.get("output_dir") or folder))
    for section, name in PATHS:
        inside = _inside(home, (saved.get(section) or {}).get(name))
        if inside is not None and home != folder:
            saved[section] |= {name: str(folder / inside)}
            words = merge(words, [assign(f"{section}.{name}", folder / inside)])
    return saved | {"output_dir": str(folder), "overrides": words}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl``; a last line torn by a crash is left out."""
    path = folder / METRICS
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise EvaluationError(f"{path}, line {number}: not JSON") from error
    return _last_words(rows)


def read_table(folder: Path, name: str) -> "pd.DataFrame | None":
    """Read a CSV of the run folder; None when it is not there."""
    from sparsecontrast.data import csv_files

    path = folder / name
    return csv_files.read_table(path) if path.is_file() else None


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """Read ``evaluation.json``; None when it is not there.

    Raises:
        EvaluationError: the file is torn.
    """
    path = folder / EVALUATION
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except ValueError as error:
        raise EvaluationError(f"{path}: not JSON; run `sparsecontrast evaluate` again") from error


def _saved(path: Path) -> dict[str, Any]:
    import yaml

    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({error})") from error
    if not isinstance(saved, dict):
        raise ConfigError(f"{path}: not the config of a run")
    return saved


def _refuse_other_network(
    saved: Mapping[str, Any], now: Mapping[str, Any], overrides: Sequence[str], folder: Path
) -> None:
    """Defaults may change from version to version; a run is never read as what it was not."""
    groups = ("method", "backbone")
    asked = [word.lstrip("+~").partition("=")[0] for word in overrides]
    asked += ["method.selection"] if "selection" in asked else []
    before, after = ({g: tree.get(g) for g in groups} for tree in (saved, now))
    found = differences(before, after, asked)
    if found:
        raise ConfigError(
            f"{folder}: made by another version of sparsecontrast: {'; '.join(found)}. Read it with that "
            "version, or give each of these keys as an override"
        )


def _inside(home: Path, value: Any) -> Path | None:
    """A path below ``home``, relative to it; None for another path, and for what is none (None, True)."""
    path = anchored(value) if isinstance(value, str) else None
    return path.relative_to(home) if path is not None and path.is_relative_to(home) else None


def _last_words(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep the last row of each (round, site): a resumed run says some rounds twice."""
    return list({(r.get("round"), r.get("site")): r for r in rows}.values())
