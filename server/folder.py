"""The run folder: started once, continued with ``resume``, never mixed up with another run."""

import contextlib
import dataclasses
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sparsecontrast import checkpoint, overrides
from sparsecontrast.config import Config, anchored, as_dict, compose
from sparsecontrast.durable import write_bytes
from sparsecontrast.errors import CheckpointError, ConfigError, StorageError

# what a continued run may change; everything else decides the weights, or who may see what
FREE = (
    "resume", "output_dir", "overrides", "experiment", "tensorboard", "evaluation", "data.cache_dir",
    "federation.rounds", "federation.workers", "federation.round_timeout", "federation.connect_timeout",
)  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """Where a run writes.

    Attributes:
        path: absolute.
        config: of the run.
        run_key: 32 hex digits, the same for all of a run's continuations.
        done: number of the last whole round, None when nothing was done.
    """

    path: Path
    config: Config
    run_key: str
    done: int | None

    def write_metrics(self) -> None:
        """Write ``metrics.jsonl`` from the rounds' JSON: whole rounds only, whatever was killed when."""
        rows: list[Mapping[str, Any]] = []
        for number in range(1, (self.done or 0) + 1):
            with contextlib.suppress(CheckpointError):  # a damaged old round costs its rows, not the run
                rows += checkpoint.read_meta(self.path, number).get("rows", [])
        text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
        write_bytes(self.path / "metrics.jsonl", text.encode())

    def add_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append a round's rows; they already stand in the round's JSON.

        Raises:
            StorageError: the disk is full.
        """
        text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
        path = self.path / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}; resume= makes it whole") from error


def resolve(words: Sequence[str]) -> tuple[Config, list[str]]:
    """Compose a run's config; with ``resume=FOLDER`` on top of what that folder's run was told.

    Args:
        words: overrides.

    Returns:
        The config, ``output_dir`` absolute, and the overrides that give it (without ``resume``).

    Raises:
        ConfigError: an impossible override, no run to continue, or a difference that would change
            what the run computes.
    """
    config = compose(list(words))
    if config.resume is None:
        folder = anchored(config.output_dir)
        words = overrides.merge(words, [overrides.assign("output_dir", folder)])
        return dataclasses.replace(config, output_dir=str(folder)), words
    folder = anchored(config.resume)
    saved = _saved(folder)
    words = overrides.merge(list(map(str, saved.get("overrides") or [])), list(words))
    words = overrides.without(words, ["resume", "output_dir"])
    words = [*words, overrides.assign("output_dir", folder)]
    resumed = compose(words)
    _compare(saved, as_dict(resumed), folder)
    return dataclasses.replace(resumed, resume=str(folder), output_dir=str(folder)), words


def open_folder(config: Config, words: Sequence[str]) -> RunFolder:
    """Start a run folder, or open the one to continue, with ``metrics.jsonl`` cut to whole rounds.

    Raises:
        ConfigError: the folder already holds rounds and ``resume`` was not given.
        CheckpointError: nothing whole to continue from.
        StorageError: the folder cannot be written.
    """
    refuse_old_rounds(config)
    path = Path(config.output_dir)
    done = checkpoint.latest(path) if config.resume is not None else None
    if config.resume is not None and done is None:
        raise CheckpointError(f"{path}: no whole round to continue from; start anew in another output_dir")
    run_key = secrets.token_hex(16) if done is None else str(checkpoint.read_meta(path, done).get("run_key"))
    record = {**as_dict(config), "overrides": list(words), "resume": None}
    write_bytes(path / "config.yaml", yaml.safe_dump(record, sort_keys=False).encode())
    folder = RunFolder(path, config, run_key, done)
    folder.write_metrics()
    return folder


def refuse_old_rounds(config: Config) -> None:
    """Keep a new run out of a folder with rounds.

    Raises:
        ConfigError: there are some, and ``resume`` was not given.
    """
    path = Path(config.output_dir)
    if config.resume is None and checkpoint.has_rounds(path):
        raise ConfigError(
            f"{path} already holds rounds: continue them with resume={path}, or choose another output_dir"
        )


def _saved(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"resume={folder}: no run there, cannot read {path.name}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML") from error
    if not isinstance(saved, dict):
        raise ConfigError(f"{path}: not the config of a run")
    return saved


def _compare(saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuse a continuation that would be another run; a moved folder is no difference."""
    home = str(saved.get("output_dir"))
    before, after = dict(_leaves(saved)), dict(_leaves(now))
    moved = {k: v.replace(home, str(folder), 1) if isinstance(v, str) else v for k, v in before.items()}
    changed = [
        f"{key} was {before.get(key)!r}, is {after.get(key)!r}"
        for key in sorted({*before, *after})
        if moved.get(key) != after.get(key) and not any(key == f or key.startswith(f"{f}.") for f in FREE)
    ]
    if changed:
        raise ConfigError(
            f"resume={folder}: this would be another run: {'; '.join(changed)}. Drop the overrides that "
            "differ, or start anew in another output_dir"
        )


def _leaves(tree: Any, where: str = "") -> list[tuple[str, Any]]:
    """Flatten nested mappings to dotted keys."""
    if isinstance(tree, Mapping) and tree:
        return [
            leaf for key, value in tree.items() for leaf in _leaves(value, f"{where}.{key}" if where else key)
        ]
    return [(where, tree)]
