"""``python -m simulation.sweep``: every run of a grid, one process each, and what they say together.

    python -m simulation.sweep experiment=privacy_sweep [OVERRIDES] [--workers N] [--dry-run] [--table]

Overrides may be sweeps in Hydra's grammar (``seed=0,1,2``), or choose among the points of the experiment's
own grid (``epsilon=8,inf``); ``sparsecontrast/sweeps.py`` says how. Stop it in any way at any time and give
the command again: what is done is not done again, what was interrupted goes on. One run that fails does not
stop the others. In the end ``table.md``, ``sweep.json`` and ``sweep.png`` lie in the sweep's folder.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from simulation.cell import LOG, is_done, work
from sparsecontrast.config import anchored
from sparsecontrast.errors import SparseContrastError
from sparsecontrast.processes import one_thread
from sparsecontrast.sweeps import Job, Plan, plan


@dataclass(frozen=True)
class Active:
    """A run at work."""

    job: Job
    process: Any
    started: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 1 where a run failed, 2 for an error to mend."""
    options = _parser().parse_args(arguments)
    try:
        found = plan(options.overrides)
        if options.dry_run:
            _tell(found)
            return 0
        failed = [] if options.table else run_all(found, options.workers)
        _write_table(found, options.overrides)
    except SparseContrastError as error:
        print(f"error [{error.code}]: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; give the same command to go on", file=sys.stderr)
        return 130
    for job in failed:
        print(f"failed: {job.name}: {_last_line(job)}", file=sys.stderr)
    return 1 if failed else 0


def run_all(found: Plan, workers: int) -> list[Job]:
    """Do all runs of a sweep that are not done yet; returns those that failed.

    Runs whose start is to be made by a run of ``before`` that failed will fail too, and say why.

    Raises:
        ConfigError: a run is impossible as told, or its folder holds another one; nothing was started.
    """
    phases = [[job for job in jobs if not is_done(job)] for jobs in (found.before, found.cells)]
    total = len(found.before) + len(found.cells)
    print(f"{total} runs, {total - sum(map(len, phases))} of them done: {found.folder}", flush=True)
    return [job for jobs in phases for job in _run_phase(jobs, workers)]


def _run_phase(jobs: Sequence[Job], workers: int) -> list[Job]:
    queue, active, failed, done = deque(jobs), dict[int, Active](), list[Job](), 0
    try:
        while queue or active:
            while queue and len(active) < workers:
                one = _start(queue.popleft())
                active[one.process.sentinel] = one
            for sentinel in wait(list(active)):
                one = active.pop(sentinel)  # type: ignore[arg-type]
                one.process.join()
                # a run without labels ends well, and has no scores
                good = one.process.exitcode == 0 and is_done(one.job)
                done += 1
                failed += [] if good else [one.job]
                word = "done" if good else "FAILED"
                seconds = time.monotonic() - one.started
                print(f"[{done}/{len(jobs)}] {word} {one.job.name}  {seconds:.0f} s", flush=True)
    finally:
        for one in active.values():
            one.process.terminate()
            one.process.join()
    return failed


def _start(job: Job) -> Active:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=work, args=(job,), name=job.name)
    with one_thread():
        process.start()
    return Active(job, process, time.monotonic())


def _tell(found: Plan) -> None:
    for job in (*found.before, *found.cells):
        begun = "begun" if (anchored(job.folder) / LOG).exists() else "new"
        print(f"{'done' if is_done(job) else begun:5s}  {job.name}\n       {' '.join(job.words)}")


def _last_line(job: Job) -> str:
    path = anchored(job.folder) / LOG
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return f"{lines[-1] if lines else 'it said nothing'} ({path})"


def _write_table(found: Plan, words: Sequence[str]) -> None:
    from simulation.sweep_plot import write_plot
    from simulation.sweep_table import rows_of, write_table

    done = [job for job in found.cells if is_done(job)]
    folder = anchored(found.folder)
    rows = rows_of(done, len(found.cells))
    print(write_table(rows, folder, f"python -m simulation.sweep {' '.join(words)}"))
    picture = write_plot(rows, folder)
    print(f"table: {folder / 'table.md'}" + (f"  plot: {picture}" if picture else ""))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m simulation.sweep", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE[,VALUE]", help="Hydra overrides, or sweeps"
    )
    parser.add_argument("--workers", type=int, default=cores, help="runs at a time, one thread each")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and how far they are")
    parser.add_argument("--table", action="store_true", help="write the table of what is done, run nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
