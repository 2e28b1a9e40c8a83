"""``python -m simulation``: a whole federation on one machine, from the data to the report."""

import argparse
import importlib
import importlib.util
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparsecontrast import overrides
from sparsecontrast.config import Config, anchored, compose
from sparsecontrast.errors import ConfigError, SparseContrastError

RUN_FILES = (
    "config.yaml", "metrics.jsonl", "partition.csv", "partition.png", "partition.json", "quarantine.csv",
    "evaluation.json", "report.html", "rounds", "sites", "tensorboard",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for an error that the user can mend."""
    options = _parser().parse_args(arguments)
    try:
        run(options.overrides, options.fresh, not options.no_evaluation)
    except SparseContrastError as error:
        print(f"error [{error.code}]: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; continue with resume=<the run folder>", file=sys.stderr)
        return 130
    return 0


def run(words: Sequence[str], fresh: bool = False, evaluation: bool = True) -> Path:
    """Simulate a federation; returns the run folder.

    Args:
        words: Hydra overrides.
        fresh: delete an earlier run in ``output_dir`` first; its cache is kept.
        evaluation: score the backbone and write the report at the end.

    Raises:
        SparseContrastError: whatever kept the run from its end.
    """
    from server.folder import resolve

    if fresh:
        clear(compose(list(words)))
    config, words = resolve(words)
    folder = Path(config.output_dir)
    # the workers import torch while the data are made ready here
    with _grid(config) as (grid, show):
        words = _prepare(config, words, folder)
        if config.resume is not None:
            words = [*words, overrides.assign("resume", config.resume)]
        _serve(grid, show, words)
    if evaluation:
        _evaluate(folder)
    return folder


def clear(config: Config) -> None:
    """Delete the run in ``output_dir``.

    Raises:
        ConfigError: the folder holds something, and it is no run folder.
    """
    folder = anchored(config.output_dir)
    if config.resume is not None:
        raise ConfigError("--fresh deletes what resume= would continue; give one of them")
    if not folder.exists():
        return
    if any(folder.iterdir()) and not ((folder / "config.yaml").exists() or (folder / "cache").exists()):
        raise ConfigError(f"--fresh: {folder} is not a run folder, nothing was deleted")
    for name in RUN_FILES:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _prepare(config: Config, words: list[str], folder: Path) -> list[str]:
    """Write ``partition.csv``, fill the cache, and return the overrides that point to the partition."""
    from server.folder import refuse_old_rounds
    from sparsecontrast.data.cache import load_dataset, load_rows
    from sparsecontrast.data.index import write_index

    refuse_old_rounds(config)
    cache = anchored(config.data.cache_dir) if config.data.cache_dir else folder / "cache"
    state, table = folder / "state", folder / "partition.csv"
    if config.federation.partition != "by_site" and config.data.index is None:
        partition = importlib.import_module("simulation.partition").partition
        frame, _ = load_rows(config.data, state)
        write_index(partition(frame, config.federation, config.seed), table)
        words = overrides.merge(words, [overrides.assign("data.index", table)])
        config = compose(words)
    elif not table.exists():
        write_index(load_rows(config.data, state)[0], table)
    dataset = load_dataset(config, cache, state)
    quarantine = state / "quarantine.csv"
    if quarantine.exists():
        shutil.copyfile(quarantine, folder / "quarantine.csv")
    sites = dataset.frame["site"].nunique()
    print(f"{len(dataset)} images, {sites} sites, {len(dataset.quarantine)} quarantined", flush=True)
    return words


def _grid(config: Config) -> Any:
    from simulation.display import shown_grid

    n = config.federation.sites
    nodes: list[dict[str, Any]] = [{"partition-id": i, "num-partitions": n} for i in range(n)]
    return shown_grid(nodes, config.federation.workers, config.federation.rounds)


def _serve(grid: Any, show: Callable[[], Any], words: list[str]) -> None:
    """Run the ServerApp, the same object as under ``flwr run``, on the local grid."""
    from flwr.app import Context, RecordDict

    from server.app import app
    from simulation.grid import SERVER_NODE

    context = Context(grid.run.run_id, SERVER_NODE, {}, RecordDict(), {"overrides": overrides.join(words)})
    with show():
        app(grid, context)


def _evaluate(folder: Path) -> None:
    """Score the run and write its report, as far as those parts are installed."""
    for module, function in (
        ("sparsecontrast.evaluation", "evaluate_run"),
        ("sparsecontrast.report", "write_report"),
    ):
        if importlib.util.find_spec(module) is None:
            print(f"{module} is not there: skipped")
            return
        result = getattr(importlib.import_module(module), function)(folder)
        if isinstance(result, Path):
            print(f"report: {result}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m simulation",
        description="Simulate a federation of hospitals on this machine.",
        epilog="Example: python -m simulation experiment=laptop federation.rounds=5 output_dir=outputs/try",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides of configs/")
    parser.add_argument("--fresh", action="store_true", help="delete an earlier run in output_dir first")
    parser.add_argument("--no-evaluation", action="store_true", help="stop after the last round")
    return parser
