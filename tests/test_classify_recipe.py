"""What ``classify train`` trains on: held-out cells choose k, then all but the test cells are used."""

import dataclasses

import pytest
import torch

from sparsecontrast.classify.cells import load_cells, split_cells
from sparsecontrast.classify.fit import fit, refit
from sparsecontrast.classify.recipe import train_classifier
from sparsecontrast.classify.run import build
from sparsecontrast.classify.settings import compose_classify
from tests.cell_files import WORDS, write_cells

# k is halved each epoch in which the held-out loss does not fall by half; it always is, and never grows
SHRINKING = ("method.share=0.5", "method.share_floor=0.02", "method.k_every=1", "method.k_factor=0.5")
RULE = (*SHRINKING, "method.k_tolerance=0.5", "method.k_smoothing=0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_cells(tmp_path_factory.mktemp("cells") / "drawn", each=6)


@pytest.fixture
def trained(folder):
    """Call with overrides, and rows of the split to spoil: the network, its rows, and what it was given."""

    def train(*words: str, spoil: str = ""):
        config = compose_classify([*WORDS, *RULE, f"cells.root={folder}", *words])
        cells = load_cells(config.cells, 32)
        split = split_cells(cells, config.cells, 0)
        if spoil:
            images = cells.images.clone()
            images[getattr(split, spoil)] = 0
            cells = dataclasses.replace(cells, images=images)
        network, done = train_classifier(
            lambda rows: build(config, cells, rows), cells, split, config.train, config.seed
        )
        return network, done.rows, (config, cells, split)

    return train


def same(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_k_is_that_of_the_lowest_held_out_loss_and_is_held_in_the_second_pass(trained):
    network, rows, _ = trained()
    search, second = ([row for row in rows if row["pass"] == name] for name in ("search", "refit"))
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4] * 2
    assert search[-1]["k"] < search[0]["k"] == network.ceiling
    best = min(search, key=lambda row: row["held_out_loss"])
    assert [network.k] + [row["k"] for row in second] == [best["k"]] * 5
    assert not any("held_out_loss" in row for row in second)


def test_the_result_is_a_training_from_new_weights_on_both_parts(trained):
    network, _, (config, cells, split) = trained()
    rows = torch.cat([split.train, split.val]).sort().values
    alone = build(config, cells, rows)
    alone.k = network.k
    refit(alone, cells, rows, config.train, config.seed)
    assert same(network, alone) and not network.training


def test_the_test_cells_are_not_looked_at_and_the_held_out_ones_are_trained_on(trained):
    network, rows, _ = trained("method.share_floor=0.5")
    blind, blind_rows, _ = trained("method.share_floor=0.5", spoil="test")
    assert same(network, blind) and rows == blind_rows
    assert not same(network, trained("method.share_floor=0.5", spoil="val")[0])
    # nor when k is chosen
    assert same(trained()[0], trained(spoil="test")[0])


def test_without_a_k_to_choose_nothing_is_searched(trained):
    network, rows, _ = trained("method.share_floor=0.5")
    assert [row["pass"] for row in rows] == ["refit"] * 4 and network.k == network.ceiling


def test_without_refit_the_best_held_out_weights_are_the_result(trained):
    network, rows, (config, cells, split) = trained("train.refit=false")
    alone = build(config, cells, split.train)
    done = fit(alone, cells, split, config.train, config.seed)
    assert same(network, alone) and network.k == alone.k
    assert rows == [{"pass": "search", **row} for row in done.rows]
