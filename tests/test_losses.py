import math

import pytest
import torch
import torch.nn.functional as F

from sparsecontrast import losses


def brute_info_nce(a, b, temperature, patients):
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    out = []
    for i in range(len(a)):
        terms = []
        for q, keys in ((a[i], b), (b[i], a)):
            logits = [
                float(q @ keys[j]) / temperature
                for j in range(len(a))
                if j == i or patients[j] != patients[i]
            ]
            positive = float(q @ keys[i]) / temperature
            terms.append(math.log(sum(math.exp(v) for v in logits)) - positive)
        out.append(sum(terms) / 2)
    return torch.tensor(out)


def test_info_nce_equals_brute_force_and_spares_the_same_patient():
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(6, 5, generator=g), torch.randn(6, 5, generator=g)
    patients = torch.tensor([0, 1, 1, 2, 3, 3])
    got = losses.info_nce(a, b, 0.2, patients)
    torch.testing.assert_close(got, brute_info_nce(a, b, 0.2, patients), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, losses.info_nce(a, b, 0.2))


def test_info_nce_of_collapsed_embeddings_is_chance():
    z = torch.ones(8, 3)
    torch.testing.assert_close(losses.info_nce(z, z, 0.1), torch.full((8,), math.log(8)))
    torch.testing.assert_close(losses.chance_level(torch.arange(8)), torch.tensor(math.log(8)))


@pytest.mark.parametrize("codes", [[0, 1, 1, 2, 3, 3], [0, 1] * 4, [5, 5, 5, 5, 2], [7, 7]])
def test_chance_level_counts_only_negatives(codes):
    patients = torch.tensor(codes)
    negatives = [sum(other != code for other in codes) for code in codes]
    expected = sum(math.log(1 + n) for n in negatives) / len(codes)
    assert losses.chance_level(patients).item() == pytest.approx(expected, abs=1e-6)
    z = torch.ones(len(codes), 3)
    assert losses.info_nce(z, z, 0.1, patients).mean().item() == pytest.approx(expected, abs=1e-5)


def test_distillation_is_zero_only_at_the_target_and_gives_the_target_no_gradient():
    scores = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    target = scores.detach().softmax(1).requires_grad_()
    assert losses.distillation(scores, target).abs().max() < 1e-6
    losses.distillation(scores + torch.tensor([1.0, 0, 0, 0]), target).sum().backward()
    assert target.grad is None and scores.grad.abs().sum() > 0


def test_entropy_shortfall_is_zero_when_uniform_and_the_floor_when_certain():
    uniform, certain = torch.zeros(1, 16), torch.tensor([[1e3] + [0.0] * 15])
    assert losses.entropy_shortfall(uniform, 0.5).item() == 0
    assert math.isclose(losses.entropy_shortfall(certain, 0.5).item(), 0.5 * math.log(16), rel_tol=1e-6)


def test_sparsity_budget_is_the_squared_distance_of_the_mean_probability():
    assert math.isclose(losses.sparsity_budget(torch.zeros(1, 4), 0.2).item(), 0.09, rel_tol=1e-5)


def brute_patch_info_nce(a, b, temperature):
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    total = 0.0
    for t in range(len(a)):
        for q, keys in ((a[t], b), (b[t], a)):
            logits = [float(q @ key) / temperature for key in keys]
            total += math.log(sum(math.exp(v) for v in logits)) - logits[t]
    return total / 2 / len(a)


def test_patch_info_nce_equals_brute_force_row_by_row():
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(3, 6, 5, generator=g), torch.randn(3, 6, 5, generator=g)
    expected = torch.tensor([brute_patch_info_nce(x, y, 0.2) for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(losses.patch_info_nce(a, b, 0.2), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        losses.patch_info_nce(a[1:2], b[1:2], 0.2), expected[1:2], atol=1e-5, rtol=1e-5
    )


def test_patch_info_nce_of_one_embedding_for_all_is_chance_and_of_equal_views_near_zero():
    z = torch.ones(2, 8, 3)
    torch.testing.assert_close(losses.patch_info_nce(z, z, 0.1), torch.full((2,), math.log(8)))
    far = torch.eye(8)[None]
    assert losses.patch_info_nce(far, 3 * far, 0.05).item() < 1e-6
