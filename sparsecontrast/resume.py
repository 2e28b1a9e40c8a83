"""``resume=FOLDER``: continue what a folder's run was told, and refuse what would make it another run."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsecontrast import checkpoint, overrides
from sparsecontrast.config import anchored, as_dict
from sparsecontrast.differences import differences
from sparsecontrast.errors import ConfigError
from sparsecontrast.federated import RunConfig, compose_run
from sparsecontrast.runs import CONFIG, read_saved

# what a continued run may change; everything else decides the weights, or who may see what
FREE = (
    "resume", "output_dir", "overrides", "experiment", "tensorboard", "evaluation",
    "audit.views", "audit.delta", "data.cache_dir",
    "federation.rounds", "federation.workers", "federation.round_timeout", "federation.connect_timeout",
)  # fmt: skip


def resolve(words: Sequence[str]) -> tuple[RunConfig, list[str]]:
    """Compose a run's config; with ``resume=FOLDER`` on top of what that folder's run was told.

    A run that ended before its first checkpoint has nothing to continue: it begins, as it was told to.

    Args:
        words: overrides.

    Returns:
        The config, ``output_dir`` absolute, ``resume`` null where the run begins; and the overrides that
        give it (without ``resume``).

    Raises:
        ConfigError: an impossible override, no run to continue, or a difference that would change
            what the run computes.
    """
    config = compose_run(list(words))
    if config.resume is None:
        folder = anchored(config.output_dir)
        words = overrides.merge(words, [overrides.assign("output_dir", folder)])
        return dataclasses.replace(config, output_dir=str(folder)), words
    folder = anchored(config.resume)
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"resume={folder}: no run there, it has no {CONFIG}; give the output_dir of a run")
    saved = read_saved(folder)
    words = overrides.without(overrides.merge(saved["overrides"], list(words)), ["resume", "output_dir"])
    words = [*words, overrides.assign("output_dir", folder)]
    resumed = compose_run(words)
    _compare(saved, as_dict(resumed), folder)
    begun = str(folder) if checkpoint.has_rounds(folder) else None
    return dataclasses.replace(resumed, resume=begun, output_dir=str(folder)), words


def refuse_old_rounds(config: RunConfig) -> None:
    """Keep a new run out of a folder with rounds.

    Raises:
        ConfigError: there are some, and ``resume`` was not given.
    """
    path = Path(config.output_dir)
    if config.resume is None and checkpoint.has_rounds(path):
        raise ConfigError(
            f"{path} already holds rounds: continue them with resume={path}, or choose another output_dir"
        )


def _compare(saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuse a continuation that would be another run; a moved folder is no difference."""
    found = differences(saved, now, FREE)
    if found:
        raise ConfigError(
            f"resume={folder}: this would be another run: {'; '.join(found)}. Drop the overrides that "
            "differ, or start anew in another output_dir; where none differs, the run was made by another "
            "version of sparsecontrast, which alone can continue it"
        )
