"""The benchmark of the wire: differences are paired by seed and film, in whatever order runs kept them."""

from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from benchmarks import wire
from sparsecontrast.errors import EvaluationError
from sparsecontrast.item_scores import Question, write_scores
from sparsecontrast.probes import Scored

FILMS = 60


def run(folder, seed, names, monkeypatch, noise=0.0):
    """A run folder with scores of two findings, its films in an order of its own; what an AUROC would be."""
    monkeypatch.setattr(wire, "run_name", lambda _: "federated")
    generator = np.random.default_rng(seed)
    truth = {label: np.random.default_rng(i).integers(0, 2, FILMS) for i, label in enumerate(("a", "b"))}
    found, told = {}, []
    for label, labels in truth.items():
        scores = labels + 2 * generator.normal(size=FILMS) + noise * generator.normal(size=FILMS)
        order = generator.permutation(FILMS)
        one = np.full(FILMS, "")
        kept = Scored(scores[None, order], labels[order] * 1.0, names[order], one, np.ones(1))
        found[Question("all findings", label, "federated")] = (names[order], kept)
        found[Question("all findings", label, "start")] = (names, kept)
        told.append(roc_auc_score(labels, scores))
    folder.mkdir()
    write_scores(folder, found)
    rounds = ({"bytes_up": 10**6, "bytes_down": 2 * 10**6},)
    return SimpleNamespace(folder=folder, rounds=rounds), np.mean(told)


def test_a_difference_is_the_mean_over_seeds_of_pairs(tmp_path, monkeypatch):
    names = np.array([f"film{i:02d}" for i in range(FILMS)])
    full = [run(tmp_path / f"full{seed}", seed, names, monkeypatch) for seed in range(3)]
    small = [run(tmp_path / f"small{seed}", seed, names, monkeypatch, noise=3.0) for seed in range(3)]
    row = wire.compared("fp16", [r for r, _ in small], [r for r, _ in full])
    pairs = [a - b for (_, a), (_, b) in zip(small, full, strict=True)]
    assert row["minus_fp32_of_seeds"] == pytest.approx(pairs, abs=1e-4) and abs(np.mean(pairs)) > 0.02
    assert row["minus_fp32"] == pytest.approx(np.mean(pairs), abs=1e-4)
    assert row["low"] < row["minus_fp32"] < row["high"]
    assert (row["megabytes_up"], row["megabytes_down"]) == (1.0, 2.0)
    same = wire.compared("fp32", [r for r, _ in full], [r for r, _ in full])
    assert (same["minus_fp32"], same["low"], same["high"]) == (0, 0, 0)


def test_other_films_are_not_compared(tmp_path, monkeypatch):
    names = np.array([f"film{i:02d}" for i in range(FILMS)])
    one, _ = run(tmp_path / "one", 0, names, monkeypatch)
    other, _ = run(tmp_path / "other", 1, np.char.add(names, "x"), monkeypatch)
    with pytest.raises(EvaluationError, match="not scored on the same"):
        wire.scored([one, other])
