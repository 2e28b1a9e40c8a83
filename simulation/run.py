"""``python -m simulation``: a whole federation on one machine, from the data to the report."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from simulation import labs
from simulation.fresh import clear
from sparsecontrast import overrides
from sparsecontrast.config import anchored, compose, shared_state_dir
from sparsecontrast.durable import write_bytes
from sparsecontrast.errors import ConfigError, EvaluationError, SparseContrastError
from sparsecontrast.federated import RunConfig
from sparsecontrast.runs import PARTITION, QUARANTINE
from sparsecontrast.settings import Config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 for an error that the user can mend."""
    options = _parser().parse_args(arguments)
    try:
        run(options.overrides, options.fresh, not options.no_evaluation)
    except SparseContrastError as error:
        print(f"error [{error.code}]: {' '.join(str(error).split())}", file=sys.stderr)
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
    from server.strategy import Aggregator

    config, words = resolve(words)
    images = isinstance(config, Config)
    prepare, evaluate = (_prepare, _evaluate) if images else (labs.prepare, labs.evaluate)
    Aggregator(config.federation)  # complain before anything is deleted or made
    if fresh:
        clear(config)
    folder = Path(config.output_dir)
    # the workers import torch while the data are made ready here
    with _grid(config) as (grid, show):
        words = prepare(config, words, folder)  # type: ignore[arg-type]  of the same kind
        if config.resume is not None:
            words = [*words, overrides.assign("resume", config.resume)]
        _serve(grid, show, words)
    if evaluation:
        evaluate(folder)
    return folder


def _prepare(config: Config, words: list[str], folder: Path) -> list[str]:
    """Write ``partition.csv``, fill the cache, and return the overrides that point to the partition.

    What an attempt without a round left behind is made anew: its configuration may have been another.
    """
    from server.folder import refuse_old_rounds
    from sparsecontrast.data.cache import load_dataset

    refuse_old_rounds(config)
    if config.resume is None or not (folder / PARTITION).exists():
        _cut(config, folder)
    if config.federation.partition != "by_site" or config.audit.canaries > 0:
        words = overrides.merge(words, [overrides.assign("data.index", folder / PARTITION)])
        config = compose(words)
    cache = anchored(config.data.cache_dir) if config.data.cache_dir else folder / "cache"
    load_dataset(config, cache, shared_state_dir(config))
    write_bytes(folder / QUARANTINE, (shared_state_dir(config) / QUARANTINE).read_bytes())
    return words


def _cut(config: Config, folder: Path) -> None:
    """Give every image its site, toss the coins of an audit, and tell who got what.

    Raises:
        ConfigError: fewer sites than ``federation.sites``, or an index that was cut in another way.
        PatientLeakError: a patient at two sites, who was not asked for.
    """
    from simulation.canaries import toss
    from simulation.partition import partition, partition_table
    from sparsecontrast.data.cache import load_rows
    from sparsecontrast.data.index import write_index, write_table

    frame, left_out = load_rows(config.data, shared_state_dir(config))
    frame = toss(partition(frame, config.federation, config.seed), config.audit.canaries, config.seed)
    wanted, found = config.federation.sites, sorted(set(frame["site"]))
    if len(found) < wanted:
        raise ConfigError(
            f"federation.sites={wanted}, but the data hold {len(found)} site(s): {', '.join(found)}; set "
            f"federation.sites={len(found)}, or cut them with federation.partition="
        )
    write_index(frame, folder / PARTITION)
    write_table(left_out, folder / QUARANTINE)  # a data.index looks for it beside itself
    print(partition_table(frame).to_string(index=False), flush=True)
    if len(found) > wanted:
        print(f"federation.sites={wanted}: not used: {', '.join(found[wanted:])}", flush=True)


def _grid(config: RunConfig) -> Any:
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
    """Score the run, print the results and write the report.

    Data without labels cannot be scored; that is said, and the report is written all the same.
    """
    from sparsecontrast.evaluation import evaluate_run
    from sparsecontrast.findings import print_results
    from sparsecontrast.report import write_report

    try:
        print_results(evaluate_run(folder))
    except EvaluationError as error:
        print(f"not scored [{error.code}]: {error}", file=sys.stderr)
    print(f"report: {write_report(folder)}")


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
