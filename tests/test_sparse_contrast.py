import dataclasses
import math

import pytest
import torch

from sparsecontrast import payload
from sparsecontrast.config import compose
from sparsecontrast.methods import build_method
from sparsecontrast.methods.method import SHARED, Batch
from sparsecontrast.methods.schedule import keep_ratio
from sparsecontrast.models.tokens import top_k

TINY = ["backbone.img_size=64", "backbone.patch_size=8", "backbone.depth=1", "method.projection_hidden=32"]


def method(*overrides):
    return build_method(compose([*TINY, *overrides]))


def gradients(m, loss):
    """By name, None where the loss does not depend on it."""
    named = {n: p for n, p in m.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return dict(zip(named, found, strict=True))


def choices(m):
    """What the backbone is given from now on: (kept, focus) of each call."""
    seen = []
    m.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[1:]))
    return seen


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
    m.backbone.vit.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]))
    for number in (1, 10, 20):  # dense start, target, dense end
        m.start_round(number, 20)
        m(batch())
    assert seen == [(8, 65), (8, 1 + 16 + 3 * 5), (8, 65)]  # both views of 4 images at once


def test_schedule_is_dense_then_falls_then_holds_then_dense():
    config = compose("method.keep=0.4").method
    ratios = [keep_ratio(config, r, 40) for r in range(1, 41)]
    assert ratios[:3] == [1, 1, 1] and ratios[-2:] == [1, 1] and ratios[20] == pytest.approx(0.4)
    assert all(a >= b for a, b in zip(ratios[2:37], ratios[3:38], strict=True))
    assert min(ratios) == pytest.approx(0.4)


def test_training_explores_and_inference_is_deterministic():
    m = method("selection=centre", "method.explore=0.5")
    m.start_round(10, 20)
    b, seen = batch(), choices(m)
    for seed in (0, 0, 1):
        m(dataclasses.replace(b, generator=torch.Generator().manual_seed(seed)))
    one, same, other = (kept for kept, _ in seen)
    assert one.shape == (8, 5) and torch.equal(one, same) and not torch.equal(one, other)
    assert not torch.equal(one[:4], one[4:])  # each view draws for itself
    best = top_k(torch.cat([m.look(b.first).scores, m.look(b.second).scores]), 3).tolist()
    for kept in (one.tolist(), other.tolist()):  # of five cells two are drawn
        assert all(set(top) <= set(row) for top, row in zip(best, kept, strict=True))
    m.eval()
    assert torch.equal(m.encode(b.first, "sparse"), m.encode(b.first, "sparse"))
    assert not torch.allclose(m.encode(b.first, "sparse"), m.encode(b.first, "dense"))
    torch.testing.assert_close(m.encode(b.first, 0.5), m.encode(b.first, "sparse"))
    torch.testing.assert_close(m.encode(b.first, 1.0), m.encode(b.first, "dense"))


@pytest.mark.parametrize("selection", ["surprise", "attention", "random", "centre", "energy"])
@pytest.mark.parametrize("keep", ["dense", "sparse"])
def test_what_is_chosen_is_weighed_by_its_scores(selection, keep):
    m, x = method(f"selection={selection}").eval(), batch().first
    look, (kept, focus) = m.look(x), m.choose(x, keep)
    assert (kept is None) == (keep == "dense") and (kept is None or torch.equal(kept, look.kept))
    scores = look.scores if kept is None else look.scores.gather(1, look.kept)
    torch.testing.assert_close(focus, scores.softmax(1).detach())
    assert torch.equal(m.encode(x, keep), m.backbone(x, kept, focus).detach())
    assert m.encode(x, keep).shape == (4, m.embed_dim) == (4, 2 * 192)


@pytest.mark.parametrize("number", [1, 10])  # of 20 rounds: dense, and at the target
def test_training_weighs_what_it_computes_explored_or_not(number):
    m, b = method("method.explore=0.5"), batch()
    m.start_round(number, 20)
    seen = choices(m)
    m(b)
    ((kept, focus),) = seen
    scores = torch.cat([m.look(b.first).scores, m.look(b.second).scores])
    torch.testing.assert_close(focus, (scores if kept is None else scores.gather(1, kept)).softmax(1))
    assert len(focus) == 2 * 4 and (kept is None) == (number == 1)


def test_without_focus_the_embedding_is_the_backbones_and_dense_scores_nothing(monkeypatch):
    x = batch().first
    for m in (method("method.focus=false"), method("method=dense_contrast")):
        m.eval()
        assert m.embed_dim == 192 and m.choose(x, 0.5).focus is None
        assert m.encode(x, 0.5).shape == (4, 192)
        monkeypatch.setattr(m, "saliency", None)
        assert m.choose(x, "dense") == (None, None)
        assert torch.equal(m.encode(x), m.backbone(x).detach())


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_at_the_least_keep_one_cell_is_fine_and_focus_says_something(pool):
    m = method("method.keep=0.25", f"backbone.pool={pool}")
    m.start_round(10, 20)
    loss = m(batch())
    assert torch.isfinite(loss).all()
    assert all(g is None or torch.isfinite(g).all() for g in gradients(m, loss.sum()).values())
    assert m.choose(batch().first).kept.shape == (4, 1)
    embedding = m.encode(batch().first, "sparse")
    assert torch.isfinite(embedding).all() and embedding[:, 192:].std(0).max() > 1e-3


def test_scorer_learns_from_the_teacher_and_from_the_task():
    alone = ["selection=attention", "method.sparsity_weight=0", "method.entropy_weight=0"]
    off = [*alone, "method.focus=false"]
    for overrides, step, learns in (
        (["method.distill_weight=1"], 0, True),  # teacher, also while dense
        (["method.distill_weight=1"], 1, False),  # not a distillation step
    ):
        m = method(*off, *overrides)
        m.start_round(1, 20)
        m(batch(step=step)).sum().backward()
        gradient = m.saliency.conv1.weight.grad
        assert (gradient is not None and gradient.abs().sum() > 0) == learns
    for number in (1, 10):  # dense, and at the target
        m = method(*alone, "method.distill_weight=0")
        m.start_round(number, 20)
        m(batch(step=1)).sum().backward()  # the focus only
        assert m.saliency.conv1.weight.grad.abs().sum() > 0


def test_distillation_pulls_the_scores_to_the_teachers_attention():
    torch.manual_seed(0)
    weights = ["method.sparsity_weight=0", "method.entropy_weight=0", "method.distill_every=1"]
    m = method("selection=attention", "method.focus=false", *weights)
    m.start_round(1, 20)
    optimizer = torch.optim.Adam(m.saliency.parameters(), lr=3e-3)
    values = []
    for _ in range(60):
        optimizer.zero_grad()
        m(batch(8)).mean().backward()
        optimizer.step()
        values.append(m.metrics()["distillation"])
    assert values[-1] < 0.7 * values[0]


@pytest.mark.parametrize("number", [1, 10])  # of 20 rounds: dense, and at the target
def test_the_scorers_own_loss_moves_the_scorer_alone(number):
    """With and without it: the same weights, the same cells; what differs is its doing."""
    both, contrast, b = method("method.surprise_weight=0.5"), method("method.surprise_weight=0"), batch()
    for m in (both, contrast):
        m.start_round(number, 20)
    loss, task = both(batch()), contrast(batch())
    surprise = both.saliency.read(torch.cat([b.first, b.second]))[1].reshape(2, -1).mean(0)
    torch.testing.assert_close(loss - task, 0.5 * surprise)  # row by row, the mean of both views
    assert both.metrics()["surprise"] == pytest.approx(float(surprise.detach().mean()))
    assert both.metrics()["contrast"] == pytest.approx(float(task.detach().mean()))
    got, plain, own = gradients(both, loss.sum()), gradients(contrast, task.sum()), surprise.sum()
    expected = gradients(both, own)
    for name, gradient in got.items():
        if name.startswith("saliency."):
            assert plain[name] is None, name  # the contrast has no way to it
            torch.testing.assert_close(gradient, 0.5 * expected[name])
            assert gradient.abs().sum() > 0, name
        else:
            assert expected[name] is None, name
            assert (gradient is None) == (plain[name] is None), name
            if gradient is not None:
                torch.testing.assert_close(gradient, plain[name])
    assert "surprise" not in contrast.metrics()


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


SCORERS = pytest.mark.parametrize("selection", ["surprise", "attention"])


@SCORERS
def test_only_backbone_and_scorer_are_shared(selection):
    m = method(f"selection={selection}")
    shared = m.shared_parameters()
    assert {n for n in shared if n.startswith("saliency.")} == {
        f"saliency.{n}" for n, _ in m.saliency.named_parameters()
    }
    assert {n.split(".")[0] + "." for n in shared} == set(SHARED)
    assert set(m.state_dict()) - set(shared) == {
        n for n in m.state_dict() if n.startswith(("projector.", "teacher."))
    }


@SCORERS
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_what_is_shared_survives_the_payload(selection, dtype):
    m = method(f"selection={selection}")
    state, shared = m.state_dict(), m.shared_parameters()
    packed = payload.pack({n: state[n] for n in shared}, shared, dtype)
    payload.verify(packed, {n: tuple(state[n].shape) for n in shared}, dtype)
    found = payload.unpack(packed)
    assert set(found) == set(shared)
    for name, tensor in found.items():
        sent = state[name] if dtype == "fp32" else state[name].half().float()
        assert torch.equal(tensor, sent), name
    other = method(f"selection={selection}", "seed=1").eval()
    other.load_state_dict({n: t.float() for n, t in found.items()}, strict=False)
    x = batch().first
    if dtype == "fp32":
        assert torch.equal(other.look(x).scores, m.eval().look(x).scores)


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
    assert (m.choose(x, "dense").focus[:, [0, 4, 8, 12]] == 0).all()
