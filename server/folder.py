"""The run folder: started once, continued with ``resume``, never mixed up with another run."""

import contextlib
import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sparsecontrast import checkpoint
from sparsecontrast.config import as_dict
from sparsecontrast.durable import write_bytes
from sparsecontrast.errors import CheckpointError, StorageError
from sparsecontrast.federated import RunConfig
from sparsecontrast.resume import refuse_old_rounds, resolve

__all__ = ["RunFolder", "alone", "open_folder", "refuse_old_rounds", "resolve"]

OTHER_SECONDS = 90.0  # for another server's end


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
    config: RunConfig
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


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep every other server off a run folder; one that was killed keeps nobody off.

    A ServerApp may outlive its SuperLink by some seconds, so one that continues the run waits for it.

    Args:
        path: of the run folder; made if it is not there.

    Raises:
        StorageError: another server is at work on this run, or the folder cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path / ".lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        _lock(handle, path)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, path: Path) -> None:
    deadline = time.monotonic() + OTHER_SECONDS
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise StorageError(
                    f"{path}: another server is at work on this run; stop it first, or wait for its end"
                ) from None
        time.sleep(0.2)


def open_folder(config: RunConfig, words: Sequence[str]) -> RunFolder:
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
