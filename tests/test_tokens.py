import pytest
import torch

from sparsecontrast.models import tokens


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_patchify_is_what_a_convolution_sees(generator):
    images = torch.randn(2, 3, 24, 32, generator=generator)
    conv = torch.nn.Conv2d(3, 5, 8, stride=8)
    expected = conv(images).flatten(2).transpose(1, 2)
    got = torch.nn.functional.linear(tokens.patchify(images, 8), conv.weight.flatten(1), conv.bias)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_cell_patches_follow_cell_positions(generator):
    images = torch.randn(2, 1, 32, 48, generator=generator)
    flat = tokens.patchify(images, 8)
    grouped = tokens.cell_patches(images, 8, 2)
    positions = tokens.cell_positions((4, 6), 2)
    assert positions.flatten().sort().values.tolist() == list(range(24))
    assert torch.equal(grouped, flat[:, positions])


def test_coarse_patch_is_the_mean_of_each_cells_pixels(generator):
    images = torch.randn(1, 1, 16, 16, generator=generator)
    coarse = tokens.patchify(tokens.shrink(images, 2), 4)
    brute = torch.stack([images[0, 0, 8:10, 2:4].mean(), images[0, 0, 14:16, 0:2].mean()])
    assert torch.allclose(coarse[0, 2, [1, 12]], brute)  # cell 2 is the lower left


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 6, 8])
def test_shrink_is_the_mean_of_blocks(generator, factor):
    x = torch.randn(2, 1, 48, 24, generator=generator)
    torch.testing.assert_close(tokens.shrink(x, factor), torch.nn.functional.avg_pool2d(x, factor))


def test_top_k_against_brute_force_with_ties():
    scores = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert tokens.top_k(scores, 2).tolist() == [[1, 2], [0, 1]]


def test_exploration_keeps_the_best_and_draws_the_rest_uniformly(generator):
    scores = torch.arange(16.0).expand(4000, 16)
    kept = tokens.explore_top_k(scores, 8, 0.25, generator)
    assert all(len(set(row)) == 8 for row in kept.tolist())
    counts = torch.bincount(kept.flatten(), minlength=16)
    assert (counts[-6:] == 4000).all()  # 8 - round(.25 * 8) top-scored
    assert ((counts[:10] / 4000 - 0.2).abs() < 0.04).all()  # 2 of the other 10


def test_what_is_not_allowed_is_neither_best_nor_drawn(generator):
    scores = torch.arange(16.0).expand(200, 16)
    allowed = torch.arange(16).expand(200, 16) < 10
    kept = tokens.explore_top_k(scores, 8, 0.25, generator, allowed)
    assert int(kept.max()) == 9 and all(len(set(row)) == 8 for row in kept.tolist())
    assert all({4, 5, 6, 7, 8, 9} <= set(row) for row in kept.tolist())


@pytest.mark.parametrize(
    ("rows", "cells", "m"), [(1, 9, 4), (7, 49, 16), (64, 196, 64), (3, 5, 0), (3, 5, 5)]
)
def test_complement_is_what_the_mask_leaves(generator, rows, cells, m):
    kept = tokens.top_k(torch.rand(rows, cells, generator=generator), m)
    mask = torch.ones(rows, cells, dtype=torch.bool).scatter(1, kept, False)
    assert torch.equal(tokens.complement(kept, cells), mask.nonzero()[:, 1].reshape(rows, cells - m))


def test_complement_within_a_part():
    among = torch.tensor([[1, 3, 4, 8], [0, 2, 5, 9]])
    taken = torch.tensor([[3, 8], [0, 9]])
    assert tokens.complement(taken, 10, among).tolist() == [[1, 4], [2, 5]]


def test_complement_and_scatter_undo_gather(generator):
    x = torch.randn(3, 10, 4, generator=generator)
    kept = tokens.top_k(torch.rand(3, 10, generator=generator), 4)
    rest = tokens.complement(kept, 10)
    whole = tokens.scatter(tokens.gather(x, kept), kept, 10) + tokens.scatter(
        tokens.gather(x, rest), rest, 10
    )
    assert torch.equal(whole, x)
    assert tokens.complement(tokens.top_k(x[..., 0], 10), 10).shape == (3, 0)
