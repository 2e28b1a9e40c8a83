"""``--fresh``: delete an earlier run, its cache kept, and nothing that is no run's."""

import shutil
from pathlib import Path

import yaml

from sparsecontrast.config import anchored
from sparsecontrast.errors import ConfigError
from sparsecontrast.federated import RunConfig
from sparsecontrast.runs import CONFIG, EVALUATION, METRICS, PARTITION, QUARANTINE, SCORES

RUN_FILES = (
    CONFIG, METRICS, PARTITION, QUARANTINE, EVALUATION, SCORES, "report.html",
    "rounds", "sites", "tensorboard", "local_only",
)  # fmt: skip


def clear(config: RunConfig) -> None:
    """Delete the run in ``output_dir``.

    Raises:
        ConfigError: the folder holds something, and it is no run folder.
    """
    folder = anchored(config.output_dir)
    if config.resume is not None:
        raise ConfigError("--fresh deletes what resume= would continue; give one of them")
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not _is_run(folder)):
        raise ConfigError(f"--fresh: {folder} is not a run folder, nothing was deleted")
    for name in RUN_FILES:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _is_run(folder: Path) -> bool:
    """Whether a run was here: its config, or the cache that a run makes before it."""
    if any((folder / "cache").glob("pixels-*/header.json")):
        return True
    try:
        saved = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(saved, dict) and {"federation", "method", "output_dir"} <= set(saved)
