"""Selectors and measures of the localisation benchmark, against the formulas they come from."""

import json
import math

import numpy as np
import pytest
import timm
import torch

from benchmarks import localisation
from benchmarks.overlap import Scene, iou, overlap
from benchmarks.rivals.perturbed import perturbed_top_k, unit_range
from benchmarks.rivals.relaxed import ChangedViT, PerturbedTopK, StraightThrough, straight_through
from benchmarks.selectors import (
    FIXED,
    JOINTLY,
    Protocol,
    ReconstructionError,
    Trial,
    learn_alone,
    learn_jointly,
    selectors,
)
from sparsecontrast.config import compose
from sparsecontrast.models import tokens
from sparsecontrast.models.saliency import EXCLUDED, excluded_cells
from sparsecontrast.models.surprise import DETAIL, SIDE, detail

GRID = (4, 4)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def vit():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, patch_size=8, in_chans=1, num_classes=0,
        embed_dim=32, num_heads=2, depth=1, global_pool="avg",
    )  # fmt: skip
    return ChangedViT(model, 2)


def config(**changes):
    words = [f"method.{k}={v}" for k, v in {"keep": 0.5, "explore": 0.0, **changes}.items()]
    return compose(["selection=attention", *words]).method


def pictures(n=3):
    return torch.randn(n, 1, 64, 64, generator=seeded(1))


def barred(scores, images):
    return scores + EXCLUDED * excluded_cells(images, GRID)


def test_perturbed_top_1_of_2_is_a_normal_distribution_and_its_gradient_the_density():
    sigma, gap = 0.5, 0.3
    scores = torch.tensor([[gap, 0.0]], requires_grad=True)
    p = perturbed_top_k(scores, 1, seeded(), sigma, draws=400_000)
    z = gap / (sigma * math.sqrt(2))
    assert float(p.detach()[0, 0, 0]) == pytest.approx(0.5 * (1 + math.erf(z / math.sqrt(2))), abs=3e-3)
    p[0, 0, 0].backward()
    density = math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) / (sigma * math.sqrt(2))
    torch.testing.assert_close(scores.grad, torch.tensor([[density, -density]]), atol=1e-2, rtol=0)


def test_perturbed_top_k_gradient_equals_finite_differences():
    sigma, draws, step = 0.7, 400_000, 0.1
    scores, weights = torch.tensor([[0.4, 0.0, -0.2, 0.3]]), torch.randn(2, 4, generator=seeded(5))

    def value(x):
        # the same draws on both sides of the difference
        return float((perturbed_top_k(x, 2, seeded(), sigma, draws)[0] * weights).sum())

    expected = [(value(scores + step * e) - value(scores - step * e)) / (2 * step) for e in torch.eye(4)]
    asked = scores.clone().requires_grad_()
    (perturbed_top_k(asked, 2, seeded(), sigma, draws)[0] * weights).sum().backward()
    torch.testing.assert_close(asked.grad[0], torch.tensor(expected), atol=1.5e-2, rtol=0)


def test_without_noise_to_speak_of_perturbed_top_k_is_top_k():
    scores = torch.rand(3, 9, generator=seeded())
    p = perturbed_top_k(scores, 4, seeded(), sigma=1e-6)
    assert torch.equal(p.argmax(2), tokens.top_k(scores, 4)) and torch.equal(p.amax(2), torch.ones(3, 4))
    assert torch.allclose(perturbed_top_k(scores, 4, seeded(), 0.5).sum(2), torch.ones(3, 4))
    scaled = unit_range(9 * scores - 5)
    assert scaled.amin(1).abs().max() < 1e-5 and scaled.amax(1).sub(1).abs().max() < 1e-4


def test_straight_through_is_the_plain_sparse_network_with_a_gradient():
    encoder, x = StraightThrough(vit(), config(), seeded()), pictures()
    found = encoder(x)
    m = encoder.backbone.kept_cells(0.5)
    kept = tokens.top_k(barred(encoder.saliency(x), x), m)
    assert torch.equal(found, encoder.backbone(x, kept))
    found.square().sum().backward()
    assert float(encoder.saliency.head.weight.grad.abs().sum()) > 0
    s = torch.tensor([-1.0, 2.0], requires_grad=True)
    gates = straight_through(s)
    assert torch.equal(gates, torch.ones(2))
    gates.sum().backward()
    torch.testing.assert_close(s.grad, s.detach().sigmoid() * (1 - s.detach().sigmoid()))


def test_perturbed_network_without_noise_is_the_plain_sparse_network(monkeypatch):
    encoder, x = PerturbedTopK(vit(), config(), seeded()), pictures()
    found = encoder(x)
    found.square().sum().backward()
    assert float(encoder.saliency.head.weight.grad.abs().sum()) > 0
    monkeypatch.setattr(
        "benchmarks.rivals.relaxed.perturbed_top_k", lambda s, m, g: perturbed_top_k(s, m, g, 1e-7)
    )
    kept = tokens.top_k(barred(unit_range(encoder.saliency(x)), x), encoder.backbone.kept_cells(0.5))
    torch.testing.assert_close(encoder(x), encoder.backbone(x, kept), atol=1e-5, rtol=1e-5)


def test_reconstruction_error_by_brute_force():
    torch.manual_seed(0)
    scorer = ReconstructionError(GRID)
    x = torch.randn(2, 1, GRID[0] * SIDE, GRID[1] * SIDE, generator=seeded())
    scores, loss = (found.detach() for found in scorer.read(x))
    mean, truth = scorer.predict(x)[0].detach(), detail(x)
    for b in range(2):
        errors = [[float(truth[b, i, k] - mean[b, i, k]) ** 2 for k in range(DETAIL**2)] for i in range(16)]
        assert float(loss[b]) == pytest.approx(np.mean(errors) / 2, rel=1e-4)
        s = np.log(np.mean(errors, axis=1))
        expected = (s - s.mean()) / s.std() + scorer.prior.numpy()
        np.testing.assert_allclose(scores[b].numpy(), expected, atol=1e-3)


def trial(seed=0):
    images = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (12, 64, 64), dtype=np.uint8)
    protocol = Protocol(size=64, patch=8, depth=1, steps=3, batch=4, contrast_steps=2, contrast_batch=4)
    return Trial(images, protocol, seed)


def test_every_selector_scores_every_cell_and_the_seed_decides():
    found = {name: scorer(pictures(2)).detach() for name, scorer, _ in selectors(trial())}
    assert {*JOINTLY, *FIXED} < set(found) and all(s.shape == (2, 16) for s in found.values())
    prior = learn_alone("surprise", trial())[0].prior
    torch.testing.assert_close(found["surprise"], found["surprise_without_prior"] + prior)
    again, other = (learn_alone("surprise", trial(seed))[0](pictures(2)).detach() for seed in (0, 1))
    assert torch.equal(again, found["surprise"]) and not torch.equal(other, found["surprise"])


def test_selectors_that_are_not_asked_for_are_not_trained(monkeypatch):
    monkeypatch.setattr("benchmarks.selectors.learn_jointly", None)
    asked = ("surprise_without_prior", "random")
    assert tuple(name for name, *_ in selectors(trial(), asked)) == asked
    assert tuple(name for name, *_ in selectors(trial(), ("reconstruction_error",))) == (
        "reconstruction_error",
    )


def test_the_contrast_that_is_told_is_that_of_the_loss_alone():
    """Distillation's loss has terms of the scorer besides; a batch of four is at chance at the start."""
    _, budget = learn_jointly("distillation", trial())
    assert budget["chance_loss"] == pytest.approx(math.log(4)) and budget["steps"] == 2
    assert 0.5 < budget["contrast_loss"] < 2.5


def test_overlap_of_a_known_choice():
    boxes = np.array([[0.0, 0, 8, 8], [8, 0, 8, 16]])  # cell 0; cells 1 and 5
    scene = Scene("x", np.zeros((1, 32, 32), dtype=np.uint8), [boxes], [["a", "b"]])
    scores = np.zeros((1, 16))
    scores[0, [0, 1, 15]] = 1
    found = overlap(scene, scores, np.zeros((1, 16), dtype=bool), GRID, 3)
    np.testing.assert_allclose(found.recall, [1.0, 0.5])
    assert found.figures["iou"] == pytest.approx(2 / 4)
    mask = np.zeros(GRID, dtype=bool)
    assert iou(mask, boxes, 32) == 0
    assert iou(~mask, np.array([[-8.0, -8, 99, 99]]), 32) == 1  # cut at the edges


def test_the_quick_benchmark_writes_rows_that_add_up(tmp_path, capsys):
    file = tmp_path / "found.json"
    localisation.main(["--quick", "--out", str(tmp_path / "out"), "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    names = {r["selector"] for r in rows}
    assert names == {"surprise", "surprise_without_prior", "reconstruction_error", *JOINTLY, *FIXED}
    for row in rows:
        assert len(row["recall"]) == len(row["over_chance"]) == 2 and row["chance"] == row["m"] / 16
        assert row["worst_seed"] == pytest.approx(min(row["recall"]) / row["chance"], abs=1e-3)
    whole = next(r for r in rows if r["selector"] == "prior_alone" and r["by"] == "all")
    assert whole["foretold"] == [1.0, 1.0] and whole["train_seconds"] == [0.0, 0.0]
    spent = {r["selector"]: (r["steps"], r["step_images"]) for r in rows if r["by"] == "all"}
    assert spent == dict.fromkeys(names - {*JOINTLY, *FIXED}, (20, 16)) | dict.fromkeys(JOINTLY, (2, 8)) | {
        name: (0, 0) for name in FIXED
    }
    joint = [r for r in rows if r["selector"] in JOINTLY and r["by"] == "all"]
    assert all(r["chance_loss"] == [pytest.approx(math.log(8), abs=1e-3)] * 2 for r in joint)
    assert all(len(r["contrast_loss"]) == 2 and min(r["contrast_loss"]) > 0.1 for r in joint)
    assert not any("contrast_loss" in r for r in rows if r["selector"] not in JOINTLY)
    kinds = [r["boxes"] for r in rows if r["selector"] == "energy" and r["by"] == "kind" and r["m"] == 2]
    assert sum(kinds) == whole["boxes"]
    assert "worst seed in brackets" in capsys.readouterr().out
