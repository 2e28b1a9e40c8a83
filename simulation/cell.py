"""One run of a sweep in a process of its own: begun, continued or left alone, whatever happened before.

A run is done when its scores and its report are there and nothing that it was told has changed. One that was
killed goes on with ``resume=``. A private one begins anew instead: its ledger charged the round that was
under way, gives nothing back, and would refuse the last round. That ledger goes with the run: it speaks of
simulated sites, whose patients were promised nothing. A lock in the folder keeps a second process out.
"""

import contextlib
import fcntl
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

from sparsecontrast import checkpoint
from sparsecontrast.config import anchored, as_dict, compose
from sparsecontrast.differences import differences
from sparsecontrast.errors import ConfigError
from sparsecontrast.overrides import assign
from sparsecontrast.processes import follow_parent
from sparsecontrast.resume import FREE
from sparsecontrast.runs import CONFIG, read_evaluation, read_saved
from sparsecontrast.settings import Config
from sparsecontrast.sweeps import Job

LOG = "sweep.log"
LOCK = "sweep.lock"
REPORT = "report.html"
SCORED = ("evaluation", "audit.views", "audit.delta")  # may change: then a run is scored again


def is_done(job: Job) -> bool:
    """Whether a run has all that it was asked for.

    Raises:
        ConfigError: the folder holds another run, or a word of the job is impossible.
    """
    config = compose(job.words)
    folder = anchored(config.output_dir)
    if not (folder / CONFIG).is_file():
        return False
    saved, now = read_saved(folder), as_dict(config)
    # the simulation adds the index of the sites that it cut
    cut = ("data.index",) if config.data.index is None else ()
    if found := differences(saved, now, (*FREE, *cut)):
        raise ConfigError(
            f"{folder}: holds another run: {'; '.join(found)}. Choose another output_dir, or delete it"
        )
    if checkpoint.latest(folder) != config.federation.rounds:
        return False
    return job.pretraining or _is_scored(folder, config, not differences(saved, now, _but_scores(cut)))


def work(job: Job) -> None:
    """Do a run, in a process that was started for it; ends the process with its exit status."""
    follow_parent()
    folder = anchored(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOG, "ab") as log, _alone(folder):
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        if is_done(job):
            sys.exit(0)
        status = _run(job, folder)
        if status == 0 and is_done(job):
            used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
            print(f"{sum(one.ru_utime + one.ru_stime for one in used):.0f} s of CPU time", flush=True)
        sys.exit(status)


def _run(job: Job, folder: Path) -> int:
    from simulation import run
    from sparsecontrast import cli

    words, fresh = _continued(job, folder)
    if job.pretraining:
        return cli.main(["pretrain", *words])
    return run.main([*words, *(["--fresh"] if fresh else [])])


def _continued(job: Job, folder: Path) -> tuple[list[str], bool]:
    """Return the words to run with, and whether to delete what an earlier attempt left."""
    config, found = compose(job.words), checkpoint.latest(folder)
    private = config.privacy.name != "none"
    if found is not None and (found >= config.federation.rounds or not private):
        return [*job.words, assign("resume", folder)], False
    return list(job.words), checkpoint.has_rounds(folder)


def _is_scored(folder: Path, config: Config, unchanged: bool) -> bool:
    evaluation = read_evaluation(folder)
    return (
        unchanged
        and evaluation is not None
        and evaluation["round"] == config.federation.rounds
        and (folder / REPORT).is_file()
    )


def _but_scores(cut: tuple[str, ...]) -> tuple[str, ...]:
    return (*(key for key in FREE if key not in SCORED), *cut)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system releases that of a killed process."""
    with open(folder / LOCK, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
