"""A group is one lab's: what labs call their patients never mixes them."""

import dataclasses
import hashlib

import numpy as np
import pytest
import torch

from sparsecontrast.classify.cells import load_cells, split_cells, training_rows
from sparsecontrast.classify.run import judge
from sparsecontrast.classify.settings import compose_classify
from tests.cell_files import WORDS, write_cells


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_cells(tmp_path_factory.mktemp("cells") / "drawn")


def configured(folder, *words):
    return compose_classify([*WORDS, f"cells.root={folder}", *words])


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_labs_that_count_their_patients_alike_share_no_group(folder, seed, shared):
    """Every, or every second, name of one lab is one of the other's too, as ids 1..N are."""
    config = configured(folder, "cells.train_labs=[yellow]", "cells.test_labs=[grey]")
    cells = load_cells(config.cells, 32)
    names = [
        name.removeprefix(f"{lab}-") if int(name.split("-")[2]) % shared == 0 else name
        for lab, name in zip(cells.labs, cells.groups, strict=True)
    ]
    cells = dataclasses.replace(cells, groups=np.array(names))
    split = split_cells(cells, config.cells, seed)
    assert set(cells.labs[split.train]) == set(cells.labs[split.val]) == {"yellow"}
    assert set(cells.labs[split.test]) == {"grey"} and len(split.test) == 24
    assert len(split.train) + len(split.val) == 24
    assert set(cells.labs[training_rows(cells, config.cells, seed)]) == {"yellow"}
    assert len(set(cells.own_groups())) == 24  # twelve a lab, whatever they are called


@pytest.mark.parametrize("seed", range(3))
def test_how_a_lab_is_split_depends_on_its_own_pictures_alone(folder, seed):
    """So a lab in a federation splits as the simulation of all labs does, whatever others call theirs."""
    config = configured(folder)
    cells = load_cells(config.cells, 32)
    names = [name.split("-")[2] if name[-1] in "024" else name for name in cells.groups]
    cells = dataclasses.replace(cells, groups=np.array(names))
    together = split_cells(cells, config.cells, seed)
    for lab in ("grey", "yellow"):
        own = torch.from_numpy(np.flatnonzero(cells.labs == lab))
        alone = split_cells(cells.select(own), config.cells, seed)
        for part, rows in vars(alone).items():
            there = getattr(together, part)
            assert torch.equal(own[rows], there[cells.labs[there.numpy()] == lab])


def test_the_interval_draws_two_labs_patients_of_one_name_apart(folder):
    config = configured(folder)
    cells = load_cells(config.cells, 32)
    rows, said = np.arange(len(cells)), np.arange(len(cells)) % 2
    alike = dataclasses.replace(cells, groups=np.array([n.partition("-")[2] for n in cells.groups]))
    apart = dataclasses.replace(
        cells, groups=np.array([f"{g}-{lab}" for g, lab in zip(alike.groups, cells.labs, strict=True)])
    )
    assert judge(alike, rows, said, 50, 0) == judge(apart, rows, said, 50, 0)


@pytest.mark.parametrize(
    ("words", "digest"),
    [
        ([], "e12ac416b5e1974f"),
        (["cells.train_labs=[yellow]", "cells.test_labs=[grey]"], "7f53b620baff0039"),
    ],
)
def test_the_splits_are_those_of_the_committed_benchmark(folder, words, digest):
    """Another order of the groups would make benchmarks/results/cells-cpu.json speak of other splits."""
    config = configured(folder, *words)
    cells = load_cells(config.cells, 32)
    parts = [
        part.numpy().tobytes()
        for seed in range(5)
        for part in vars(split_cells(cells, config.cells, seed)).values()
    ]
    assert hashlib.sha256(b"".join(parts)).hexdigest()[:16] == digest
