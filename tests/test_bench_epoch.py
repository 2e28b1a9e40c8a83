"""``benchmarks.epoch``: what it times is the trainer's own epoch."""

import json

import numpy as np
import torch

from benchmarks import epoch
from sparsecontrast.methods import build_method
from sparsecontrast.trainer import LocalTrainer


def test_an_epoch_on_prepared_views_is_the_trainers_own():
    config = epoch._config("sparse_contrast", 0.5, 64, "fp32", 32, True)
    images = np.random.default_rng(0).integers(0, 256, (32, 64, 64), dtype=np.uint8)
    results = []
    for kind in (LocalTrainer, epoch.Prepared):
        torch.manual_seed(0)
        trainer = kind(build_method(config), config, "phantom")
        results.append(trainer.run(images, np.arange(32), 10, 20))
    assert results[0].metrics == results[1].metrics and results[0].steps == 2
    assert results[0].metrics["keep"] == 0.5


def test_views_are_made_once(monkeypatch):
    config = epoch._config("dense_contrast", 1.0, 64, "fp32", 32, True)
    trainer = epoch.Prepared(build_method(config), config, "phantom")
    images = np.zeros((32, 64, 64), dtype=np.uint8)
    images += np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    trainer.run(images, np.arange(32), 10, 20)
    monkeypatch.setattr(LocalTrainer, "_batch", None)  # calling it again would fail
    assert trainer.run(images, np.arange(32), 11, 20).steps == 2


def test_quick_run_records_both_precisions(tmp_path):
    epoch.main(["--quick", "--size", "64", "--json", str(tmp_path / "epoch.json")])
    rows = json.loads((tmp_path / "epoch.json").read_text())["rows"]
    assert [row["precision"] for row in rows] == ["fp32", "bf16"]
    for row in rows:
        assert row["epoch_share"] == row["epoch_speedup"] / row["steps_speedup"] > 0
