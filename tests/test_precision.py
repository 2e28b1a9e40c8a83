"""Precision of inference: near fp32, and not fp32."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from sparsecontrast.config import compose
from sparsecontrast.errors import ConfigError
from sparsecontrast.features import encode
from sparsecontrast.methods import build_method
from sparsecontrast.precision import prepare

WORDS = ("backbone.img_size=64", "backbone.patch_size=8", "backbone.depth=2")
# A rounded value is off by at most 2^-9 of itself (bf16) or 2^-8 of its row's largest (int8, the
# activations in 7 bits); random errors e on a unit vector lower the cosine by e^2 / 2. Two blocks of
# some ten roundings each stay far below e = 3 % and 5 %.
COSINE = {"bf16": 1 - 0.03**2 / 2, "int8": 1 - 0.05**2 / 2}


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (5, 64, 64), dtype=np.uint8)


def embed(pictures, *words):
    return torch.from_numpy(encode(compose([*WORDS, *words]), None, pictures, lambda text: None, "test"))


@pytest.mark.parametrize("keep", ["dense", "0.5"])
@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_an_embedding_is_near_fp32_and_not_the_same(pictures, precision, pool, keep):
    words = (f"evaluation.keep={keep}", f"backbone.pool={pool}")
    want = embed(pictures, *words)
    got = embed(pictures, *words, f"evaluation.precision={precision}")
    assert got.dtype == torch.float32 and got.shape == want.shape
    for ours, theirs in zip(got.chunk(2, dim=1), want.chunk(2, dim=1), strict=True):  # the area, the focus
        assert ours.shape[1] == 192 and cosine_similarity(ours, theirs).min() > COSINE[precision]
    assert (got - want).abs().max() > 1e-4  # the switch acts: fp32 would repeat itself bit for bit
    assert torch.equal(want, embed(pictures, *words, "evaluation.precision=fp32"))


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_the_cells_are_chosen_in_fp32(precision):
    method = build_method(compose([*WORDS])).eval()
    images = torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    scores, kept = method.saliency(images), method.choose(images, 0.5).kept
    method.backbone = prepare(method.backbone, precision)
    assert method.saliency(images).dtype == torch.float32 and torch.equal(method.saliency(images), scores)
    assert torch.equal(method.choose(images, 0.5).kept, kept)


@pytest.mark.parametrize(("precision", "kind"), [("bf16", torch.bfloat16), ("int8", torch.qint8)])
def test_the_weights_of_a_copy_are_lowered(precision, kind):
    backbone = build_method(compose([*WORDS])).backbone.eval()
    before = {name: t.clone() for name, t in backbone.state_dict().items()}
    engine = torch.backends.quantized.engine
    low = prepare(backbone, precision)
    weight = low.vit.blocks[0].attn.qkv.weight
    assert (weight() if callable(weight) else weight).dtype == kind
    assert all(torch.equal(t, before[name]) for name, t in backbone.state_dict().items())
    assert torch.backends.quantized.engine == engine and prepare(backbone, "fp32") is backbone


def test_bf16_is_autocast_bit_for_bit():
    """Weights cast beforehand are the ones that autocast casts at each call."""
    backbone = build_method(compose([*WORDS])).backbone.eval()
    images = torch.randn(3, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    kept = torch.tensor([[0, 3, 7]]).expand(3, -1)
    for choice in ((kept,), (kept, torch.rand(3, 3).softmax(1)), (None, torch.rand(3, 16).softmax(1))):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            want = backbone(images, *choice)
        with torch.no_grad():
            assert torch.equal(prepare(backbone, "bf16")(images, *choice), want)


def test_int8_where_it_cannot_run_is_a_clear_error(pictures):
    linear = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="on the CPU only, not on cuda; use bf16"):
        prepare(linear, "int8", "cuda")
    with pytest.raises(ConfigError, match="no linear layer"):
        prepare(nn.Sequential(nn.Conv2d(1, 1, 3)), "int8")
    with pytest.raises(ConfigError, match="evaluation.precision"):
        compose(["evaluation.precision=fp8"])
