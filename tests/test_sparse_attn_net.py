import dataclasses
import math

import pytest
import torch

from sparsecontrast.classify.settings import compose_classify
from sparsecontrast.errors import MethodError
from sparsecontrast.methods.sparse_attn_net import Labelled, SparseAttnNet, distillation
from sparsecontrast.models.reader import WordReader

SIZE = 24


def network(seed: int = 0, **changes) -> SparseAttnNet:
    config = dataclasses.replace(compose_classify().method, width=16, heads=2, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SparseAttnNet(config, 3, SIZE)


def batch(rows: int = 6, seed: int = 0) -> Labelled:
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(rows, 3, SIZE, SIZE, generator=g)
    return Labelled(images, torch.arange(rows) % 3, torch.Generator().manual_seed(seed + 1))


def test_the_loss_is_what_the_equations_say():
    """Against a computation word by word, one image at a time, with loops for the attention."""
    net, given = network(explore=0.0, dither=0.0), batch(3)
    losses = net(given)
    seen = net.look(given.images)  # without dither and exploration the same words
    for i in range(3):
        entropy = -seen.logits[i].log_softmax(0)[given.labels[i]]
        a, m = seen.attention[i].tolist(), seen.coarse[i, seen.kept[i]].softmax(0).tolist()
        divergence = sum(p * math.log(p / q) for p, q in zip(a, m, strict=True))
        assert losses[i].item() == pytest.approx(entropy.item() + divergence, abs=1e-5)


def test_the_words_read_are_the_top_of_the_map():
    net, given = network(dither=0.0), batch()
    seen = net.look(given.images)
    best = torch.sigmoid(seen.coarse).topk(net.k, dim=1).indices.sort(dim=1).values
    assert torch.equal(seen.kept, best)


def test_nothing_outside_the_words_reaches_the_verdict():
    """With the choice held, other pixels may be anything; one pixel of a word may not."""
    net, images = network(), batch().images
    kept = net.look(images).kept
    said = net.backbone(net.words(images, kept))[0]
    cover = torch.zeros(len(images), 36).scatter(1, kept, 1.0).reshape(-1, 1, 6, 6)
    cover = cover.repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = torch.where(cover.bool(), images, torch.full_like(images, 7.0))
    assert torch.equal(net.backbone(net.words(other, kept))[0], said)
    assert not torch.allclose(net.backbone(net.words(images + 0.1 * cover, kept))[0], said)


def test_gradients_go_only_where_they_should():
    net, given = network(), batch()
    entropy_only = network(distill_weight=0.0)
    entropy_only(given).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in entropy_only.saliency.parameters())
    assert all(p.grad is not None and p.grad.any() for p in entropy_only.backbone.parameters())
    seen = net.look(given.images, given.generator)
    distillation(seen.attention, seen.coarse.gather(1, seen.kept)).sum().backward()
    assert all(p.grad is None for p in net.backbone.parameters())
    assert all(p.grad is not None and p.grad.any() for p in net.saliency.parameters() if p.dim() > 1)


def test_distillation_teaches_the_map_what_was_looked_at():
    """The gradient raises the map where the reader looks more than the map says, and is 0 when they agree."""
    attention = torch.tensor([[0.7, 0.2, 0.1]])
    coarse = torch.zeros(1, 3, requires_grad=True)
    distillation(attention, coarse).sum().backward()
    assert coarse.grad is not None
    assert torch.allclose(coarse.grad, torch.full((1, 3), 1 / 3) - attention, atol=1e-6)
    agreed = attention.log().requires_grad_()
    loss = distillation(attention, agreed)
    assert loss.abs().max() < 1e-6
    assert distillation(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2)).item() == pytest.approx(math.log(2))


def test_the_order_of_the_words_does_not_matter():
    net, given = network(), batch()
    kept = net.look(given.images).kept
    order = torch.randperm(kept.shape[1], generator=torch.Generator().manual_seed(0))
    said, looked = net.backbone(net.words(given.images, kept))
    again, looked_again = net.backbone(net.words(given.images, kept[:, order]))
    assert torch.allclose(said, again, atol=1e-5)
    assert torch.allclose(looked[:, order], looked_again, atol=1e-6)


def test_but_their_places_do():
    net, given = network(), batch()
    kept = net.look(given.images).kept
    told = net.words(given.images, kept)
    moved = torch.cat([told[..., :-16], told[..., -16:].flip(1)], dim=-1)
    assert not torch.allclose(net.backbone(told)[0], net.backbone(moved)[0], atol=1e-3)


def test_the_last_block_computes_for_cls_what_the_whole_block_would():
    reader = WordReader(5, 3, 8, 1, 2, 2)
    x = torch.randn(4, 7, 8, generator=torch.Generator().manual_seed(0))
    block = reader.blocks[0]
    whole, attention = block(x)
    first, attention_first = block.read_first(x)
    assert torch.allclose(whole[:, :1], first, atol=1e-6)
    assert torch.allclose(attention, attention_first, atol=1e-6)


def test_the_attention_is_a_share_of_the_words_without_cls():
    seen = network(depth=3).look(batch().images)
    assert torch.allclose(seen.attention.sum(1), torch.ones(6)) and seen.attention.min() >= 0
    assert not seen.attention.requires_grad


@pytest.mark.parametrize("selection", ["learned", "random", "threshold"])
@pytest.mark.parametrize(("share", "patch"), [(0.15, 4), (0.15, 2), (0.15, 1), (0.5, 4), (0.03, 4), (1.0, 8)])
def test_never_more_pixels_than_the_share(selection, share, patch):
    net, given = network(selection=selection, share=share, share_floor=0.01, patch=patch), batch(2)
    for generator in (given.generator, None):
        kept = net.look(given.images, generator).kept
        pixels = torch.zeros(2, net.grid[0] * net.grid[1]).scatter(1, kept, patch**2).sum(1)
        assert (pixels == net.k * patch**2).all()  # no word twice
        assert pixels.max() <= share * SIZE**2
    assert net.pixel_share() <= share


def test_a_row_does_not_know_the_others():
    net, given = network(), batch()
    images = given.images.clone().requires_grad_()
    losses = net(given._replace(images=images))
    for i in range(len(losses)):
        (grad,) = torch.autograd.grad(losses[i], images, retain_graph=True)
        others = [j for j in range(len(losses)) if j != i]
        assert not grad[others].any() and grad[i].any()


def test_the_same_seed_gives_the_same_bits():
    def trained() -> list[torch.Tensor]:
        net = network()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        given = batch()
        for _ in range(3):
            optimizer.zero_grad()
            net(given).mean().backward()
            optimizer.step()
        return [*net.state_dict().values(), net.logits(given.images).detach()]

    assert all(torch.equal(a, b) for a, b in zip(trained(), trained(), strict=True))


def test_inference_reads_the_same_words_each_time_training_does_not():
    net, given = network(), batch()
    assert torch.equal(net.look(given.images).kept, net.look(given.images).kept)
    drawn = [net.look(given.images, given.generator).kept for _ in range(2)]
    assert not torch.equal(*drawn)


def test_fewer_words_when_k_shrinks():
    net, given = network(), batch()
    net.k = net.floor
    assert net.look(given.images).kept.shape == (6, net.floor) and net.floor < net.ceiling


def test_threshold_reads_the_darkest_in_green():
    net = network(selection="threshold", share=0.03)
    images = torch.zeros(1, 3, SIZE, SIZE)
    images[0, 1, 8:12, 12:16] = -3.0  # word (2, 3)
    images[0, 0, 0:4, 0:4] = -9.0  # dark in red alone
    assert net.look(images).kept.tolist() == [[2 * 6 + 3]]


def test_what_cannot_be_is_refused():
    with pytest.raises(MethodError, match=r"image_size=24: must be a multiple of method\.patch=5"):
        network(patch=5)
    with pytest.raises(MethodError, match=r"method\.share=0\.01: holds no word of 36"):
        network(share=0.01, share_floor=0.01)


def test_everything_that_is_trained_lies_in_what_may_leave():
    net = network()
    assert net.shared_parameters() == list(net.state_dict())


@pytest.mark.parametrize(("border", "flat"), [("replicate", True), ("zeros", False)])
def test_a_flat_picture_has_a_flat_map_unless_zeros_frame_it(border, flat):
    coarse = network(border=border).look(torch.full((2, 3, SIZE, SIZE), 0.7)).coarse
    assert torch.allclose(coarse, coarse[:, :1].expand_as(coarse), atol=1e-6) == flat
