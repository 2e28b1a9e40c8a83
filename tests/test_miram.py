"""MIRAM: what is hidden is absent, both targets are the pixels they should be, and images stay apart."""

import dataclasses

import numpy as np
import pytest
import torch

from sparsecontrast import losses
from sparsecontrast.batches import Views
from sparsecontrast.config import compose
from sparsecontrast.coupling import coupling, noise_batch
from sparsecontrast.data.transforms import Augmentation, mae_view
from sparsecontrast.errors import ConfigError, MethodError
from sparsecontrast.methods import build_method
from sparsecontrast.methods.method import Batch
from sparsecontrast.methods.miram import Miram, draw_visible, standardised
from sparsecontrast.models import tokens
from sparsecontrast.models.linear_attention import ATTENTIONS
from sparsecontrast.trainer import build_optimizer, explicit_attention
from tests.private import batch_of

SMALL = ("backbone.img_size=64", "backbone.patch_size=8", "backbone.depth=1",
         "method.decoder_dim=16", "method.decoder_depth=1", "method.landmarks=8")  # fmt: skip


def miram(*words):
    return build_method(compose(["method=miram", *SMALL, *words]))


def test_loss_is_one_finite_value_a_row_and_names_its_parts():
    m = miram("method.high_weight=0.5")
    loss = m(noise_batch(m, 3)).detach()
    told = m.metrics()
    assert loss.shape == (3,) and torch.isfinite(loss).all() and m.per_sample
    assert told["keep"] == 0.25 and set(told) == {"keep", "low_resolution", "high_resolution"}
    assert float(loss.mean()) == pytest.approx(told["low_resolution"] + 0.5 * told["high_resolution"])


def test_the_encoder_never_reads_a_hidden_pixel():
    """NaN in every hidden patch: one that was read, even times zero, would show."""
    m = miram().eval()
    images = torch.randn(3, 1, 64, 64)
    visible = draw_visible(images, 64, 16, torch.Generator().manual_seed(0))
    poisoned = tokens.patchify(images, 8)
    hidden = tokens.complement(visible, 64)
    poisoned.scatter_(1, hidden[:, :, None].expand(-1, -1, 64), torch.nan)
    poisoned = poisoned.view(3, 8, 8, 8, 8).transpose(2, 3).reshape(3, 1, 64, 64)
    assert int(poisoned.isnan().sum()) == 3 * 48 * 64
    found = m.backbone.visible(poisoned, visible)
    assert found.shape == (3, 1 + 16, 192)
    torch.testing.assert_close(found, m.backbone.visible(images, visible), rtol=0, atol=0)


def test_every_block_computes_the_visible_tokens_alone():
    m, counts = miram("backbone.depth=2"), []
    for block in m.backbone.vit.blocks:
        block.register_forward_hook(lambda module, given, out: counts.append(out.shape[1]))
    m(noise_batch(m, 2))
    assert counts == [1 + 16] * 2


def test_seeing_all_patches_is_the_dense_network():
    m = miram("backbone.depth=2").eval()
    images, every = torch.randn(2, 1, 64, 64), torch.arange(64).expand(2, -1)
    wanted = m.backbone.vit.fc_norm(m.backbone.features(images))
    torch.testing.assert_close(m.backbone.visible(images, every), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("upsample", [2, 4])
def test_targets_are_the_pixels_of_both_resolutions(upsample):
    """By slices: patch (r, c) of the shrunk image, and the parts of that patch in the image itself."""
    m = miram(f"method.upsample={upsample}", "method.normalise=false")
    images = torch.randn(2, 1, 64, 64)
    visible = draw_visible(images, 64, 16, torch.Generator().manual_seed(0))
    filled, side = m.fill(images, visible), 8 // upsample
    small = torch.nn.functional.avg_pool2d(images, upsample)
    for row in range(2):
        hidden = sorted(set(range(64)) - set(visible[row].tolist()))
        for i, patch in enumerate(hidden):
            r, c = divmod(patch, 8)
            low = small[row, 0, r * side : (r + 1) * side, c * side : (c + 1) * side]
            torch.testing.assert_close(filled.low[1][row, i], low.flatten())
            for part in range(upsample**2):
                y, x = r * 8 + part // upsample * side, c * 8 + part % upsample * side
                high = images[row, 0, y : y + side, x : x + side]
                assert torch.equal(filled.high[1][row, i * upsample**2 + part], high.flatten())


def test_the_loss_is_the_error_of_hidden_patches_alone():
    m = miram()
    batch = noise_batch(m, 2)
    wanted = m(batch)
    again = noise_batch(m, 2)
    filled = m.fill(again.first, draw_visible(again.first, 64, 16, again.generator))
    low, high = (((a - b) ** 2).mean((1, 2)) for a, b in (filled.low, filled.high))
    torch.testing.assert_close(wanted, low + high)
    perfect = losses.reconstruction(filled.low[1], filled.low[1])
    assert filled.low[0].shape == filled.low[1].shape == (2, 48, 16) and not perfect.any()


SOME = ("method.high_share=0.125", "method.attention=softmax")


def test_some_of_the_hidden_patches_are_drawn_for_the_high_resolution_and_tell_its_error():
    """Six of 48. Over many draws each is drawn as often, so the mean of the loss is that over all of them."""
    m = miram("method.high_share=0.02", *SOME[1:]).eval()  # one patch at a time: what it says is its own
    batch = noise_batch(m, 2)
    visible = draw_visible(batch.first, 64, 16, torch.Generator().manual_seed(0))
    hidden = tokens.complement(visible, 64)
    whole, drawn = m.fill(batch.first, visible), []
    g = torch.Generator().manual_seed(0)
    for _ in range(600):
        drawn.append(m._drawn(hidden, g))
        assert all(set(a.tolist()) <= set(b.tolist()) for a, b in zip(drawn[-1], hidden, strict=True))
    counts = torch.bincount(torch.cat(drawn, 1)[0], minlength=64)[hidden[0]]
    assert (counts - 600 / 48).abs().max() < 5 * (600 / 48) ** 0.5
    each = torch.stack([losses.reconstruction(*m.fill(batch.first, visible, hidden[:, [i]]).high)
                        for i in range(48)])  # fmt: skip
    torch.testing.assert_close(each.mean(0), losses.reconstruction(*whole.high))
    assert len(tokens.complement(visible, 64)[0]) * 4 == whole.high[0].shape[1]


def test_a_step_of_some_computes_few_tokens_and_low_resolution_is_as_ever():
    m, plain, counts = miram(*SOME), miram("method.attention=softmax"), []
    m.high_decoder.blocks.register_forward_hook(lambda module, given, out: counts.append(out.shape[1]))
    loss = m(noise_batch(m, 3)).detach()
    assert counts == [16 + 6 * 4] and loss.shape == (3,)
    plain(noise_batch(plain, 3))
    assert m.metrics()["low_resolution"] == plain.metrics()["low_resolution"]
    assert m.shared_parameters() == plain.shared_parameters()
    filled = m.fill(torch.randn(1, 1, 64, 64), draw_visible(loss[:1], 64, 16, torch.Generator()))
    assert filled.high[0].shape == (1, 48 * 4, 16)  # the report's pictures have all of them


def test_a_share_is_above_nothing_and_at_most_all():
    for share in ("0", "1.1", "-1"):
        with pytest.raises(ConfigError, match="method.high_share"):
            miram(f"method.high_share={share}")


def test_a_patch_of_one_grey_value_has_the_target_zero():
    flat = standardised(torch.full((1, 2, 16), 3.7))
    assert not flat.any()
    pattern = standardised(torch.randn(4, 3, 16) * 7 + 2)
    torch.testing.assert_close(pattern.mean(-1), torch.zeros(4, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(pattern.var(-1), torch.ones(4, 3))


def test_hidden_patches_are_drawn_uniformly_from_the_batch_generator():
    images = torch.zeros(400, 1, 64, 64)
    drawn = draw_visible(images, 64, 16, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, draw_visible(images, 64, 16, torch.Generator().manual_seed(1)))
    assert not torch.equal(drawn, draw_visible(images, 64, 16, torch.Generator().manual_seed(2)))
    assert (drawn.diff(dim=1) > 0).all()
    share = torch.bincount(drawn.flatten(), minlength=64) / 400
    assert (share - 0.25).abs().max() < 5 * (0.25 * 0.75 / 400) ** 0.5


@pytest.mark.parametrize("attention", list(ATTENTIONS))
def test_no_attention_couples_images(attention):
    for share in (1.0, 0.125):
        m = miram(f"method.attention={attention}", "method.decoder_depth=2", f"method.high_share={share}")
        assert coupling(m, noise_batch(m, 3)) == 0
        assert coupling(m.eval(), batch_of(m, [0, 0, 1], "alike")) == 0


def test_the_second_view_plays_no_part():
    m = miram()
    batch = noise_batch(m, 2)
    blind = dataclasses.replace(noise_batch(m, 2), second=torch.full_like(batch.first, torch.nan))
    assert torch.equal(m(batch), m(blind))


def test_one_view_of_true_grey_values_is_made():
    m = miram()
    config = compose(["method=miram", *SMALL, "train.crop_area=[0.5,0.7]", "train.rotation=3"])
    pixels = np.random.default_rng(0).integers(0, 256, (4, 64, 64), dtype=np.uint8)
    rows = np.array([0, 2])
    views = Views(m, config, torch.device("cpu"))
    batch = views.batch(pixels, np.arange(4), rows, rows, torch.Generator().manual_seed(0), 3)
    assert batch.second is batch.first and batch.patients.tolist() == [0, 2] and batch.step == 3
    told, g = Augmentation(area=(0.5, 0.7), degrees=3), torch.Generator().manual_seed(0)
    moved = mae_view(torch.from_numpy(pixels[rows]), g, 64, told)[0]
    assert torch.equal(batch.first, moved)
    # nothing was drawn for a second view: the next numbers are the masks'
    assert torch.equal(torch.rand(3, generator=batch.generator), torch.rand(3, generator=g))


@pytest.mark.parametrize("words", [(), ("method.high_share=0.25", "method.attention=softmax")])
def test_it_learns_to_fill_in_a_pattern(words):
    """Stripes of half a patch, of a random phase: each visible patch tells what the hidden ones hold."""
    m = miram("method.mask_ratio=0.5", "method.decoder_dim=32", *words)
    optimizer = torch.optim.Adam(m.parameters(), lr=3e-3)
    g = torch.Generator().manual_seed(0)
    for step in range(60):
        phase = torch.rand(8, 1, 1, 1, generator=g) * 6.28
        images = (torch.arange(64)[None, None, None] * 6.28 / 4 + phase).sin().expand(-1, -1, 64, -1)
        loss = m(Batch(images, images, torch.arange(8), g, step)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    told = m.metrics()
    # a network that knows no phase can say nothing better than the mean, whose error is 1
    assert told["low_resolution"] < 0.4 and told["high_resolution"] < 0.4


def test_all_that_trains_gets_a_gradient_and_coarse_cells_do_not():
    m = miram()
    m(noise_batch(m, 2)).sum().backward()
    without = {n for n, p in m.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {"backbone.coarse"}  # the other methods' embedding of coarse cells stays what it was
    optimizer = build_optimizer(m, compose("method=miram").train)
    before = m.backbone.coarse.detach().clone()
    optimizer.step()
    assert torch.equal(m.backbone.coarse, before)


def test_the_backbone_alone_may_leave():
    m = miram()
    shared = m.shared_parameters()
    assert shared and all(n.startswith("backbone.") for n in shared)
    home = {n.split(".")[0] for n in m.state_dict() if n not in shared}
    assert home == {"low_decoder", "high_decoder"}
    assert set(shared) == {n for n in miram("method.high_weight=0").shared_parameters()}


def test_its_backbone_is_that_of_the_other_methods():
    other = build_method(compose([*SMALL[:3]]))
    theirs = {n: t.shape for n, t in other.state_dict().items() if n.startswith("backbone.")}
    assert {n: t.shape for n, t in miram().state_dict().items() if n.startswith("backbone.")} == theirs


def test_without_weight_the_high_resolution_is_not_there():
    m = miram("method.high_weight=0")
    plain = miram("method.high_weight=0", "method.upsample=1")
    assert m.high_decoder is None and set(m.metrics() | {"x": 0}) == {"keep", "x"}
    m(noise_batch(m, 2)), plain(noise_batch(m, 2))
    assert set(m.metrics()) == {"keep", "low_resolution"}
    assert (m.low_decoder.head.out_features, plain.low_decoder.head.out_features) == (16, 64)


def test_an_embedding_is_the_dense_mean_and_no_other_is_given():
    m = miram().eval()
    images = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(m.encode(images), m.backbone(images))
    assert m.encode(images).shape == (2, m.embed_dim)
    assert torch.equal(m.encode(images, 1.0), m.encode(images, "dense"))
    for keep in ("sparse", 0.5):
        with pytest.raises(MethodError, match="chooses no regions"):
            m.encode(images, keep)


def test_bf16_computes_the_network_and_not_the_loss():
    m = miram()
    exact = m(noise_batch(m, 2))
    explicit_attention(m)
    types = []
    m.high_decoder.head.register_forward_hook(lambda module, given, out: types.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = m(noise_batch(m, 2))
    assert types == [torch.bfloat16] and loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, atol=0.05, rtol=0.05)
    loss.mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in m.parameters() if p.grad is not None)


def test_what_cannot_be_masked_or_keeps_no_image_apart_is_refused():
    with pytest.raises(MethodError, match="a CNN has nothing to reconstruct from"):
        build_method(compose("method=miram backbone=convnext_atto backbone.img_size=96 backbone.tiles=3"))
    m = miram()
    m.backbone.vit.blocks[0].norm2 = torch.nn.BatchNorm1d(65)
    with pytest.raises(MethodError, match=r"backbone.vit.blocks.0.norm2: BatchNorm couples images"):
        Miram(m.config, m.backbone)
    with pytest.raises(MethodError, match="pool=token"):
        miram("backbone.pool=token")


def test_the_same_seed_gives_the_same_bits():
    one, two, other = miram(), miram(), miram("seed=1")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.low_decoder.mask_token, other.low_decoder.mask_token)
    assert torch.equal(one(noise_batch(one, 2)), two(noise_batch(two, 2)))
