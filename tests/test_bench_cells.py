import json

import pytest
import torch

from benchmarks import cells as bench
from benchmarks import cells_arms
from sparsecontrast.classify.settings import compose_classify
from sparsecontrast.methods.sparse_attn_net import Labelled
from tests.cell_files import write_cells


def arm(name: str):
    return cells_arms.build_arm(name, compose_classify(), 4, torch.ones(4))


def test_the_bars_that_need_no_training():
    """At most 15 % of the pixels, a fifth of the CNN's parameters, fewer operations, coarse map and all."""
    ours, cnn = (cells_arms.facts(arm(name), 64) for name in ("sparse_attn_net", "small_cnn"))
    assert ours["pixels_read"] <= 0.15 and cnn["pixels_read"] == 1.0
    assert ours["parameters"] <= cnn["parameters"] / 5
    assert ours["mflops"] < cnn["mflops"]


def test_the_choices_compared_at_equal_k_all_read_15_percent_and_keep_to_it():
    names = ("sparse_attn_net_15", "random", "threshold")
    nets = [arm(name) for name in names]
    assert [net.config.selection for net in nets] == ["learned", "random", "threshold"]
    assert all(net.floor == net.ceiling == 38 for net in nets) and arm("sparse_attn_net").floor == 30


def test_operations_are_counted_by_hand_too():
    """Twice the multiply-adds of every product, with CLS alone in the last block; coarse map first."""
    net = arm("sparse_attn_net")
    k, d, c, size = net.k + 1, 48, 8, 3 * 16 + 16
    coarse = 256 * (48 * c + 9 * c * c + 9 * c)
    block = k * (3 * d * d + d * d + 4 * d * d) + 2 * k * k * d
    asked_anyway = k * d  # CLS's attention, on its own
    last = k * 2 * d * d + (d * d + d * d + 4 * d * d) + 2 * k * d
    total = coarse + (k - 1) * size * d + block + asked_anyway + last + 4 * d
    assert cells_arms.facts(net, 64)["mflops"] == pytest.approx(2 * total / 1e6, abs=1e-3)


def test_the_cnn_is_counted_as_its_layers_are():
    found = cells_arms.facts(arm("small_cnn"), 64)
    products = [(32, 3, 32), (16, 32, 64), (8, 64, 128), (4, 128, 256)]
    total = sum(side**2 * 9 * i * o for side, i, o in products) + 256 * 4
    assert found["mflops"] == pytest.approx(2 * total / 1e6, abs=1e-3)


@pytest.mark.parametrize("name", ["small_cnn", "sparse_attn_net"])
def test_every_arm_answers_and_learns_from_every_parameter(name):
    net = arm(name).train()
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    losses = net(Labelled(images, torch.arange(4), torch.Generator().manual_seed(0)))
    assert losses.shape == (4,)
    losses.mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net.eval().logits(images).shape == (4, 4)


def test_a_second_call_trains_nothing_again_unless_something_changed(tmp_path, monkeypatch, capsys):
    root, trained = write_cells(tmp_path / "cells"), []

    def fake(config, cells, name):
        trained.append(name)
        score = 0.5 + 0.1 * config.seed + 0.05 * (name == "small_cnn")
        return {"macro_f1": score, "accuracy": score, "epoch": 1, "seconds": 1.0, "ks": [],
                "parameters": 10, "mflops": 1.0, "pixels_read": 1.0, "images": 3}  # fmt: skip

    monkeypatch.setattr(bench, "train_once", fake)
    monkeypatch.setattr(bench, "latency", lambda args, cells: {})
    words = [
        "--quick",
        "--root",
        str(root),
        "--out",
        str(tmp_path / "out"),
        "--json",
        str(tmp_path / "c.json"),
    ]
    words += ["--arms", "random", "small_cnn"]
    monkeypatch.setattr(bench, "QUICK", (*bench.QUICK, "cells.min_images=8"))
    bench.main(words)
    assert trained == ["random", "small_cnn"] * 2
    bench.main(words)
    assert len(trained) == 4
    monkeypatch.setattr(bench, "QUICK", (*bench.QUICK, "train.epochs=3"))
    bench.main(words)
    assert len(trained) == 8
    rows = {row["arm"]: row for row in json.loads((tmp_path / "c.json").read_text())["rows"]}
    assert rows["random"]["macro_f1"] == pytest.approx(0.55)
    assert (rows["random"]["delta"], rows["random"]["delta_high"]) == pytest.approx((-0.05, -0.05))
    assert "delta" not in rows["small_cnn"] and rows["small_cnn"]["each_seed"] == "0.550 0.650"
    assert str(tmp_path) not in (tmp_path / "c.json").read_text()
    told = json.loads((tmp_path / "c.json").read_text())["command"]
    assert told == "python -m benchmarks.cells --quick --arms random small_cnn"
