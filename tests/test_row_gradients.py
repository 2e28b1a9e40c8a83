import math
from functools import partial

import pytest
import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from timm.layers.norm import LayerNorm2d
from timm.models.vision_transformer import LayerScale
from torch import nn

from sparsecontrast.config import compose
from sparsecontrast.coupling import noise_batch
from sparsecontrast.errors import MethodError
from sparsecontrast.methods import build_method
from sparsecontrast.models.linformer import TokenMix
from sparsecontrast.models.rows import SAMPLERS, Outer
from sparsecontrast.row_gradients import RowGradients
from tests.private import CNN, RESNET, VIT, Tiny, batch_of, library_method

DEIT3 = ["backbone.name=deit3_small_patch16_224", *VIT]  # LayerScale, and no position for its class token


def check(method, rows=2):
    made = RowGradients(method)
    found = made.verify(partial(noise_batch, method, rows))
    made.cleanup()
    return found


@pytest.mark.parametrize("kind", [VIT, CNN, RESNET, DEIT3], ids=["vit", "convnext", "resnet", "deit3"])
@pytest.mark.parametrize("keep", [0.4, 1.0])
def test_rows_are_those_of_autograd_and_names_stay(kind, keep):
    method = library_method(kind, f"method.keep={keep}", "method.explore=0.25")
    names, plain = list(method.state_dict()), method(noise_batch(method, 2)).detach()
    missing = {n for n, _ in method.named_parameters()} - check(method)
    dense_vit = {"backbone.coarse"} if keep == 1 else set()
    score = {n for n in names if n.startswith("backbone.score.")}  # how a CNN pools: not in this loss
    assert missing == (score if kind in (CNN, RESNET) else dense_vit)
    assert list(method.state_dict()) == names
    assert torch.equal(method(noise_batch(method, 2)).detach(), plain)


def rows_by_loop(layer, x):
    named = list(layer.parameters())
    weight = torch.randn(layer(x).shape, generator=torch.Generator().manual_seed(1))
    losses = (layer(x) * weight).flatten(1).sum(1)
    return [torch.stack(g) for g in zip(*(torch.autograd.grad(v, named, retain_graph=True) for v in losses),
                                        strict=True)], weight  # fmt: skip


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (3, 4, 9, 9)),
        (nn.Conv2d(4, 6, 3, padding=2, dilation=2, bias=False), (3, 4, 9, 9)),
        (nn.Conv2d(4, 6, 1), (3, 4, 5, 5)),
        (nn.Conv2d(4, 6, 1, stride=2), (3, 4, 5, 5)),
        (nn.Conv2d(4, 8, 7, padding=3, groups=4), (3, 4, 9, 9)),
        (nn.Conv2d(4, 6, 2, stride=2, groups=2), (3, 4, 8, 8)),
        (nn.GroupNorm(2, 4), (3, 4, 5, 5)),
        (nn.LayerNorm(4), (3, 2, 5, 4)),
        (LayerNorm2d(4), (3, 4, 5, 5)),
        (LayerScale(4), (3, 5, 4)),
        (TokenMix(5, 2, bias=False), (3, 5, 4)),
    ],
    ids=lambda v: str(v)[:60],
)
def test_formulas_of_single_layers(layer, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    wanted, gradient = rows_by_loop(layer, x)
    found = SAMPLERS[type(layer)](layer, [x], gradient)
    for parameter, rows in zip(layer.parameters(), wanted, strict=True):
        own = found[parameter]
        torch.testing.assert_close(own.rows() if isinstance(own, Outer) else own, rows, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_factors_are_multiplied_out_over_whatever_lay_there_or_added_to_it(dtype):
    g = torch.Generator().manual_seed(0)
    # as a convolution gives them: positions last in memory, three parts of each of two images
    gradient, inputs = (torch.randn(6, n, 7, generator=g).to(dtype).mT for n in (4, 10))
    outer = Outer(gradient, inputs, torch.Size((4, 5, 2))).folded(2)
    wanted = torch.einsum("npto,npti->noi", *(x.double().unflatten(0, (2, 3)) for x in (gradient, inputs)))
    wanted = wanted.view(2, 4, 5, 2)
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 0.2, "rtol": 1e-2}
    torch.testing.assert_close(outer.rows().double(), wanted, **close)
    found = torch.full((3, 4, 5, 2), math.nan)[:2]
    outer.add_to(found, first=True)
    torch.testing.assert_close(found.double(), wanted, **close)
    outer.add_to(found, first=False)
    torch.testing.assert_close(found.double(), 2 * wanted, **close)


@pytest.mark.parametrize("kind", [VIT, RESNET], ids=["vit", "resnet"])
def test_rows_of_a_batch_hold_nothing_of_the_batch_before(kind):
    method = library_method(kind)
    made = RowGradients(method)
    before = batch_of(method, [0, 1, 2], seed=1)
    before.first.fill_(math.nan)
    found = []
    for batches in ([before, batch_of(method, [0, 1])], [batch_of(method, [0, 1])]):
        for batch in batches:
            made.clear()
            made.backward(batch)
        found.append({n: p.grad_sample.clone() for n, p in method.named_parameters()
                      if p.grad_sample is not None})  # fmt: skip
        made.cleanup()
        made = RowGradients(method)
    assert found[0].keys() == found[1].keys()
    for name, rows in found[0].items():
        assert torch.equal(rows, found[1][name]) and rows.isfinite().all(), name


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm2d(4), nn.BatchNorm2d(4).eval().requires_grad_(False), nn.SyncBatchNorm(4),
     BatchNormAct2d(4), FrozenBatchNormAct2d(4), nn.BatchNorm2d(4, track_running_stats=False)],
    ids=["plain", "frozen", "sync", "timm", "timm frozen", "without statistics"],
)  # fmt: skip
def test_every_batch_norm_is_refused_by_name(norm):
    method = Tiny()
    method.backbone[1] = norm
    with pytest.raises(MethodError, match=r"^backbone\.1: .*BatchNorm.* mixes the patients"):
        RowGradients(method)


def test_a_layer_without_a_rule_is_refused_by_name():
    method = Tiny()
    method.head.append(nn.PReLU())
    with pytest.raises(MethodError, match=r"head\.3\.weight: no rule .* PReLU"):
        RowGradients(method)


def test_stochastic_depth_of_a_convnext_is_refused():
    method = library_method(CNN)
    method.backbone.cnn.stages[0].blocks[0].drop_path = nn.Dropout(0.1)
    with pytest.raises(MethodError, match="stochastic depth"):
        RowGradients(method)


def test_weights_used_past_their_layer_are_found():
    class Sly(Tiny):
        def forward(self, batch):
            return super().forward(batch) + self.head[2].weight.square().sum() * batch.first.mean((1, 2, 3))

    with pytest.raises(MethodError, match=r"head\.2\.weight: its per-sample gradient is not"):
        check(Sly())


@pytest.mark.parametrize("couple", ["centre", "batch"])
def test_a_coupled_loss_under_a_false_flag_is_found(couple):
    class Liar(Tiny):
        def forward(self, batch):
            loss = super().forward(batch)
            return loss * loss.flip(0) if couple == "batch" else (loss - loss.mean()).square()

    with pytest.raises(MethodError, match="rows are coupled"):
        check(Liar())


def test_both_views_in_one_batch_are_not_taken_for_rows():
    class Joined(Tiny):
        def forward(self, batch):
            first, second = self.head(self.backbone(torch.cat([batch.first, batch.second]))).chunk(2)
            return (first - second).square().sum(1)

    with pytest.raises(MethodError, match="per-sample gradient is not"):
        check(Joined())


def test_a_loss_that_is_averaged_is_refused():
    class Mean(Tiny):
        def forward(self, batch):
            return super().forward(batch).mean()

    with pytest.raises(MethodError, match="one value for each of 2"):
        check(Mean())


def test_an_input_that_is_overwritten_is_found():
    class Over(Tiny):
        def forward(self, batch):
            x = self.backbone(batch.first)
            y = self.head(x)
            x.detach().mul_(2)
            return y.square().sum(1)

    with pytest.raises(MethodError, match="overwritten"):
        check(Over())


def test_hooks_rest_outside_of_backward_and_leave_when_told():
    method = Tiny()
    made = RowGradients(method)
    method(batch_of(method, [0, 1])).sum().backward()
    assert all(p.grad_sample is None for p in method.parameters() if p.requires_grad)
    method.zero_grad()
    made.backward(batch_of(method, [0, 1]))
    assert all(p.grad is None for p in method.parameters())
    made.cleanup()
    assert not any(hasattr(p, "grad_sample") for p in method.parameters())
    assert not any(m._forward_hooks for m in method.modules())


def test_every_backbone_of_the_project_has_its_rules():
    for name in ("vit_tiny", "convnext_atto", "resnet18"):
        words = ["backbone.depth=1"] if name == "vit_tiny" else []
        RowGradients(build_method(compose([f"backbone={name}", "method=patch_contrast", *words])))
