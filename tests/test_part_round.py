"""A local round that was killed goes on behind the last step that was kept, and ends with the same bits."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsecontrast.config import compose
from sparsecontrast.errors import StorageError
from sparsecontrast.methods import build_method
from sparsecontrast.part_round import PartRound
from sparsecontrast.trainer import LocalTrainer
from tests.test_private_training import films, private
from tests.test_trainer import SELECTIONS, TINY, assert_same, images, weights

WORDS = ("train.local_epochs=3",)  # six steps of eight
CHILD = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.test_part_round import PartRound, counted, go

t = counted(sys.argv[2], die_at=int(sys.argv[3]), die=lambda: os.kill(os.getpid(), signal.SIGKILL))
go(t, PartRound(Path(sys.argv[1]), every=0))
"""


class StoppedError(Exception):
    """The test's own."""


def stop():
    raise StoppedError


class Counting(LocalTrainer):
    """Counts the steps it takes, and dies before number ``die_at`` of them."""

    taken = 0
    die_at: int | None = None
    die = staticmethod(stop)

    def _step(self, *args):  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.taken == self.die_at:
            self.die()
        self.taken += 1
        return super()._step(*args)


def counted(selection="surprise", *words, die_at=None, die=stop):
    config = compose([*TINY, *WORDS, f"selection={selection}", *words])
    t = Counting(build_method(config), config, "a")
    t.die_at, t.die = die_at, die
    return t


def go(t, part=None, number=1, mu=0.1, data=None):
    data = images() if data is None else data
    return t.run(data, np.arange(len(data)), number, 4, mu, part)


def same(one, other, told, again):
    assert_same(weights(one), weights(other))
    for key in (*told.metrics, "loss"):
        assert told.metrics[key] == again.metrics[key], key
    assert (told.steps, told.images, told.examples) == (again.steps, again.images, again.examples)
    assert_same(one.local.tensors(), other.local.tensors())


@SELECTIONS
@pytest.mark.parametrize("steps", [1, 4, 5])
def test_a_stopped_round_goes_on_with_the_same_bits(tmp_path, selection, steps):
    whole, first, second = counted(selection), counted(selection, die_at=steps), counted(selection)
    told = go(whole)
    path = tmp_path / "part.safetensors"
    with pytest.raises(StoppedError):
        go(first, PartRound(path, every=0))
    again = go(second, PartRound(path, every=0))
    assert (whole.taken, second.taken) == (6, 6 - steps)
    same(whole, second, told, again)


def test_a_killed_process_loses_the_step_at_work_alone(tmp_path):
    path = tmp_path / "part.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), "surprise", "3"], cwd=Path(__file__).parents[1], check=False
    )
    assert done.returncode == -signal.SIGKILL
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the child: part of what a seed reproduces
    try:
        whole, second = counted(), counted()
        told, again = go(whole), go(second, PartRound(path, every=0))
    finally:
        torch.set_num_threads(threads)
    assert second.taken == 3
    same(whole, second, told, again)


def begun(path, words="from 0"):
    with pytest.raises(StoppedError):
        go(counted(die_at=2), PartRound(path, words, every=0))


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ((), {"number": 2}),
        ((), {"mu": 0.2}),
        ((), {"data": images(17)}),
        (("train.lr=1e-4",), {}),
        (("method.keep=0.4",), {}),
        (("seed=1",), {}),
    ],
)
def test_another_round_does_not_go_on_from_it(tmp_path, change, options):
    path = tmp_path / "part.safetensors"
    begun(path)
    t, whole = counted("surprise", *change), counted("surprise", *change)
    again, told = go(t, PartRound(path, "from 0", every=1e9), **options), go(whole, **options)
    assert t.taken == told.steps
    same(whole, t, told, again)


def test_nor_one_of_other_weights_or_another_local_state(tmp_path):
    path = tmp_path / "part.safetensors"
    begun(path)
    t = counted()
    with torch.no_grad():
        dict(t.module.named_parameters())["backbone.vit.cls_token"].add_(1e-6)
    go(t, PartRound(path, "from 0", every=1e9))
    assert t.taken == 6
    t = counted()
    go(t, PartRound(path, "from 1", every=1e9))
    assert t.taken == 6


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"{}" + b[2:]])
def test_a_torn_file_is_said_and_the_round_starts_anew(tmp_path, damage):
    path = tmp_path / "part.safetensors"
    begun(path)
    path.write_bytes(damage(path.read_bytes()))
    said, t, whole = [], counted(), counted()
    again, told = go(t, PartRound(path, "from 0", 1e9, said.append)), go(whole)
    assert t.taken == 6 and "starts anew" in said[0]
    same(whole, t, told, again)


def test_a_full_disk_costs_the_file_and_not_the_round(tmp_path, monkeypatch):
    def full(*_):
        raise StorageError("cannot write: No space left on device")

    monkeypatch.setattr("sparsecontrast.part_round.write_tensors", full)
    said, t, whole = [], counted(), counted()
    again, told = go(t, PartRound(tmp_path / "part.safetensors", "", 0, said.append)), go(whole)
    assert "No space left" in said[0]
    same(whole, t, told, again)


def test_nothing_is_written_before_its_time_and_nothing_of_a_private_round(tmp_path):
    path = tmp_path / "part.safetensors"
    go(counted(), PartRound(path, every=1e9))
    private(tmp_path).run(*films(), 1, 2, 0.0, PartRound(path, every=0))
    assert not path.exists()
