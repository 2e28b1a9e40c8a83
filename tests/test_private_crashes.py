"""Kill -9 of a private run at every point of a round: it never released more than it was charged for."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sparsecontrast import checkpoint
from sparsecontrast.config import compose
from sparsecontrast.ledger import Ledger
from sparsecontrast.overrides import assign, without
from sparsecontrast.pretrain import pretrain
from tests.test_private_training import WORDS

ROOT = Path(__file__).parents[1]
ROUNDS = 3
# where the process dies in its second round: (charges, whole rounds) on the disk then
POINTS = {
    "before reserve": (1, 1),
    "after reserve": (2, 1),
    "first draw": (2, 1),
    "first noise": (2, 1),
    "second step": (2, 1),
    "state half written": (2, 1),
    "round half written": (2, 1),
    "round written": (2, 2),
}
CHILD = """
import os, signal, sys

from sparsecontrast import account, checkpoint, cli, noise, privacy, sampling

point, words = sys.argv[1], sys.argv[2:]
STEPS = 3


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def wrap(owner, name, before=None, after=None):
    whole, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(args)
        if before and before(len(calls), args):
            die()
        answer = whole(*args, **kwargs)
        if after and after(len(calls), args):
            die()
        return answer

    setattr(owner, name, wrapped)


def onto(name):
    return lambda n, args: str(args[1]).endswith(name)


{
    "before reserve": lambda: wrap(account.Account, "reserve", before=lambda n, a: n == 2),
    "after reserve": lambda: wrap(account.Account, "reserve", after=lambda n, a: n == 2),
    "first draw": lambda: wrap(sampling.PatientSampler, "draw", before=lambda n, a: n == STEPS + 1),
    "first noise": lambda: wrap(noise.SecureStream, "gaussians", before=lambda n, a: n == STEPS + 1),
    "second step": lambda: wrap(privacy.PatientSGD, "step", before=lambda n, a: n == STEPS + 2),
    "state half written": lambda: wrap(os, "replace", before=onto("state/round_0002.safetensors")),
    "round half written": lambda: wrap(os, "replace", before=onto("rounds/round_0002.safetensors")),
    "round written": lambda: wrap(checkpoint, "write_round", after=lambda n, a: n == 3),  # 0, 1, 2
}[point]()
sys.exit(cli.main(["pretrain", *words]))
"""


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_was_charged_for_all_that_it_released(tmp_path, point):
    words = [
        *without(list(WORDS), ["privacy.planned_rounds"]), "privacy.planned_rounds=6",
        "data=phantom", "data.phantom.sites=1", "data.phantom.patients_per_site=16", "data.min_images=2",
        f"federation.rounds={ROUNDS}", assign("output_dir", tmp_path / "run"),
        assign("site.state_dir", tmp_path / "site"),
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", CHILD, point, *words], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    ledger = Ledger(tmp_path / "site")
    charged, whole = POINTS[point]
    assert len(ledger.read().entries) == charged and checkpoint.latest(tmp_path / "run") == whole
    pretrain(compose([assign("resume", tmp_path / "run")]), show=False)
    entries = ledger.read().entries
    assert checkpoint.latest(tmp_path / "run") == ROUNDS
    assert len(entries) == charged + ROUNDS - whole  # what was lost stays charged, and is paid again
    assert [(e.round, e.attempt) for e in entries].count((2, 2)) == (charged > whole)
    assert len({e.charge for e in entries}) == 1 and entries[-1].epsilon <= 8
    ledger.verify()
