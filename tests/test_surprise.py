import math

import pytest
import torch

from sparsecontrast.models.surprise import DETAIL, SIDE, SurprisePredictor, detail

GRID = (5, 4)


@pytest.fixture
def predictor():
    torch.manual_seed(0)
    model = SurprisePredictor(GRID)
    torch.nn.init.normal_(model.place)
    return model


def images(n=3, side=16):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, GRID[0] * side, GRID[1] * side, generator=generator)


@pytest.mark.parametrize("cell", [0, 6, 19])
def test_a_cell_is_never_part_of_its_own_prediction(predictor, cell):
    small = images(1, SIDE)
    row, column = divmod(cell, GRID[1])
    other = small.clone()
    other[..., row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE] = 9.0
    pairs = zip(predictor.predict(small), predictor.predict(other), strict=True)
    changed = {i for before, after in pairs for i in (before != after).any(2).nonzero()[:, 1].tolist()}
    # all other cells see it, through the ring or through the mean of the rest
    assert changed == set(range(20)) - {cell}


def test_score_and_loss_by_brute_force(predictor):
    x = images(2, SIDE)
    mean, log_variance = predictor.predict(x)
    truth = detail(x)
    scores, loss = predictor.read(x)
    mean, log_variance, loss = mean.detach(), log_variance.detach(), loss.detach()
    for b in range(2):
        surprise, nll = [], []
        for i in range(20):
            z2 = [(float(truth[b, i, k] - mean[b, i, k]) ** 2) * math.exp(-float(log_variance[b, i, k]))
                  for k in range(DETAIL**2)]  # fmt: skip
            surprise.append(math.log(sum(z2) / DETAIL**2))
            nll += [(z + float(v)) / 2 for z, v in zip(z2, log_variance[b, i], strict=True)]
        assert float(loss[b]) == pytest.approx(sum(nll) / len(nll), rel=1e-4)
        s = torch.tensor(surprise)
        expected = (s - s.mean()) / s.std(correction=0) + predictor.prior
        torch.testing.assert_close(scores[b], expected, atol=1e-4, rtol=1e-4)


def test_detail_is_the_image_less_its_surroundings():
    assert detail(torch.full((1, 1, 40, 32), 3.0)).abs().max() < 1e-5
    x = torch.zeros(1, 1, 40, 32)
    x[..., 16:24, 8:16] = 1.0  # cell (2, 1)
    energy = detail(x).square().sum(2).reshape(GRID)
    assert energy.argmax() == 2 * GRID[1] + 1


def test_rows_are_independent_and_autocast_changes_nothing(predictor):
    x = images()
    scores, loss = predictor.read(x)
    torch.testing.assert_close(scores[1:2], predictor(x[1:2]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, same = predictor.read(x)
    assert torch.equal(scores, again) and torch.equal(loss, same)


def test_the_prior_prefers_the_middle_and_knows_no_pixel():
    near, far = SurprisePredictor(GRID, centre_prior=2.0), SurprisePredictor(GRID, centre_prior=0.0)
    far.load_state_dict(near.state_dict())
    difference = near(images()) - far(images())
    torch.testing.assert_close(difference, near.prior.expand(3, -1), atol=1e-5, rtol=1e-5)
    assert sorted(near.prior.topk(2).indices.tolist()) == [9, 10]  # the middle row, the middle columns


def test_it_is_as_small_as_it_should_be():
    assert 15_000 < sum(p.numel() for p in SurprisePredictor((7, 7)).parameters()) < 25_000


@pytest.mark.parametrize("side", [4, 14, 16, 28, 56])
def test_any_size_of_cell_is_scored(predictor, side):
    assert predictor(images(2, side)).shape == (2, 20)


@pytest.mark.parametrize("seed", range(5))
def test_what_surroundings_do_not_foretell_is_found_by_every_seed(seed):
    """Stripes of a phase of their own in every image; a blob anywhere; no label, no box in training."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = SurprisePredictor((4, 4), centre_prior=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(250):
        x, _ = striped(32, generator)
        model.read(x)[1].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    x, cells = striped(256, generator)
    found = (model(x).argmax(1) == cells).float().mean()
    assert found > 0.5  # chance is 1 / 16


def striped(n, generator):
    phase = 6.3 * torch.rand(n, 1, 1, generator=generator)
    stripes = torch.sin(torch.arange(32.0)[None, None, :] * 0.8 + phase).expand(n, 32, 32).clone()
    cells = torch.randint(16, (n,), generator=generator)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    for image, cell in zip(stripes, cells.tolist(), strict=True):
        row, column = divmod(cell, 4)
        image += 0.7 * torch.exp(-((y - row * 8 - 3.5) ** 2 + (x - column * 8 - 3.5) ** 2) / 5)
    return stripes[:, None], cells
