"""``metrics.jsonl`` as TensorBoard events, for those who already watch their runs there."""

from pathlib import Path
from typing import Any

from sparsecontrast.errors import ConfigError, StorageError
from sparsecontrast.runs import read_metrics

FOLDER = "tensorboard"
LEFT_OUT = {"round", "rounds", "site", "state_round"}


def write_tensorboard(run_dir: str | Path) -> Path:
    """Write every scalar of ``metrics.jsonl`` under ``<run_dir>/tensorboard``, anew each time.

    A metric of one site is ``<metric>/<site>``, one of the whole round ``<metric>/all``; the step is
    the round.

    Raises:
        ConfigError: TensorBoard is not installed.
        StorageError: the folder cannot be written.
    """
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "tensorboard=true, but TensorBoard is not installed: pip install 'sparsecontrast[tensorboard]', "
            "or leave the switch off"
        ) from error
    folder = Path(run_dir) / FOLDER
    try:
        for old in folder.glob("events.*"):
            old.unlink()
        writer = SummaryWriter(str(folder))
        for row in read_metrics(Path(run_dir)):
            for name, value in _scalars(row):
                writer.add_scalar(name, value, int(row["round"]))
        writer.close()
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error.strerror}") from error
    return folder


def _scalars(row: dict[str, Any]) -> list[tuple[str, float]]:
    where = "all" if row.get("site") is None else row["site"]
    return [
        (f"{key}/{where}", float(value))
        for key, value in row.items()
        if key not in LEFT_OUT and isinstance(value, int | float) and not isinstance(value, bool)
    ]
