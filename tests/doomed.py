"""``python -m tests.doomed POINT KEY=VALUE ...``: labs that train, until ``kill -9`` at a point.

The worker processes import the main module too, this one, so a point may lie in a lab's training: the worker
takes its server with it, as a power cut does.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from sparsecontrast import checkpoint
from sparsecontrast.classify import run as runs
from sparsecontrast.part_round import PartRound

STEPS = 1  # that the lab takes in the round in which it dies


def die() -> None:
    """End this process and, in a worker, the server before it."""
    server = multiprocessing.parent_process()
    if server is not None:
        os.kill(server.pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def after_round_one() -> None:
    """Its checkpoint is whole, and nobody was asked for the second."""
    whole = checkpoint.write_round

    def write_round(folder: Any, number: int, *args: Any, **kwargs: Any) -> Any:
        found = whole(folder, number, *args, **kwargs)
        if number == 1:
            die()
        return found

    checkpoint.write_round = write_round


def in_training() -> None:
    """In the second round of the second lab; every step keeps its part of the round."""
    whole = PartRound.keep

    def keep(self: PartRound, told: Any, *args: Any) -> None:
        self.every = 0.0
        whole(self, told, *args)
        second = (self.path.parent / "round_0001.safetensors").exists()
        if second and "yellow" in self.path.parts and len(told["loss"]) == STEPS:
            die()

    PartRound.keep = keep


def in_evaluation() -> None:
    """The global classifier is judged, and of the two that were trained alone the first."""
    whole, calls = runs.judge, []

    def judge(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            die()
        return whole(*args, **kwargs)

    runs.judge = judge


def in_a_lab_alone() -> None:
    """The second lab's own model is on the disk under a name that nobody reads."""
    whole = os.replace

    def replace(source: Any, target: Any, *args: Any, **kwargs: Any) -> None:
        if str(target).endswith("local_only/yellow.safetensors"):
            die()
        whole(source, target, *args, **kwargs)

    os.replace = replace


POINTS: dict[str, Callable[[], None]] = {
    "after round one": after_round_one,
    "in training": in_training,
    "in a lab alone": in_a_lab_alone,
    "in evaluation": in_evaluation,
}
if __name__ in ("__main__", "__mp_main__"):  # the server's process, and a worker's
    POINTS[sys.argv[1]]()
if __name__ == "__main__":
    from simulation import run

    sys.exit(run.main(sys.argv[2:]))
