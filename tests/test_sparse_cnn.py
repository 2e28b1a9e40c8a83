import copy

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn.modules.batchnorm import _BatchNorm

from sparsecontrast.config import compose
from sparsecontrast.errors import ConfigError, MethodError, MissingDataError, ModelError
from sparsecontrast.methods import build_method
from sparsecontrast.methods.method import Batch
from sparsecontrast.models import tiles, tokens
from sparsecontrast.models.sparse_cnn import SparseCNN, build_sparse_cnn
from sparsecontrast.settings import BackboneConfig

WIDTHS = {"convnext_atto": 320, "convnext_tiny": 768, "resnet18": 512, "resnet50_gn": 2048}
SMALL = ("convnext_atto", "resnet18")


def backbone(name="convnext_atto", **options):
    torch.manual_seed(0)
    told = {"img_size": 128, "tiles": 4, "halo": 0, "pretrained": False} | options
    return awake(build_sparse_cnn(BackboneConfig(name=name, **told)))


def awake(model):
    """Residual branches start (almost) closed, which would hide what they do: open them."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith((".gamma", ".bn2.weight", ".bn3.weight")):
                p.fill_(0.5)
    return model.eval()


def images(n=2, size=128, seed=1):
    return torch.randn(n, 1, size, size, generator=torch.Generator().manual_seed(seed))


def close(found, wanted, tolerance=1e-5):
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


KEPT = torch.tensor([[1, 6, 11], [0, 2, 15]])


@pytest.mark.parametrize(("name", "width"), WIDTHS.items())
def test_every_network_embeds_and_attends_without_batch_norm(name, width):
    model = backbone(name, img_size=64, tiles=2)
    assert (model.grid, model.num_cells, model.embed_dim) == ((2, 2), 4, width)
    x = images(size=64)
    sparse, dense, attention = model(x, torch.tensor([[3], [0]])), model(x), model.attention(x)
    assert sparse.shape == dense.shape == (2, width) and attention.shape == (2, 4)
    close(attention.sum(1), torch.ones(2))
    assert attention.std(1).min() > 0
    assert not [m for m in model.modules() if isinstance(m, _BatchNorm)]


@pytest.mark.parametrize("name", SMALL)
def test_dense_is_timms_own_feature_map_pooled_by_cell(name):
    model, x = backbone(name), images()
    norm = {"norm_layer": "groupnorm"} if name == "resnet18" else {}
    plain = timm.create_model(name, in_chans=1, num_classes=0, **norm).eval()
    plain.load_state_dict(model.cnn.state_dict(), strict=False)
    maps = plain.forward_features(x)  # 128 px: one position a cell
    close(model.fine_cells(x), maps.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
@pytest.mark.parametrize(("size", "count", "halo"), [(128, 4, 0), (192, 2, 0), (128, 2, 32), (128, 4, 32)])
def test_tiles_in_one_batch_equal_one_by_one(name, size, count, halo):
    model, x = backbone(name, img_size=size, tiles=count, halo=halo), images(size=size)
    every = torch.arange(count**2).expand(2, -1)
    got, side, window = model.fine_cells(x, every), size // count, model.window
    assert window >= side + halo and window % 32 == 0
    for row in range(2):
        for cell in range(count**2):
            i, j = divmod(cell, count)
            top, left = int(model.starts[i]), int(model.starts[j])
            maps = model.cnn.forward_features(x[row : row + 1, :, top : top + window, left : left + window])
            pixels = maps.repeat_interleave(32, 2).repeat_interleave(32, 3)  # each value over its 32 x 32 px
            own = pixels[..., i * side - top : (i + 1) * side - top, j * side - left : (j + 1) * side - left]
            assert own.shape[-2:] == (side, side)
            close(got[row, cell], own.mean((0, 2, 3)), 1e-4)


def test_embedding_by_brute_force():
    model, x = backbone(), images()
    coarse, fine = model.coarse_cells(x), model.fine_cells(x, KEPT)
    for row in range(2):
        cells = coarse[row].clone()
        for place, cell in enumerate(KEPT[row]):
            cells[cell] += fine[row, place]
        cells = model.norm(cells)
        close(model(x, KEPT)[row], model.score(cells).softmax(0)[:, 0] @ cells)


@pytest.mark.parametrize("name", SMALL)
def test_rows_are_independent_and_the_order_of_tiles_does_not_matter(name):
    model, x, y = backbone(name), images(), images()
    y[1] += 1
    close(model(x, KEPT)[0], model(y, KEPT)[0], 1e-6)
    close(model(x)[0], model(y)[0], 1e-6)
    assert not torch.allclose(model(x, KEPT)[1], model(y, KEPT)[1], atol=1e-3)
    close(model(x, KEPT[:, [2, 0, 1]]), model(x, KEPT))
    focus = focus_of(3)
    close(model(x, KEPT, focus)[0], model(y, KEPT, focus)[0], 1e-6)
    close(model(x, KEPT[:, [2, 0, 1]], focus[:, [2, 0, 1]]), model(x, KEPT, focus))


@pytest.mark.parametrize("name", SMALL)
def test_tiles_that_are_not_kept_are_absent(name):
    model, x, y = backbone(name), images(1), images(1)
    y[..., 32:64, 64:96] += 5 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).tile(
        16, 16
    )  # cell 6, no low frequency
    without, with_it = torch.tensor([[1, 5, 7, 10]]), torch.tensor([[1, 6]])
    close(model(x, without), model(y, without))
    assert (model(x, with_it) - model(y, with_it)).abs().max() > 1e-3
    seen, first = [], model.cnn.get_submodule(model.cnn.default_cfg["first_conv"])
    first.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    model(x, without)
    assert seen == [(4, 1, 32, 32)]


def test_the_background_is_never_invisible():
    model, x, y = backbone(), images(1), images(1)
    y[..., 32:64, 64:96] += 1  # cell 6 is brighter: seen at low resolution
    kept = torch.tensor([[0]])
    assert (model(x, kept) - model(y, kept)).abs().max() > 1e-3


def focus_of(m):
    return torch.randn(2, m, generator=torch.Generator().manual_seed(2)).softmax(1)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("kept", [KEPT, None])
@torch.no_grad()
def test_focus_by_brute_force(name, kept):
    model, x, focus = backbone(name), images(), focus_of(16 if kept is None else 3)
    plain, found, cells = model(x, kept), model(x, kept, focus), model.describe(x, kept)
    assert found.shape == (2, 2 * model.embed_dim)
    close(found[:, : model.embed_dim], plain)
    for row in range(2):
        own = range(16) if kept is None else kept[row].tolist()
        mean = sum(weight * cells[row, cell] for weight, cell in zip(focus[row], own, strict=True))
        close(found[row, model.embed_dim :], mean)


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_focus_over_all_cells_is_one_function_dense_and_with_every_cell_kept(name):
    model, x, focus = backbone(name, img_size=96, tiles=3, halo=64), images(size=96), focus_of(9)
    assert model.window == 96  # each tile sees the whole image: no border to differ by
    close(model(x, torch.arange(9).expand(2, -1), focus), model(x, None, focus), 1e-4)


@pytest.mark.parametrize("kept", [KEPT, None])
def test_the_focus_carries_a_gradient_to_every_weight(kept):
    model, focus = backbone(), focus_of(16 if kept is None else 3).requires_grad_()
    found = model(images(), kept, focus)[:, model.embed_dim :]
    (found * images(1, 32)[0, 0, :2].repeat(1, 10)).sum().backward()
    assert focus.grad is not None and (focus.grad.abs() > 0).all()


def border_error(halo, name="convnext_atto", size=256):
    model, x = backbone(name, img_size=size, halo=halo), images(1, size)
    every = torch.arange(model.num_cells)[None]
    with torch.no_grad():
        return float(tiles.relative_error(model.fine_cells(x, every), model.fine_cells(x)).mean())


def test_a_halo_buys_the_border_error_down():
    none, some, more = (border_error(halo) for halo in (0, 32, 64))
    assert more < 0.5 * some < 0.5 * none < 0.25


def test_border_error_of_a_resnet_is_bounded():
    # GroupNorm sees one window instead of the image: this stays, whatever the border
    assert border_error(64, "resnet18") < border_error(0, "resnet18") < 0.8


def test_a_halo_beyond_the_receptive_field_leaves_no_error():
    torch.manual_seed(0)
    options = {"in_chans": 1, "num_classes": 0, "depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}
    cnn = timm.create_model("convnext_atto", **options)
    nearer = awake(SparseCNN(copy.deepcopy(cnn), 640, 10, 64))
    model = awake(SparseCNN(cnn, 640, 10, 192))  # field: 180 px
    assert model.window == 448
    x, cell = images(1, 640), torch.tensor([[44]])
    close(model.fine_cells(x, cell)[:, 0], model.fine_cells(x)[:, 44])
    assert (nearer.fine_cells(x, cell)[:, 0] - model.fine_cells(x)[:, 44]).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", SMALL)
def test_bf16_is_close_to_fp32(name):
    model, x = backbone(name), images()
    choices = (KEPT, None), (None, None), (KEPT, focus_of(3)), (None, focus_of(16))
    exact = [model(x, *choice) for choice in choices]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = [model(x, *choice) for choice in choices]
    for a, b in zip(rounded, exact, strict=True):
        assert float(tiles.relative_error(a.float(), b).max()) < 0.02


@pytest.mark.parametrize("name", SMALL)
def test_pretrained_rgb_file_starts_network_and_overview(tmp_path, name):
    rgb = timm.create_model(name, num_classes=3)  # a ResNet with BatchNorm, as timm publishes it
    for p in rgb.parameters():
        torch.nn.init.normal_(p, std=0.1)
    save_file(rgb.state_dict(), tmp_path / "weights.safetensors")
    model = build_sparse_cnn(
        BackboneConfig(name, 64, pretrained=str(tmp_path / "weights.safetensors"), tiles=2)
    )
    theirs, ours = rgb.state_dict(), model.cnn.state_dict()
    stem = "conv1.weight" if name == "resnet18" else "stem.0.weight"
    close(ours.pop(stem), theirs[stem].sum(1, keepdim=True))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    overview = model.overview.state_dict()
    assert len(overview) > 20 and all(
        torch.equal(overview[key], ours[key]) for key in overview if key != stem
    )
    if name == "convnext_atto":
        assert torch.equal(model.norm.weight, rgb.head.norm.weight)
        grey = images(1, 64)
        close(
            model.fine_cells(grey).mean(1),
            rgb.forward_features(grey.expand(-1, 3, -1, -1)).mean((2, 3)),
            1e-3,
        )


def test_wrong_weights_names_and_sizes_are_clear_errors(tmp_path):
    path = str(tmp_path / "weights.safetensors")
    with pytest.raises(MissingDataError, match="no such file"):
        backbone(pretrained=path)
    (tmp_path / "weights.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(ModelError, match="not a whole"):
        backbone(pretrained=path)
    for other, says in (("resnet18", "found no stem.0.weight"), ("convnext_femto", "of another shape")):
        save_file(timm.create_model(other).state_dict(), path)
        with pytest.raises(ModelError, match=says):
            backbone(pretrained=path)
    with pytest.raises(ModelError, match="timm cannot build"):
        backbone("convnext_of_nowhere")
    for name in ("vit_tiny_patch16_224", "efficientnet_b0"):
        with pytest.raises(ModelError, match="needs a ConvNeXt or a ResNet"):
            backbone(name)
    with pytest.raises(ModelError, match="built for"):
        backbone()(images(1, 64))


def test_keep_is_a_share_of_the_tiles():
    model = backbone()
    assert [model.kept_cells(keep) for keep in (1e-3, 1 / 16, 0.25, 0.5, 1)] == [1, 1, 4, 8, 16]
    for keep in (0, -0.5, 1.5, float("nan")):
        with pytest.raises(MethodError, match="share of the tiles"):
            model.kept_cells(keep)


def method(name, *overrides):
    told = [f"backbone={name}", "backbone.img_size=64", "backbone.tiles=2", "method.projection_hidden=32"]
    return build_method(compose([*told, "method.distill_every=1", *overrides]))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("number", [1, 10])  # of 20 rounds: dense, and at the target
def test_a_training_step_reaches_network_overview_and_scorer(name, number):
    m, g = method(name), torch.Generator().manual_seed(0)
    first = torch.randn(4, 1, 64, 64, generator=g)
    second = first + 0.1 * torch.randn(4, 1, 64, 64, generator=g)
    m.start_round(number, 20)
    optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3)
    before = {n: p.clone() for n, p in m.named_parameters() if p.requires_grad}
    loss = m(Batch(first, second, torch.arange(4), g, 0))
    assert loss.shape == (4,) and torch.isfinite(loss).all()
    loss.mean().backward()
    optimizer.step()
    m.after_step()
    moved = {n for n, p in m.named_parameters() if p.requires_grad and not torch.equal(p, before[n])}
    moved = {n.removeprefix("backbone.").split(".")[0] for n in moved}
    assert moved == {"cnn", "overview", "coarse", "position", "norm", "score", "saliency", "projector"}
    assert not [n for n, p in m.named_parameters() if p.requires_grad and p.grad is None]
    assert m.encode(first, "sparse").shape == m.encode(first, "dense").shape == (4, m.embed_dim)
    assert m.embed_dim == 2 * m.backbone.embed_dim
    assert m.look(first).kept.shape == (4, 2)


def test_only_backbone_and_scorer_are_shared_and_a_seed_decides_them():
    one, same, other = (method("convnext_atto", f"seed={s}") for s in (0, 0, 1))
    names = one.shared_parameters()
    assert names and all(n.startswith(("backbone.", "saliency.")) for n in names)
    states = [m.state_dict() for m in (one, same, other)]
    assert all(states[0][n].is_floating_point() for n in names)
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    assert not torch.equal(states[0]["backbone.position"], states[2]["backbone.position"])


@pytest.mark.parametrize("name", ["convnext_atto", "convnext_tiny", "resnet18", "resnet50"])
def test_configs_are_complete_and_of_whole_strides(name):
    b = compose([f"backbone={name}"]).backbone
    assert b.tiles and b.img_size // b.tiles % tiles.STRIDE == 0
    assert compose([f"backbone={name}", "method.keep=0.0625", "evaluation.keep=0.1"]).method.keep == 0.0625


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("backbone=resnet18 backbone.img_size=100", "whole strides of 32 px; possible here: none"),
        ("backbone=resnet18 backbone.img_size=224", r"backbone\.tiles=4: .*=224 .*; possible here: 7$"),
        ("backbone=resnet18 backbone.halo=16", r"backbone\.halo=16: must be a multiple of 32"),
        ("backbone=resnet18 backbone.halo=128", r"backbone\.halo=128: .* two halos"),
        ("backbone=resnet18 backbone.tiles=1", r"backbone\.tiles=1: must be in \[2"),
        ("backbone=resnet18 backbone.tiles=null", "a CNN needs tiles"),
        ("backbone=resnet18 backbone.patch_size=16", "patch_size"),
        ("backbone=resnet18 experiment=laptop", r"backbone\.patch_size=16, backbone\.depth=2: of a ViT"),
        ("backbone=resnet18 method.keep=0.05", r"method\.keep=0\.05: must be in \[0\.0625, 1\]"),
        ("backbone=resnet18 evaluation.keep=0.01", r"number in \[0\.0625, 1\]"),
        ("backbone=vit_tiny backbone.pool=null", "a ViT needs patch_size and pool"),
        ("backbone=vit_tiny backbone.pool=max", r"backbone\.pool='max': must be one of token, avg"),
        ("backbone=vit_tiny +backbone.tiles=4", "of a ViT"),
        ("backbone=vit_tiny +backbone.halo=4", "belongs to a CNN"),
    ],
)
def test_impossible_configs_are_refused(overrides, says):
    with pytest.raises(ConfigError, match=says):
        compose(overrides)


def test_the_laptop_experiment_takes_a_cnn():
    told = "experiment=laptop backbone=resnet18 backbone.patch_size=null backbone.depth=null"
    assert compose(told).backbone.tiles == 4


def test_scatter_and_kept_agree_on_cells():
    # a kept tile must join the coarse descriptor of its own cell, whatever its rank
    model, x = backbone(), images(1)
    one = model.describe(x, torch.tensor([[9]]))
    base = model.norm(model.coarse_cells(x))
    changed = (one - base).abs().amax(2)[0] > 1e-6
    assert changed.nonzero().flatten().tolist() == [9]
    assert torch.equal(tokens.complement(torch.tensor([[9]]), 16)[0], (~changed).nonzero().flatten())
