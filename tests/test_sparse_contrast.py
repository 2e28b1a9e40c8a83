import dataclasses
import math

import pytest
import torch

from sparsecontrast.config import compose
from sparsecontrast.methods import build_method
from sparsecontrast.methods.method import SHARED, Batch
from sparsecontrast.methods.schedule import keep_ratio

TINY = ["backbone.img_size=64", "backbone.patch_size=8", "backbone.depth=1", "method.projection_hidden=32"]


def method(*overrides):
    return build_method(compose([*TINY, *overrides]))


def batch(n=4, step=0, seed=0):
    g = torch.Generator().manual_seed(seed)
    first = torch.randn(n, 1, 64, 64, generator=g)
    second = first + 0.1 * torch.randn(n, 1, 64, 64, generator=g)
    return Batch(first, second, torch.arange(n), torch.Generator().manual_seed(seed), step)


def test_loss_is_one_value_a_row_and_starts_near_chance():
    m = method("method.surprise_weight=0")
    m.start_round(10, 20)
    loss = m(batch(8))
    assert loss.shape == (8,)
    assert 0 < loss.mean() < 2 * math.log(8)


def test_the_chance_level_told_is_that_of_the_batchs_patients():
    m = method()
    m(batch(8))
    assert m.metrics()["chance_loss"] == pytest.approx(math.log(8))
    m(dataclasses.replace(batch(8), patients=torch.tensor([0, 0, 1, 1, 1, 2, 3, 4])))
    expected = (2 * math.log(7) + 3 * math.log(6) + 3 * math.log(8)) / 8
    assert m.metrics()["chance_loss"] == pytest.approx(expected)


def test_losses_keep_their_precision_under_autocast():
    m = method("selection=attention", "method.distill_every=1")
    m.start_round(1, 20)
    exact = m(batch(8)).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = m(batch(8))
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.detach(), exact, atol=0.1, rtol=0.02)
    assert m.metrics()["distillation"] >= 0


@pytest.mark.parametrize("selection", ["surprise", "attention", "random", "centre", "energy"])
def test_tokens_in_the_blocks_follow_the_schedule(selection):
    m = method(f"selection={selection}", "method.distill_weight=0")
    seen = []
    m.backbone.vit.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    for number in (1, 10, 20):  # dense start, target, dense end
        m.start_round(number, 20)
        m(batch())
    assert seen == [65, 65, 1 + 16 + 3 * 5, 1 + 16 + 3 * 5, 65, 65]


def test_schedule_is_dense_then_falls_then_holds_then_dense():
    config = compose("method.keep=0.4").method
    ratios = [keep_ratio(config, r, 40) for r in range(1, 41)]
    assert ratios[:3] == [1, 1, 1] and ratios[-2:] == [1, 1] and ratios[20] == pytest.approx(0.4)
    assert all(a >= b for a, b in zip(ratios[2:37], ratios[3:38], strict=True))
    assert min(ratios) == pytest.approx(0.4)


def test_training_explores_and_inference_is_deterministic():
    m = method("selection=centre", "method.explore=0.5")
    m.start_round(10, 20)
    b = batch()
    scores = m.saliency(b.first)
    kept = []
    m.backbone.register_forward_pre_hook(lambda _, args: kept.append(args[1]))
    m._project(b.first, scores, torch.Generator().manual_seed(0))
    m._project(b.first, scores, torch.Generator().manual_seed(1))
    assert not torch.equal(kept[0], kept[1])
    m.eval()
    assert torch.equal(m.encode(b.first, "sparse"), m.encode(b.first, "sparse"))
    assert not torch.allclose(m.encode(b.first, "sparse"), m.encode(b.first, "dense"))
    torch.testing.assert_close(m.encode(b.first, 0.5), m.encode(b.first, "sparse"))
    torch.testing.assert_close(m.encode(b.first, 1.0), m.encode(b.first, "dense"))


def test_scorer_learns_from_the_teacher_and_from_the_task():
    off = ["selection=attention", "method.sparsity_weight=0", "method.entropy_weight=0"]
    for overrides, step, learns in (
        (["method.distill_weight=1"], 0, True),  # teacher, also while dense
        (["method.distill_weight=1"], 1, False),  # not a distillation step
    ):
        m = method(*off, *overrides)
        m.start_round(1, 20)
        m(batch(step=step)).sum().backward()
        gradient = m.saliency.conv1.weight.grad
        assert (gradient is not None and gradient.abs().sum() > 0) == learns
    m = method(*off, "method.distill_weight=0")
    m.start_round(10, 20)
    m(batch(step=1)).sum().backward()  # gates only
    assert m.saliency.conv1.weight.grad.abs().sum() > 0


def test_distillation_pulls_the_scores_to_the_teachers_attention():
    torch.manual_seed(0)
    weights = ["method.sparsity_weight=0", "method.entropy_weight=0", "method.distill_every=1"]
    m = method("selection=attention", *weights)
    m.start_round(1, 20)
    optimizer = torch.optim.Adam(m.saliency.parameters(), lr=3e-3)
    values = []
    for _ in range(60):
        optimizer.zero_grad()
        m(batch(8)).mean().backward()
        optimizer.step()
        values.append(m.metrics()["distillation"])
    assert values[-1] < 0.7 * values[0]


def test_the_scorers_own_loss_moves_the_scorer_alone():
    m = method()
    m.start_round(10, 20)
    m(batch()).sum().backward()
    scorer = [p.grad.clone() for p in m.saliency.parameters()]
    assert all(g.abs().sum() > 0 for g in scorer)
    shared = m.backbone.vit.cls_token.grad.clone()
    alone = method("method.surprise_weight=0")  # the same weights, the same cells
    alone.start_round(10, 20)
    alone._learned = m._learned
    alone.config = m.config
    alone._read = lambda view: (m.saliency(view), torch.zeros(len(view)))
    alone(batch()).sum().backward()
    torch.testing.assert_close(alone.backbone.vit.cls_token.grad, shared)
    assert math.isfinite(m.metrics()["surprise"])


def test_without_distillation_there_is_no_teacher_to_feed():
    assert method().teacher is None
    assert not any(n.startswith("teacher.") for n in method().state_dict())


def test_teacher_follows_slowly_and_never_trains():
    m = method("selection=attention", "method.momentum=0.9")
    before = m.teacher.vit.cls_token.clone()
    with torch.no_grad():
        m.backbone.vit.cls_token += 1
    m.after_step()
    torch.testing.assert_close(m.teacher.vit.cls_token, before + 0.1, atol=1e-6, rtol=1e-5)
    assert not any(p.requires_grad for p in m.teacher.parameters())
    m.reset_local()
    assert torch.equal(m.teacher.vit.cls_token, m.backbone.vit.cls_token)


def test_only_backbone_and_scorer_are_shared():
    m = method("selection=attention")
    shared = m.shared_parameters()
    assert {n.split(".")[0] + "." for n in shared} == set(SHARED)
    assert set(m.state_dict()) - set(shared) == {
        n for n in m.state_dict() if n.startswith(("projector.", "teacher."))
    }


def test_no_batch_normalisation_anywhere():
    assert not any(isinstance(x, torch.nn.modules.batchnorm._BatchNorm) for x in method().modules())


def test_contrast_couples_rows_as_per_sample_false_says():
    m = method()
    b = batch()
    first = b.first.clone().requires_grad_()
    loss = m(dataclasses.replace(b, first=first))
    (gradient,) = torch.autograd.grad(loss[0], first)
    assert gradient[1].abs().max() > 0 and m.per_sample is False


def test_look_keeps_distinct_cells_of_the_grid():
    look = method().look(batch().first)
    assert look.grid == (4, 4) and look.scores.shape == (4, 16) and look.kept.shape == (4, 5)
    assert all(len(set(row)) == 5 for row in look.kept.tolist())


@pytest.mark.parametrize("selection", ["surprise", "attention", "centre"])
def test_excluded_border_is_not_kept(selection):
    m = method(f"selection={selection}")
    x = batch().first.clone()
    x[..., :16] = x.min()  # the left column of cells
    assert not set(m.look(x).kept.flatten().tolist()) & {0, 4, 8, 12}
