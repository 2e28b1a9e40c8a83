import itertools

import pytest
import torch

from sparsecontrast.models import tokens, words


def test_gathered_words_are_the_pixels_of_their_places():
    images = torch.rand(3, 3, 12, 8, generator=torch.Generator().manual_seed(0))
    patch, columns = 4, 2
    kept = torch.tensor([[0, 3], [1, 5], [2, 4]])
    found = tokens.kept_patches(images, patch, 1, kept)
    for b, j in itertools.product(range(3), range(2)):
        r, c = divmod(int(kept[b, j]), columns)
        cut = images[b, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
        assert torch.equal(found[b, j], cut.flatten())


def test_a_word_of_one_pixel_is_its_three_values():
    images = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    kept = torch.tensor([[7, 24], [0, 12]])
    assert torch.equal(tokens.kept_patches(images, 1, 1, kept), images.flatten(2).mT[[[0], [1]], kept])


def test_places_run_row_by_row_between_the_borders():
    where = words.places((2, 4))
    assert where.shape == (8, 2)
    assert where[1].tolist() == [-0.25, -0.5] and where[4].tolist() == [-0.75, 0.5]
    assert torch.allclose(where.mean(0), torch.zeros(2), atol=1e-6)


def test_waves_tell_every_place_from_every_other():
    told = words.waves(words.places((16, 16)), 4)
    assert told.shape == (256, 16)
    apart = torch.cdist(told, told) + 9 * torch.eye(256)
    assert apart.min() > 0.05


def test_without_dither_the_choice_is_the_plain_top_k():
    scores = torch.rand(4, 30, generator=torch.Generator().manual_seed(2))
    noise = words.fixed_dither((5, 6))
    found = words.choose(scores, 7, 0.0, 0.0, noise, None)
    assert torch.equal(found, scores.topk(7, dim=1).indices.sort(dim=1).values)


def test_dither_spreads_the_words_over_a_flat_map():
    """On a map without a preference the words are even: no empty quarter, few side by side."""
    grid = (16, 16)
    kept = words.choose(torch.zeros(1, 256), 38, 1.0, 0.0, words.fixed_dither(grid), None)[0]
    quarters = torch.bincount((kept // 128) * 2 + (kept % 16) // 8, minlength=4)
    assert quarters.min() >= 8 and quarters.max() <= 11
    plain = words.choose(torch.zeros(1, 256), 38, 0.0, 0.0, words.fixed_dither(grid), None)[0]
    assert plain.tolist() == list(range(38))  # what a plain top-k makes of it


def test_dither_draws_in_proportion_to_exp_of_the_scores():
    """One word drawn many times: Gumbel-max is a draw from the softmax."""
    scores = torch.tensor([[0.0, 1.0, 2.0]]).expand(40_000, -1)
    generator = torch.Generator().manual_seed(3)
    drawn = words.choose(scores, 1, 1.0, 0.0, torch.zeros(3), generator)
    shares = torch.bincount(drawn[:, 0], minlength=3) / 40_000
    assert torch.allclose(shares, scores[0].softmax(0), atol=0.01)


def test_exploration_reaches_what_the_map_never_would():
    scores = torch.arange(100.0).expand(500, -1)
    generator = torch.Generator().manual_seed(4)
    kept = words.choose(scores, 10, 0.0, 0.3, torch.zeros(100), generator)
    assert (kept >= 93).sum(1).ge(7).all()  # seven of the map's own
    low = torch.bincount(kept.flatten(), minlength=100)[:93]
    assert low.min() > 0  # three others, anywhere
    assert all(len(set(row)) == 10 for row in kept.tolist())


@pytest.mark.parametrize("explore", [0.0, 0.4])
def test_the_choice_is_the_generators_alone(explore):
    scores = torch.rand(3, 50, generator=torch.Generator().manual_seed(5))
    noise = words.fixed_dither((5, 10))

    def again(seed: int) -> torch.Tensor:
        torch.manual_seed(torch.seed() % 1000)  # whatever the global generator holds
        return words.choose(scores, 9, 1.0, explore, noise, torch.Generator().manual_seed(seed))

    assert torch.equal(again(7), again(7)) and not torch.equal(again(7), again(8))
    fixed = [words.choose(scores, 9, 1.0, explore, noise, None) for _ in range(2)]
    assert torch.equal(*fixed)
