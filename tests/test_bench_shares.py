"""The shares in a row are those of the tokens that the blocks truly see."""

import pytest
import torch

from benchmarks import shares, sparsity
from benchmarks.contenders import OURS, Contender, Model, build_workload, random_batch
from benchmarks.shares import Computed, computed, computed_of_row

CPU = torch.device("cpu")
TOY = Model("vit_tiny", 32, (("backbone.depth", 3), ("backbone.patch_size", 4)))
TILES = (("backbone.tiles", 7),)


def test_a_quarter_of_a_vit_at_224_is_one_fine_cell():
    tiny = Model("vit_tiny", 224)
    asked = {keep: computed(OURS, keep, tiny) for keep in (1.0, 0.5, 0.35, 0.3, 0.25)}
    told = {keep: (found.fine_cells, round(found.token_share * 196)) for keep, found in asked.items()}
    assert told == {1.0: (49, 196), 0.5: (16, 97), 0.35: (7, 70), 0.3: (3, 58), 0.25: (1, 52)}
    assert all(found.cells == 49 for found in asked.values())
    assert computed("all_coarse", 0.25, Model("vit_tiny", 512)) == Computed(0, 256, 64 / 1024)


def test_of_a_cnn_the_tiles_count():
    assert computed(OURS, 0.25, Model("convnext_atto", 224, TILES)) == Computed(12, 49, 12 / 49)
    assert computed("low_resolution", 0.5, Model("convnext_atto", 224, TILES)) == Computed(
        None, None, 25 / 49
    )


def test_blocks_see_the_share_that_is_told_and_none_is_told_where_it_falls():
    told = set()
    for contender in sparsity.contenders(sparsity.Cell(TOY, "fp32", False), sparsity.Protocol(), CPU):
        work, seen = build_workload(contender, TOY, CPU), []
        for name, part in work.module.named_modules():
            if name.endswith(("norm1", "norm2")):  # before attention and before the MLP of every block
                part.register_forward_pre_hook(lambda _, args, s=seen: s.append(args[0].shape[1]))
        work.infer(random_batch(32, 1, CPU, 0).first)
        share = computed(contender.method, contender.keep, TOY).token_share
        told.add(share is None)
        if share is None:
            assert contender.keep == 1 or len(set(seen)) > 1, contender
        else:
            assert set(seen) == {1 + round(share * 64)}, contender
    assert told == {True, False}


def test_what_a_row_says_goes_before_what_would_be_worked_out():
    row = {"method": OURS, "keep": 0.25, "backbone": "vit_tiny", "size_px": 224}
    assert computed_of_row(row) == Computed(1, 49, 52 / 196)
    assert computed_of_row(row | {"fine_cells": 2, "cells": 49, "token_share": 0.5}) == Computed(2, 49, 0.5)
    changed = {"changes": "backbone.patch_size=8 method.cell=4"}
    assert computed_of_row(row | changed).cells == 49 and computed_of_row(row | changed).fine_cells == 10
    assert computed("evit", 0.25, TOY).row() == {} and shares.computed("dense", 1.0, TOY).row() == {
        "token_share": 1.0
    }


@pytest.mark.parametrize("keep", [0.5, 0.25])
def test_cells_of_a_vit_are_those_of_the_network(keep):
    work = build_workload(Contender(OURS, keep), TOY, CPU)
    m = work.module.backbone.kept_cells(keep)
    found = computed(OURS, keep, TOY)
    assert (found.fine_cells, found.cells) == (m, work.module.backbone.num_cells)
    assert found.token_share == work.module.backbone.share(m)
