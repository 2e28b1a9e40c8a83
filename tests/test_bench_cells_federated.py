import json

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import cells_federated as bench
from sparsecontrast import checkpoint
from sparsecontrast.classify.cells import Cells, load_cells, split_cells
from sparsecontrast.classify.lab import LabTrainer
from sparsecontrast.federated import compose_run
from tests.federations import partitions, serve
from tests.labs import MODEL

TINY = (*MODEL[1:], "federation.workers=1")
pytestmark = pytest.mark.usefixtures("impatient")


@pytest.fixture
def in_this_process(monkeypatch):
    """Simulate without worker processes: the same bytes, as test_federated_cells.py proves."""
    runs = []

    def simulate(words):
        runs.append(words)
        serve(partitions(2), words)

    monkeypatch.setattr(bench, "simulate", simulate)
    monkeypatch.setattr(bench, "QUICK", TINY)
    return runs


def told(pictures, tmp_path, *more):
    return ["--quick", "--root", str(pictures), "--out", str(tmp_path / "out"), *more]


def test_every_arm_is_of_the_networks_that_its_name_says(pictures, tmp_path, in_this_process):
    words = bench.words(bench._arguments(told(pictures, tmp_path)), 0)
    networks = bench.federated_and_alone(words, tmp_path / "run")
    files = {
        ("federated", "grey"): checkpoint.round_file(tmp_path / "run", 2),
        ("federated", "yellow"): checkpoint.round_file(tmp_path / "run", 2),
        **{
            ("own", lab): tmp_path / "run" / "local_only" / f"{lab}.safetensors" for lab in ("grey", "yellow")
        },
    }
    files |= {("other", "grey"): files["own", "yellow"], ("other", "yellow"): files["own", "grey"]}
    for (arm, lab), file in files.items():
        read, found = checkpoint.read_tensors(file), networks[arm][lab].state_dict()
        assert read.keys() == found.keys() and all(torch.equal(read[n], found[n]) for n in read), (arm, lab)
    assert {arm: set(of) for arm, of in networks.items()} == dict.fromkeys(networks, {"grey", "yellow"})
    bench.federated_and_alone(words, tmp_path / "run")
    assert [any(w.startswith("resume=") for w in told) for told in in_this_process] == [False, True]


def test_pooling_trains_on_what_all_labs_train_on_as_often(pictures, tmp_path, monkeypatch):
    config = compose_run(["experiment=cells", f"cells.root={pictures}", *TINY])
    cells = load_cells(config.cells, 32, config.classes)
    seen, whole = [], LabTrainer.run

    def run(self, images, labels, number, rounds, *args):
        seen.append((number, rounds, images, labels))
        return whole(self, images, labels, number, rounds, *args)

    monkeypatch.setattr(LabTrainer, "run", run)
    bench.pooled(config, cells)
    split = split_cells(cells, config.cells, config.seed)
    trained = torch.cat([split.train, split.val]).sort().values
    assert [(number, rounds) for number, rounds, *_ in seen] == [(1, 2), (2, 2)]
    for _, _, images, labels in seen:
        assert torch.equal(images, cells.images[trained]) and torch.equal(labels, cells.labels[trained])


class Says:
    """Names every picture by one class."""

    def __init__(self, code):
        self.code = code

    def logits(self, images):
        return torch.nn.functional.one_hot(torch.full((len(images),), self.code), 2).float()


def test_each_labs_cells_are_judged_by_the_network_of_that_lab():
    """All of a are of class 0, all of b of class 1; one row of each is not asked for."""
    labs, labels = np.array(["a"] * 3 + ["b"] * 4), torch.tensor([0] * 3 + [1] * 4)
    cells = Cells(torch.zeros(7, 3, 8, 8, dtype=torch.uint8), labels, ("x", "y"), labs, labs, pd.DataFrame())
    right, wrong, half = {"a": Says(0), "b": Says(1)}, {"a": Says(1), "b": Says(0)}, Says(0)
    networks = {"own": right, "other": wrong, "federated": dict.fromkeys("ab", half), "pooled": right}
    found = bench.judge(networks, cells, torch.tensor([0, 1, 3, 4, 5]))
    assert found["own"] == {"a": 1.0, "b": 1.0, "mean": 1.0, "all": 1.0}
    assert found["other"] == {"a": 0.0, "b": 0.0, "mean": 0.0, "all": 0.0}
    assert found["federated"] == pytest.approx({"a": 1.0, "b": 0.0, "mean": 0.5, "all": 2 / 7})


def test_differences_are_paired_by_seed_and_have_intervals():
    def one(ours, pooled):
        return {"federated": {"mean": ours}, **{arm: {"mean": pooled} for arm in ("pooled", "own", "other")}}

    rows = bench.summarise({0: one(0.9, 0.8), 1: one(0.5, 0.2), 2: one(0.7, 0.5)})
    found = {row["arm"]: row for row in rows}
    assert found["federated"]["macro_f1"] == pytest.approx(0.7) and "minus" not in found["federated"]
    # 0.1, 0.3, 0.2: t of 2 degrees of freedom, 4.303, times 0.1 over the root of 3
    half = 4.303 * 0.1 / 3**0.5
    told = [found["pooled"][key] for key in ("minus", "minus_low", "minus_high")]
    assert told == pytest.approx([0.2, 0.2 - half, 0.2 + half], abs=1e-4)
    assert found["pooled"]["each_seed"] == "0.800 0.200 0.500"


def test_a_second_call_trains_nothing_again_unless_something_changed(
    pictures, tmp_path, in_this_process, monkeypatch, capsys
):
    words = told(pictures, tmp_path, "--json", str(tmp_path / "found.json"))
    bench.main(words)
    first = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert len(in_this_process) == 2  # seeds
    assert {(r["arm"], r["cells"]) for r in first} == {
        (arm, cells) for arm in bench.ARMS for cells in ("grey", "yellow", "mean", "all")
    }
    bench.main(words)
    assert len(in_this_process) == 2
    assert json.loads((tmp_path / "found.json").read_text())["rows"] == first
    monkeypatch.setattr(bench, "QUICK", (*TINY, "train.lr=1e-3"))
    bench.main(words)
    assert len(in_this_process) == 4
    assert str(tmp_path) not in (tmp_path / "found.json").read_text()
