"""What a patient is clipped by: the norm of the films' sum, right on rows of any width."""

import pytest
import torch

from sparsecontrast.privacy import by_patient, patient_norms
from tests.private import Tiny, engine


def test_norms_of_patients():
    g = torch.Generator().manual_seed(0)
    rows = [torch.randn(5, 6, generator=g), torch.randn(5, 600, generator=g)]
    owner = torch.tensor([2, 0, 2, 1, 0])
    flat = torch.cat(rows, 1).double()
    wanted = torch.stack([flat[owner == p].sum(0).norm() for p in range(3)])
    found = patient_norms([by_patient(r, owner) for r in rows])
    torch.testing.assert_close(found, wanted, atol=0, rtol=3e-7)
    torch.testing.assert_close(patient_norms(rows), flat.norm(dim=1), atol=0, rtol=3e-7)


@pytest.mark.parametrize("weights", [255, 256, 147_457, 589_824, 2_359_296])  # matrices of ViT-tiny to -base
@pytest.mark.parametrize("kind", ["constant", "gaussian"])
def test_the_norm_of_a_long_row_is_right_to_less_than_the_margin(weights, kind):
    """One float32 sum over them is wrong by up to 8e-4, and clipping by as much."""
    g = torch.Generator().manual_seed(0)
    row = torch.full((2, weights), 1 / 3) if kind == "constant" else torch.randn(2, weights, generator=g)
    exact = row.double().norm(dim=1)
    assert ((patient_norms([row]) / exact - 1).abs() < 3e-7).all()


def test_films_that_cancel_are_clipped_as_what_is_left_of_them():
    """Clipped one by one, their rounding came back: this patient changed the sum by more than C."""
    made = engine(Tiny(), clip=0.05)
    g = torch.Generator().manual_seed(0)
    for p in made.optimizer.reached:
        film = 3e8 * torch.randn(p.shape, generator=g)
        p.grad_sample = torch.stack([film, -film * (1 + 1e-7)])
    made.optimizer.clip_and_accumulate(torch.tensor([7, 7]))
    change = torch.cat([p.summed_grad.flatten() for p in made.optimizer.reached]).double().norm()
    assert 0.99 * 0.05 < change <= 0.05 * (1 + 1e-6)
