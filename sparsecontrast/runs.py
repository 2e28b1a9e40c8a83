"""A run folder, read back: what was configured, what happened, what came of it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecontrast.config import Config, anchored, compose
from sparsecontrast.errors import ConfigError, EvaluationError, MissingDataError
from sparsecontrast.overrides import merge

if TYPE_CHECKING:
    import pandas as pd

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
PARTITION = "partition.csv"
QUARANTINE = "quarantine.csv"
STATE = "state"  # of the simulated sites together: key of the pseudonyms, built index
EVALUATION = "evaluation.json"


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
    """Compose what the run was told, then ``overrides``; a later word on the same key wins."""
    import yaml

    try:
        saved = yaml.safe_load((folder / CONFIG).read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{folder / CONFIG}: not YAML ({error})") from error
    if not isinstance(saved, Mapping):
        raise ConfigError(f"{folder / CONFIG}: not the config of a run")
    config = compose(merge([str(word) for word in saved.get("overrides") or ()], overrides))
    data = config.data
    if data.index is not None and Path(data.index).name == PARTITION and (folder / PARTITION).is_file():
        data = dataclasses.replace(data, index=str(folder / PARTITION))  # the folder may have been moved
    return dataclasses.replace(config, output_dir=str(folder), data=data)


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
    import pandas as pd

    path = folder / name
    return pd.read_csv(path, dtype=str, keep_default_na=False) if path.is_file() else None


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


def _last_words(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep the last row of each (round, site): a resumed run says some rounds twice."""
    return list({(r.get("round"), r.get("site")): r for r in rows}.values())
