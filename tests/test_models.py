import pytest
import timm
import torch
from safetensors.torch import save_file

from sparsecontrast.config import compose
from sparsecontrast.errors import MissingDataError, ModelError
from sparsecontrast.methods import build_method
from sparsecontrast.models import tokens
from sparsecontrast.models.saliency import SaliencyPredictor, excluded_cells
from sparsecontrast.models.sparse_vit import build_sparse_vit
from sparsecontrast.settings import BackboneConfig


def backbone(name="vit_tiny_patch16_224", **options):
    torch.manual_seed(0)
    kwargs = {"img_size": 64, "patch_size": 8, "depth": 2, "pool": "token", "pretrained": False} | options
    return build_sparse_vit(BackboneConfig(name=name, **kwargs), 2)


def images(n=3, size=64):
    return torch.randn(n, 1, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224"])
def test_dense_equals_plain_timm(name, pool):
    model = backbone(name, pool=pool).eval()
    options = {"img_size": 64, "patch_size": 8, "depth": 2, "in_chans": 1, "num_classes": 0}
    plain = timm.create_model(name, global_pool=pool, **options).eval()
    plain.load_state_dict(model.vit.state_dict())
    x = images()
    torch.testing.assert_close(model(x), plain(x), atol=1e-5, rtol=1e-5)
    # the mixed path with every cell fine is the same function, tokens in another order
    every = torch.arange(model.num_cells).expand(3, -1)
    torch.testing.assert_close(model(x, every), plain(x), atol=1e-5, rtol=1e-5)


def test_area_mean_counts_a_coarse_token_for_its_patches():
    model = backbone(pool="avg")
    x = torch.randn(2, 1 + 4 * 3 + 13, 192, generator=torch.Generator().manual_seed(0))
    spread = torch.cat([x[:, 1:13], x[:, 13:].repeat_interleave(4, dim=1)], dim=1)
    torch.testing.assert_close(
        model._area_mean(x, model._areas(3, x.device)), spread.mean(1), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("fused", [True, False])
def test_a_coarse_token_weighs_in_the_attention_as_the_patches_it_stands_for(fused):
    model = backbone(pool="avg").eval()
    for block in model.vit.blocks:
        block.attn.fused_attn = fused
    x, kept = images(), torch.tensor([[0, 3, 7]]).expand(3, -1)
    tokens_in = model.embed(x, kept)
    repeats = model._areas(3, tokens_in.device).long()
    longhand = model.vit.norm(model.vit.blocks(tokens_in.repeat_interleave(repeats, dim=1)))
    expected = model.vit.fc_norm(longhand[:, 1:].mean(1))
    torch.testing.assert_close(model(x, kept), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("m", [0, 3, 10, 16])
def test_dropped_tokens_are_absent_inside_every_block(m):
    model = backbone().eval()
    seen = []
    for block in model.vit.blocks:
        block.attn.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        block.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    kept = tokens.top_k(torch.rand(3, 16, generator=torch.Generator().manual_seed(0)), m)
    model(images(), kept)
    assert seen == [1 + 4 * m + (16 - m)] * 4


def test_a_dropped_cell_is_seen_only_through_its_mean():
    model = backbone().eval()
    x, y = images(1), images(1)
    y[..., 0:2, 0:2] += torch.tensor([[1.0, -1.0], [-1.0, 1.0]])  # within one 2x2 pool of cell 0
    without, with_it = torch.tensor([[5, 9]]), torch.tensor([[0, 5]])
    torch.testing.assert_close(model(x, without), model(y, without), atol=1e-5, rtol=1e-5)
    assert (model(x, with_it) - model(y, with_it)).abs().max() > 1e-4


def test_coarse_token_by_brute_force():
    model = backbone().eval()
    torch.nn.init.normal_(model.coarse)
    x = images(1)
    got = model.embed(x, torch.zeros(1, 0, dtype=torch.long))[0, 1 + 6]  # cell 6: row 1, column 2
    pooled = torch.nn.functional.avg_pool2d(x[..., 16:32, 32:48], 2)
    grid = model.vit.pos_embed[0, 1:].reshape(8, 8, -1)[2:4, 4:6].mean((0, 1))
    expected = model.vit.patch_embed.proj(pooled)[0, :, 0, 0] + model.coarse[0, 0] + grid
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def focus_of(n, m):
    return torch.randn(n, m, generator=torch.Generator().manual_seed(2)).softmax(1)


def focusing(pool):
    """A backbone whose last norms are not those of a fresh one, and the tokens that its last block gave."""
    model, seen = backbone(pool=pool).eval(), []
    torch.nn.init.normal_(last_norm(model.vit).weight)
    torch.nn.init.normal_(last_norm(model.vit).bias)
    model.vit.norm.register_forward_hook(lambda _, args, out: seen.append(out))
    return model, seen


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_focus_by_brute_force_on_the_kept_cells(pool):
    model, seen = focusing(pool)
    kept, focus = torch.tensor([[0, 3, 7], [1, 6, 11], [2, 5, 15]]), focus_of(3, 3)
    plain, found = model(images(), kept), model(images(), kept, focus)
    assert found.shape == (3, 2 * model.embed_dim)
    torch.testing.assert_close(found[:, : model.embed_dim], plain)
    for row in range(3):
        fine = seen[-1][row, 1 : 1 + 4 * 3]  # cell by cell, behind CLS and before the coarse tokens
        mean = sum(focus[row, i] * fine[4 * i : 4 * i + 4].mean(0) for i in range(3))
        expected = model.vit.fc_norm(mean)
        torch.testing.assert_close(found[row, model.embed_dim :], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_focus_by_brute_force_where_nothing_is_chosen(pool):
    model, seen = focusing(pool)
    focus = focus_of(3, 16)
    plain, found = model(images()), model(images(), None, focus)
    torch.testing.assert_close(found[:, : model.embed_dim], plain)
    for row in range(3):
        mean = torch.zeros(model.embed_dim)
        for place in range(64):  # patches run row by row over the image; a cell is 2 x 2 of them
            y, x = divmod(place, 8)
            mean += focus[row, y // 2 * 4 + x // 2] / 4 * seen[-1][row, 1 + place]
        expected = model.vit.fc_norm(mean)
        torch.testing.assert_close(found[row, model.embed_dim :], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_focus_over_all_cells_is_one_function_dense_and_with_every_cell_kept(pool):
    model, _ = focusing(pool)
    focus, every = focus_of(3, 16), torch.arange(16).expand(3, -1)
    dense, sparse = model(images(), None, focus), model(images(), every, focus)
    torch.testing.assert_close(sparse, dense, atol=1e-5, rtol=1e-5)


def test_even_focus_over_all_cells_is_the_mean_over_the_area():
    model, _ = focusing("avg")
    area, focused = model(images(), None, torch.full((3, 16), 1 / 16)).chunk(2, dim=1)
    torch.testing.assert_close(focused, area, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("kept", [None, torch.tensor([[1, 2, 9]]).expand(3, -1)])
def test_the_focus_carries_a_gradient_to_every_weight(pool, kept):
    model, _ = focusing(pool)
    focus = focus_of(3, 16 if kept is None else 3).requires_grad_()
    model(images(), kept, focus)[:, model.embed_dim :].square().sum().backward()
    assert (focus.grad.abs() > 0).all()


def test_attention_equals_timm_softmax_weights():
    model = backbone(depth=2).eval()
    weights = []
    for block in model.vit.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda _, args: weights.append(args[0]))
    x = images()
    model.vit(x)
    cls = torch.stack(weights).mean((0, 2))[:, 0, 1:]
    cells = cls[:, model.positions].sum(-1)
    torch.testing.assert_close(model.attention(x), cells / cells.sum(1, keepdim=True), atol=1e-5, rtol=1e-4)


def test_attention_of_a_mean_pooled_model_is_a_distribution_that_varies():
    attention = backbone(pool="avg").eval().attention(images())
    torch.testing.assert_close(attention.sum(1), torch.ones(3))
    assert attention.std(1).min() > 0


@pytest.mark.parametrize("depth", [2, None])
def test_pretrained_file_of_another_size_and_colour(tmp_path, depth):
    rgb = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    save_file(rgb.state_dict(), tmp_path / "weights.safetensors")
    model = backbone(
        pretrained=str(tmp_path / "weights.safetensors"), patch_size=16, depth=depth, img_size=96
    )
    grey = torch.randn(1, 1, 16, 16)
    same = rgb.patch_embed.proj(grey.expand(1, 3, 16, 16))
    torch.testing.assert_close(model.vit.patch_embed.proj(grey), same, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.vit.blocks[1].mlp.fc1.weight, rgb.blocks[1].mlp.fc1.weight)
    assert model.vit.pos_embed.shape == (1, 37, 192)


def last_norm(vit):
    return vit.norm if isinstance(vit.fc_norm, torch.nn.Identity) else vit.fc_norm


def rgb_weights(folder, **options):
    """A timm model with a last norm that can be told from a fresh one, and the file of its weights."""
    rgb = timm.create_model("vit_tiny_patch16_224", **options)
    torch.nn.init.normal_(last_norm(rgb).weight)
    torch.nn.init.normal_(last_norm(rgb).bias)
    save_file(rgb.state_dict(), folder / "weights.safetensors")
    return rgb, str(folder / "weights.safetensors")


@pytest.mark.parametrize("theirs", ["token", "avg"])
@pytest.mark.parametrize("ours", ["token", "avg"])
def test_pretrained_weights_fit_whatever_the_pooling(tmp_path, theirs, ours):
    rgb, path = rgb_weights(tmp_path, global_pool=theirs)
    options = {"pretrained": path, "pool": ours, "patch_size": 16}
    model = backbone(**options, img_size=96, depth=2)
    assert len(model.vit.blocks) == 2 and model.vit.pos_embed.shape == (1, 37, 192)
    torch.testing.assert_close(last_norm(model.vit).weight, last_norm(rgb).weight)
    # at timm's own size, grey in one channel or in three is one function
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2, global_pool=ours).eval()
    plain.load_state_dict(rgb.state_dict(), strict=False)
    last_norm(plain).load_state_dict(last_norm(rgb).state_dict())
    model, grey = backbone(**options, img_size=224, depth=2).eval(), images(2, 224)
    torch.testing.assert_close(model(grey), plain(grey.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)


def test_weights_of_the_hub_are_fitted_like_those_of_a_file(tmp_path, monkeypatch):
    rgb, _ = rgb_weights(tmp_path)
    real = timm.create_model

    def offline(name, pretrained=False, **options):
        torch.rand(1)  # building draws random numbers
        return rgb if pretrained else real(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    model = backbone(pretrained=True, pool="avg")
    after = torch.rand(1)
    torch.testing.assert_close(model.vit.fc_norm.weight, rgb.norm.weight)
    assert model.vit.pos_embed.shape == (1, 65, 192)
    backbone(pretrained=False, pool="avg")
    assert torch.rand(1) == after  # the projector starts the same, wherever the backbone comes from


def test_weights_of_the_hub_without_a_network_are_a_clear_error(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingDataError, match="no network .* backbone.pretrained=FILE"):
        backbone(pretrained=True)
    with pytest.raises(ModelError, match="timm has no weights"):
        backbone("vit_base_patch16_18x2_224", pretrained=True)


def test_wrong_weights_and_names_are_clear_errors(tmp_path):
    with pytest.raises(MissingDataError, match="no such file"):
        backbone(pretrained=str(tmp_path / "none.safetensors"))
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(ModelError, match="not a whole"):
        backbone(pretrained=str(tmp_path / "torn.safetensors"))
    small = timm.create_model("vit_small_patch16_224", depth=2)
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    with pytest.raises(ModelError, match="width 192"):
        backbone(pretrained=str(tmp_path / "small.safetensors"))
    with pytest.raises(ModelError, match="timm cannot build"):
        backbone("vit_of_nowhere")


def test_scorer_is_small_and_scores_every_cell():
    scorer = SaliencyPredictor((7, 7))
    assert scorer(torch.randn(2, 1, 224, 224)).shape == (2, 49)
    assert 15_000 < sum(p.numel() for p in scorer.parameters()) < 25_000


def test_scorer_rows_are_independent():
    scorer, x = SaliencyPredictor((4, 4)), images()
    torch.testing.assert_close(scorer(x)[1:2], scorer(x[1:2]))


def test_border_and_text_cells_are_excluded_and_anatomy_is_not():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    image = 0.3 + 0.3 * torch.exp(-3 * (x**2 + y**2))
    image[:, :16] = 0  # collimation
    image[20:23, 40:42] = 1.0  # a letter's stroke
    excluded = excluded_cells(image[None, None], (4, 4)).reshape(4, 4)
    assert excluded[:, 0].all() and excluded[1, 2]
    assert excluded.sum() == 5


def test_dense_and_sparse_methods_start_from_the_same_weights():
    base = "backbone.img_size=64 backbone.patch_size=8 backbone.depth=1"
    state = torch.random.get_rng_state()
    sparse, dense = build_method(compose(base)), build_method(compose(base + " method=dense_contrast"))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sparse.shared_parameters() == dense.shared_parameters()
    for name in sparse.shared_parameters():
        assert torch.equal(sparse.state_dict()[name], dense.state_dict()[name]), name
    # the projector too, where an embedding is as wide
    narrow = build_method(compose(base + " method.focus=false"))
    for name, tensor in narrow.state_dict().items():
        assert torch.equal(tensor, dense.state_dict()[name]), name
    other = build_method(compose(base + " seed=1"))
    assert not torch.equal(other.backbone.vit.cls_token, sparse.backbone.vit.cls_token)
