import dataclasses
import math

import pytest
import torch

from sparsecontrast.config import compose
from sparsecontrast.errors import MethodError
from sparsecontrast.methods import build_method
from sparsecontrast.methods.method import SHARED, Batch

VIT = ["backbone.img_size=64", "backbone.patch_size=8", "backbone.depth=1"]
CNN = ["backbone=convnext_atto", "backbone.img_size=96", "backbone.tiles=3"]
KINDS = pytest.mark.parametrize("kind", [VIT, CNN], ids=["vit", "cnn"])


def method(kind, *words, keep=0.4):
    told = ["method=patch_contrast", "method.projection_hidden=16", "method.projection_dim=8"]
    m = build_method(compose([*told, f"method.keep={keep}", *kind, *words]))
    m.start_round(10, 20)
    return m


def shifted(m, n=3, seed=0, steps=None):
    """Views of noise that show the same place whole cells apart."""
    g = torch.Generator().manual_seed(seed)
    size, cell = m.backbone.img_size, m.cell_size
    canvas = torch.randn(n, 1, size + cell, size + cell, generator=g)
    corners = torch.randint(0, 2, (2, n, 2), generator=g) if steps is None else torch.tensor(steps)
    views = [
        torch.stack([x[:, r * cell : r * cell + size, c * cell : c * cell + size]
                     for x, (r, c) in zip(canvas, corner.tolist(), strict=True)])
        for corner in corners
    ]  # fmt: skip
    return Batch(views[0], views[1], torch.arange(n), g, 0, corners[0] - corners[1])


@KINDS
def test_loss_is_one_finite_value_a_row_near_chance_and_knows_its_row_alone(kind):
    m = method(kind, "method.explore=0", "method.surprise_weight=0")
    batch = shifted(m)
    loss = m(batch)
    assert loss.shape == (3,) and torch.isfinite(loss).all() and m.per_sample
    assert 0 < loss.mean() < 2 * m.metrics()["chance_loss"]
    for i in range(3):
        alone = Batch(*(x[i : i + 1] for x in (batch.first, batch.second, batch.patients)),
                      batch.generator, 0, batch.shift[i : i + 1])  # fmt: skip
        torch.testing.assert_close(m(alone), loss[i : i + 1], atol=1e-5, rtol=1e-5)


@KINDS
def test_a_token_shows_the_same_place_in_both_views(kind):
    m = method(kind)
    seen = []
    run = m.backbone.local
    m.backbone.local = lambda images, cells, dense: seen.append((images, cells)) or run(images, cells, dense)
    batch = shifted(m, 4, steps=[[[1, 1], [0, 0], [1, 0], [0, 1]], [[0, 0], [1, 1], [1, 1], [0, 1]]])
    m(batch)
    (first, here), (second, there) = seen
    cell, columns = m.cell_size, m.backbone.grid[1]
    assert not torch.equal(here, there)
    for row in range(4):
        for a, b in zip(here[row].tolist(), there[row].tolist(), strict=True):
            parts = [
                x[row, 0, i // columns * cell :, i % columns * cell :][:cell, :cell]
                for x, i in ((first, a), (second, b))
            ]
            assert torch.equal(*parts)


@pytest.mark.parametrize(("keep", "tokens"), [(0.3, 4), (1.0, 36)])
def test_as_many_tokens_as_both_views_keep(keep, tokens):
    """At 1 the views are computed dense and compared where any two of them overlap: 3 x 3 of 4 x 4 cells."""
    m = method(VIT, keep=keep)
    m(shifted(m))
    assert m.metrics()["chance_loss"] == pytest.approx(math.log(tokens))


@KINDS
def test_views_pass_one_after_the_other_and_choice_gives_no_gradient(kind):
    m = method(kind, "method.surprise_weight=0")
    sizes = []
    run = m.backbone.local
    m.backbone.local = lambda images, cells, dense: sizes.append(len(images)) or run(images, cells, dense)
    m(shifted(m)).sum().backward()
    assert sizes == [3, 3]
    assert all(p.grad is None for p in m.saliency.parameters())
    m = method(kind)
    m(shifted(m)).sum().backward()
    assert all(p.grad is not None for p in m.saliency.parameters())


def test_embedding_and_shared_names_are_those_of_sparse_contrast():
    m = method(VIT)
    other = build_method(compose([*VIT, "method.keep=0.4"]))
    assert m.shared_parameters() == other.shared_parameters()
    assert all(name.startswith(SHARED) for name in m.shared_parameters())
    other.load_state_dict({n: m.state_dict()[n] for n in m.shared_parameters()}, strict=False)
    images = shifted(m).first
    assert torch.equal(m.encode(images, "sparse"), other.encode(images, "sparse"))
    assert m.embed_dim == other.embed_dim == 2 * 192


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("selection=attention", "selection=attention"),
        ("method.same_patient=true", "same_patient"),
        ("backbone.pool=token", "use avg"),
    ],
)
def test_what_couples_rows_or_trains_nothing_is_refused(words, says):
    with pytest.raises(MethodError, match=says):
        method(VIT, words)


def test_batch_norm_and_views_of_unknown_geometry_are_refused():
    m = method(VIT)
    m.backbone.vit.blocks[0].norm1 = torch.nn.BatchNorm1d(192)
    with pytest.raises(MethodError, match="BatchNorm"):
        type(m)(m.config, m.backbone)
    m = method(VIT)
    with pytest.raises(MethodError, match="known geometry"):
        m(dataclasses.replace(shifted(m), shift=None))


def test_a_step_of_the_trainer_draws_the_views_it_needs():
    from sparsecontrast.trainer import LocalTrainer

    words = ["method=patch_contrast", *VIT, "train.batch_size=4", "method.keep=0.4"]
    config = compose(words)
    images = torch.randint(0, 255, (8, 64, 64), generator=torch.Generator().manual_seed(0))
    result = LocalTrainer(build_method(config), config, "a").run(
        images.to(torch.uint8).numpy(), torch.arange(8).numpy(), 1, 2
    )
    assert result.steps == 2 and math.isfinite(result.metrics["loss"])
