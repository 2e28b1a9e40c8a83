import math

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsecontrast.errors import MethodError
from sparsecontrast.models import tokens
from sparsecontrast.models.pyramid import build_pyramid
from sparsecontrast.models.sparse_vit import SparseViT

LEVELS = [((14, 14), 2), ((24, 24), 3), ((32, 32), 3), ((64, 64), 4), ((24, 16), 3)]


def draw(cells, m, n=5):
    generator = torch.Generator().manual_seed(m)
    return tokens.top_k(torch.rand(n, cells, generator=generator), m)


@pytest.mark.parametrize(("grid", "levels"), LEVELS)
def test_levels_are_stacked_until_the_highest_is_small(grid, levels):
    pyramid = build_pyramid(grid, 2)
    assert len(pyramid.grids) == levels
    assert all(a == (2 * b[0], 2 * b[1]) for a, b in zip(pyramid.grids, pyramid.grids[1:], strict=False))


@pytest.mark.parametrize("m", [0, 1, 5, 20, 60, 96])
@pytest.mark.parametrize("grid", [(14, 14), (24, 16), (32, 32), (64, 64)])
def test_every_patch_is_covered_exactly_once_and_the_count_is_static(grid, m):
    pyramid = build_pyramid(grid, 2)
    m = min(m, pyramid.sizes[1])
    kept = draw(pyramid.sizes[1], m)
    coarse = pyramid.coarse(kept)
    assert (4 * m, *(c.shape[1] for c in coarse)) == pyramid.token_counts(m)
    patches_of = [torch.arange(pyramid.sizes[0])[:, None]]
    for finer in pyramid.grids[:-1]:
        patches_of.append(patches_of[-1][tokens.cell_positions(finer, 2)].flatten(1))
    for row in range(len(kept)):
        parts = [patches_of[1][kept[row]].flatten()]
        parts += [patches_of[level][c[row]].flatten() for level, c in enumerate(coarse, start=1)]
        assert torch.cat(parts).sort().values.tolist() == list(range(pyramid.sizes[0]))
    areas = pyramid.areas(m, torch.device("cpu"))
    assert len(areas) == sum(pyramid.token_counts(m)) and areas.sum() == pyramid.sizes[0]


def test_what_lies_above_a_kept_cell_is_opened_and_then_its_neighbours():
    pyramid = build_pyramid((32, 32), 2)  # 16 x 16 cells under 8 x 8
    kept = torch.tensor([[0, 1, 16, 17]])  # the four cells of the first one above
    opened = set(range(64)) - set(pyramid.coarse(kept)[1][0].tolist())
    assert 0 in opened and len(opened) == 4
    assert opened <= {0, 1, 8, 9}


@pytest.mark.parametrize(("keep", "m"), [(1.0, 49), (0.25, 1), (121 / 196, 24), (100 / 196, 17)])
def test_kept_cells_meet_the_token_budget(keep, m):
    assert build_pyramid((14, 14), 2).kept_cells(keep) == m


@pytest.mark.parametrize("grid", [(14, 14), (24, 24), (32, 32)])
def test_no_other_number_of_kept_cells_is_nearer_to_the_budget(grid):
    pyramid = build_pyramid(grid, 2)
    for keep in (0.26, 0.3, 0.45, 0.77, 0.99):
        got = abs(sum(pyramid.token_counts(pyramid.kept_cells(keep))) - keep * pyramid.sizes[0])
        assert got == min(
            abs(sum(pyramid.token_counts(m)) - keep * pyramid.sizes[0])
            for m in range(1, pyramid.sizes[1] + 1)
        )


@pytest.mark.parametrize(
    ("grid", "keep"), [((14, 14), 0.2), ((14, 14), 1.01), ((32, 32), 0.06), ((14, 14), -1)]
)
def test_impossible_budget_is_refused(grid, keep):
    with pytest.raises(MethodError, match="keep"):
        build_pyramid(grid, 2).kept_cells(keep)


def test_tokens_grow_slowly_with_resolution():
    fewest = [build_pyramid((side, side), 2).sizes[-1] for side in (14, 24, 32, 64)]
    assert fewest == [49, 36, 64, 64]


def test_three_levels_of_one_image_by_brute_force():
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=96,
        patch_size=4,
        in_chans=1,
        num_classes=0,
        depth=1,
        global_pool="avg",
    )
    model = SparseViT(vit, 2).eval()
    torch.nn.init.normal_(model.coarse)
    assert model.pyramid.grids == ((24, 24), (12, 12), (6, 6))
    x = torch.randn(1, 1, 96, 96, generator=torch.Generator().manual_seed(1))
    kept = torch.tensor([[13, 40]])
    got = model.embed(x, kept)[0, vit.num_prefix_tokens :]
    places = vit.pos_embed[0, 1:].reshape(24, 24, -1)
    expected = []
    for cell in kept[0].tolist():
        for i in range(4):
            expected.append(token(model, x, places, 1, 2 * (cell // 12) + i // 2, 2 * (cell % 12) + i % 2))
    for level, chosen in enumerate(model.pyramid.coarse(kept), start=1):
        columns = model.pyramid.grids[level][1]
        expected += [token(model, x, places, 2**level, c // columns, c % columns) for c in chosen[0].tolist()]
    torch.testing.assert_close(got, torch.stack(expected), atol=1e-5, rtol=1e-5)
    every = torch.arange(144)[None]
    torch.testing.assert_close(model(x, every), model(x), atol=1e-5, rtol=1e-5)


class NothingOnTheCpu(TorchDispatchMode):
    """Refuse every operation that makes a tensor on the CPU: a GPU would wait for its copy."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(found) if isinstance(t, torch.Tensor)]
        assert all(t.device.type == "meta" for t in made), func
        return found


def test_a_pass_makes_no_table_on_the_cpu_and_the_tables_are_no_weights(monkeypatch):
    # the device of shapes alone stands in for a GPU; it knows no autocast
    monkeypatch.setattr("sparsecontrast.models.sparse_vit._attention_dtype", lambda x: x.dtype)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=96, patch_size=4, in_chans=1, num_classes=0, depth=1
    )
    model = SparseViT(vit, 2).to("meta")
    assert not [name for name in model.state_dict() if "inside" in name or "positions" in name]
    assert [name for name, _ in model.named_buffers()] == ["pyramid.inside_0", "pyramid.inside_1"]
    x = torch.empty(2, 1, 96, 96, device="meta")
    kept = torch.empty(2, 3, dtype=torch.long, device="meta")
    with NothingOnTheCpu():
        assert model(x, kept).shape == (2, 192)
        assert model(x, None).shape == (2, 192)
        assert model.local(x, kept).shape == (2, 12, 192)
        assert model.attention(x).shape == (2, 144)


def token(model, x, places, factor, row, column):
    """One token: its square of the image at this scale, embedded as timm embeds a patch."""
    side = 4 * factor
    square = x[..., row * side : (row + 1) * side, column * side : (column + 1) * side]
    pixels = torch.nn.functional.avg_pool2d(square, factor)
    place = places[row * factor : (row + 1) * factor, column * factor : (column + 1) * factor].mean((0, 1))
    level = int(math.log2(factor))
    extra = model.coarse[0, level - 1] if level else 0
    return model.vit.patch_embed.proj(pixels)[0, :, 0, 0] + place + extra
