"""Which loss the number of words follows."""

import pytest

from sparsecontrast.classify import fit as fitting
from sparsecontrast.classify.cells import load_cells, split_cells
from sparsecontrast.classify.fit import fit
from sparsecontrast.classify.run import build
from sparsecontrast.classify.settings import compose_classify
from tests.cell_files import WORDS, write_cells

RULE = ("method.k_every=1", "method.k_smoothing=0", "method.k_tolerance=0.02", "method.k_factor=0.5")
FALLING, FLAT = [1.0, 0.5, 0.25, 0.1], [1.0, 1.0, 1.0, 1.0]


def changes(folder, monkeypatch, training, held):
    """Train four epochs whose losses are told, not computed: what became of k in each."""
    words = [*WORDS, *RULE, f"cells.root={folder}", "train.batch_size=64", "method.share=0.3"]
    config = compose_classify(words)
    cells = load_cells(config.cells, 32)
    split = split_cells(cells, config.cells, 0)
    steps, epochs = iter(training), iter(held)
    monkeypatch.setattr(fitting, "train_step", lambda *_: next(steps))
    monkeypatch.setattr(
        fitting, "held_out", lambda *_: {"held_out_loss": next(epochs), "held_out_accuracy": 0.5}
    )
    done = fit(build(config, cells, split.train), cells, split, config.train, 0)
    assert [row["loss"] for row in done.rows] == training
    return [row["change"] for row in done.rows], [row["k"] for row in done.rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_cells(tmp_path_factory.mktemp("cells") / "drawn")


def test_k_stays_while_the_held_out_loss_falls_whatever_training_says(folder, monkeypatch):
    told, ks = changes(folder, monkeypatch, training=FLAT, held=FALLING)
    assert told == ["learning"] * 4 and len(set(ks)) == 1


def test_k_shrinks_when_the_held_out_loss_is_flat_though_the_training_loss_falls(folder, monkeypatch):
    told, ks = changes(folder, monkeypatch, training=FALLING, held=FLAT)
    assert told == ["learning", "shrink", "shrink", "shrink"] and ks[-1] < ks[0]
