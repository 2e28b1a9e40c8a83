"""Kill -9 of a federation of labs, server and worker together: continued, it ends with the same bytes."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from simulation import labs
from simulation import run as simulation
from sparsecontrast import checkpoint
from sparsecontrast.classify.lab import LabTrainer
from sparsecontrast.egress import EgressLog
from tests.doomed import STEPS
from tests.federations import partitions, rows, serve
from tests.labs import told, weights

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("impatient")


def killed(point, pictures, out):
    """Simulate in a process of its own until it is dead at ``point``."""
    words = told(pictures, out, "federation.workers=1")
    done = subprocess.run(
        [sys.executable, "-m", "tests.doomed", point, *words], cwd=ROOT, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    return out


def released(out, lab):
    """Rounds that a lab answered, and the digest of what it gave away in each."""
    trained = [row.content for row in EgressLog(out / "sites" / lab).rows() if row.kind == "train"]
    return [(one["round"], one["sha256"]) for one in trained]


def parts(out):
    return sorted(path.parts[-4] for path in out.glob("sites/*/state/*/part.safetensors"))


def test_killed_after_the_first_checkpoint(two_labs, pictures, tmp_path):
    whole, out = two_labs[0], killed("after round one", pictures, tmp_path / "run")
    assert checkpoint.latest(out) == 1
    serve(partitions(2), [f"resume={out}"])
    assert weights(out) == weights(whole)
    for lab in ("grey", "yellow"):
        assert released(out, lab) == released(whole, lab) and len(released(out, lab)) == 2


def test_killed_in_the_middle_of_a_labs_training(two_labs, pictures, tmp_path, monkeypatch):
    """The lab goes on behind the step that it has taken; the other one answers again, with the same bytes."""
    whole, out = two_labs[0], killed("in training", pictures, tmp_path / "run")
    assert checkpoint.latest(out) == 1 and parts(out) == ["yellow"]
    before = released(out, "grey")
    assert [number for number, _ in before] == [1, 2] and len(released(out, "yellow")) == 1
    steps, step = [], LabTrainer._step
    monkeypatch.setattr(LabTrainer, "_step", lambda self, *a: steps.append(self.lab) or step(self, *a))
    serve(partitions(2), [f"resume={out}"])
    assert weights(out) == weights(whole) and not parts(out)
    (last,) = (row["steps"] for row in rows(out) if row["site"] == "yellow" and row["round"] == 2)
    assert steps.count("yellow") == last - STEPS > 0
    assert released(out, "grey") == [*before, before[-1]] == [*released(whole, "grey"), before[-1]]
    assert released(out, "yellow") == released(whole, "yellow")


@pytest.fixture(scope="module")
def judged(two_labs, tmp_path_factory):
    """The run that nobody disturbed, judged."""
    folder = Path(shutil.copytree(two_labs[0], tmp_path_factory.mktemp("judged") / "run"))
    labs.evaluate(folder)
    return folder


@pytest.mark.parametrize("point", ["in a lab alone", "in evaluation"])
def test_killed_in_the_last_evaluation(judged, pictures, tmp_path, point):
    out = killed(point, pictures, tmp_path / "run")
    assert weights(out) == weights(judged) and not (out / "evaluation.json").exists()
    assert (out / "local_only" / "yellow.safetensors").exists() == (point == "in evaluation")
    simulation.run([f"resume={out}"])
    for name in ("rounds/round_0002.safetensors", "local_only/grey.safetensors",
                 "local_only/yellow.safetensors", "evaluation.json"):  # fmt: skip
        assert (out / name).read_bytes() == (judged / name).read_bytes(), name
    assert (out / "report.html").exists()
