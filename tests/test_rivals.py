import math

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed

from benchmarks.rivals import blocks, evit, low_resolution, tome
from benchmarks.rivals.dynamic_vit import DynamicViT
from benchmarks.rivals.masked import masked
from benchmarks.rivals.random_drop import random_drop, random_patches
from sparsecontrast.models import tokens
from sparsecontrast.models.sparse_vit import SparseViT

POOLS = ["avg", "token"]
PATCHES = 64


def small(pool="avg", depth=12, fused=True):
    """64 patches, 32 wide; every weight away from its special start, so that nothing is equal by luck."""
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, patch_size=8, in_chans=1, num_classes=0,
        embed_dim=32, num_heads=2, depth=depth, global_pool=pool,
    )  # fmt: skip
    with torch.no_grad():
        for p in vit.parameters():
            p.add_(0.1 * torch.randn_like(p))
    for block in vit.blocks:
        block.attn.fused_attn = fused
    return vit.eval()


def pictures(n=3, seed=0):
    return torch.randn(n, 1, 64, 64, generator=torch.Generator().manual_seed(seed))


def lengths(vit, call):
    """Tokens that the MLP of each block sees."""
    seen = []
    hooks = [
        b.norm2.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1])) for b in vit.blocks
    ]
    call()
    for hook in hooks:
        hook.remove()
    return seen


def all_patches(n=3):
    return torch.arange(PATCHES).expand(n, -1)


DENSE = {
    "evit": lambda vit, x: evit.evit(vit, x, 1.0),
    "dynamic_vit": lambda vit, x: DynamicViT(vit, 1.0).eval()(x),
    "tome": lambda vit, x: tome.tome(vit, x, 0),
    "random_drop": lambda vit, x: random_drop(vit, x, all_patches(len(x))),
    "random_drop, none": lambda vit, x: random_drop(vit, x, None),
    "masked": lambda vit, x: masked(vit, x, all_patches(len(x))),
    "low_resolution": lambda vit, x: low_resolution.low_resolution(low_resolution.at_size(vit, 64), x, 64),
}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("rival", DENSE)
def test_nothing_dropped_is_timms_own_forward(rival, pool):
    vit, x = small(pool, depth=4), pictures()
    torch.testing.assert_close(DENSE[rival](vit, x), vit(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_a_block_in_two_halves_is_timms_block(fused):
    block = small(depth=1, fused=fused).blocks[0]
    x = torch.randn(2, 9, 32)
    y, q, k = blocks.attend(block, x)
    torch.testing.assert_close(blocks.feed_forward(block, y), block(x), atol=1e-5, rtol=1e-5)
    assert q.shape == k.shape == (2, 2, 9, 16)


def test_a_key_bias_is_the_same_fused_and_explicit():
    x, bias = torch.randn(2, 9, 32), torch.randn(2, 9)
    both = [blocks.attend(small(depth=1, fused=f).blocks[0], x, bias)[0] for f in (True, False)]
    torch.testing.assert_close(both[0], both[1], atol=1e-5, rtol=1e-5)


def test_models_that_no_paper_has_are_refused():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, reg_tokens=2, in_chans=1)
    with pytest.raises(ValueError, match="CLS"):
        blocks.start(vit, torch.zeros(1, 1, 32, 32))


def test_evit_keeps_as_many_tokens_as_the_paper():
    vit = small()
    # 64 -> ceil(.7 * 64) = 45, fused 46 -> 33, fused 34 -> 24, fused 25; and CLS
    expected = [65] * 3 + [47] * 3 + [35] * 3 + [26] * 3
    assert lengths(vit, lambda: evit.evit(vit, pictures(), 0.7)) == expected
    assert lengths(vit, lambda: evit.evit(vit, pictures(), 0.5, (3,))) == [65] * 3 + [34] * 9
    assert evit.stage_rate(0.343, 3) == pytest.approx(0.7) and evit.stage_rate(0.5, 1) == 0.5


def test_stages_are_the_papers_at_depth_12_and_quarters_at_any_other():
    found = {depth: blocks.quarters(depth) for depth in (1, 2, 4, 8, 12)}
    assert found == {1: (0,), 2: (0, 1), 4: (1, 2, 3), 8: (2, 4, 6), 12: (3, 6, 9)}


@pytest.mark.parametrize("depth", [4, 12])
def test_stages_leave_the_share_that_was_asked_for_at_any_depth(depth):
    """CLS and a fused token come on top, and each of three stages rounds up: at most five more."""
    vit, rate, a, b, c = small(depth=depth), evit.stage_rate(0.25, 3), *blocks.quarters(depth)
    seen = lengths(vit, lambda: evit.evit(vit, pictures(), rate))
    # 64 -> ceil(.63 * 64) = 41, fused 42 -> 27, fused 28 -> 18, fused 19; and CLS
    assert seen == [65] * a + [43] * (b - a) + [29] * (c - b) + [20] * (depth - c)
    assert 0.25 * PATCHES <= seen[-1] - 2 <= 0.25 * PATCHES + 3
    model = DynamicViT(small(depth=depth), rate).eval()
    seen = lengths(model.vit, lambda: model(pictures()))
    assert seen == [65] * a + [1 + 40] * (b - a) + [1 + 25] * (c - b) + [1 + 16] * (depth - c)


@pytest.mark.parametrize("layers", [(3, 6, 9), (4,), (-1,)])
def test_a_stage_beyond_the_depth_is_refused(layers):
    vit = small(depth=4)
    with pytest.raises(ValueError, match="of 4 blocks"):
        evit.evit(vit, pictures(), 0.7, layers)
    with pytest.raises(ValueError, match="of 4 blocks"):
        DynamicViT(vit, 0.7, layers)


@pytest.mark.parametrize("pool", POOLS)
def test_evit_keeps_the_most_attended_and_fuses_the_others(pool):
    vit = small(pool)
    attn, x = vit.blocks[0].attn, torch.randn(2, 1 + PATCHES, 32)
    _, q, k = blocks.attend(vit.blocks[0], x)
    found = evit.query_attention(q, k, pool == "token", 1)
    query = q[:, :, 0] if pool == "token" else q.mean(2)
    by_hand = torch.stack(
        [
            torch.stack([(k[b, h] @ query[b, h] * attn.scale).softmax(0) for h in range(2)]).mean(0)
            for b in range(2)
        ]
    )
    torch.testing.assert_close(found, by_hand[:, 1:])
    patches = x[:, 1:]
    out = evit.drop_and_fuse(patches, found, 0.25)
    for b in range(2):
        order = found[b].argsort(descending=True)
        torch.testing.assert_close(out[b, :16], patches[b, order[:16].sort().values])
        rest = order[16:]
        torch.testing.assert_close(out[b, 16], (found[b, rest, None] * patches[b, rest]).sum(0))


def test_dynamic_vit_keeps_as_many_tokens_as_the_paper():
    model = DynamicViT(small(), 0.7).eval()
    expected = [65] * 3 + [1 + int(0.7 * 64)] * 3 + [1 + int(0.49 * 64)] * 3 + [1 + int(0.343 * 64)] * 3
    assert lengths(model.vit, lambda: model(pictures())) == expected
    model.train()
    assert lengths(model.vit, lambda: model(pictures(), torch.Generator().manual_seed(0))) == expected


def test_dynamic_vit_drops_what_its_module_says_and_gates_by_one():
    model, x = DynamicViT(small(), 0.5, (3,)), torch.randn(2, PATCHES, 32)
    probability = model.predictors[0](x)[..., 0]
    model.eval()
    kept = tokens.gather(x, tokens.top_k(probability, 32))
    assert torch.equal(model._drop(x, 0, 32, None), kept)
    model.train()
    torch.testing.assert_close(model._drop(x, 0, 32, None), kept)
    noisy = [model._drop(x, 0, 32, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(noisy[0], noisy[1]) and not torch.equal(noisy[0], noisy[2])


def test_tome_merges_r_tokens_in_each_block():
    vit = small()
    assert lengths(vit, lambda: tome.tome(vit, pictures(), 4)) == [65 - 4 * n for n in range(1, 13)]
    assert tome.merged_per_block(vit, 0.25) == 4


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("count", [8, 9])
def test_tome_matches_as_brute_force_does(prefix, count):
    g = torch.Generator().manual_seed(count)
    metric, r = torch.randn(2, count, 5, generator=g), 3
    stay, source, target = tome.bipartite_soft_matching(metric, r, prefix)
    for b in range(2):
        a, c = list(range(0, count, 2)), list(range(1, count, 2))
        edges = []
        for i, place in enumerate(a):
            if prefix and place == 0:
                continue
            cosines = [
                float(torch.cosine_similarity(metric[b, place], metric[b, other], dim=0)) for other in c
            ]
            edges.append((max(cosines), i, cosines.index(max(cosines))))
        best = sorted(edges, reverse=True)[:r]
        assert [(i, j) for _, i, j in best] == list(zip(source[b].tolist(), target[b].tolist(), strict=True))
        assert stay[b].tolist() == sorted(set(range(len(a))) - {i for _, i, _ in best})
        assert not prefix or stay[b, 0] == 0


def test_tome_never_merges_more_than_there_is():
    stay, source, _ = tome.bipartite_soft_matching(torch.randn(1, 7, 3), 99, 1)
    assert source.shape == (1, 3) and stay.tolist() == [[0]]


def test_tome_conserves_what_the_tokens_stand_for():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 4, generator=g)
    size = torch.randint(1, 5, (2, 9, 1), generator=g).float()
    edges = tome.bipartite_soft_matching(torch.randn(2, 9, 4, generator=g), 3, 1)
    y, merged = tome.merge(x, size, *edges)
    assert y.shape == (2, 6, 4) and merged.shape == (2, 6, 1)
    torch.testing.assert_close((y * merged).sum(1), (x * size).sum(1))
    assert torch.equal(merged.sum(1), size.sum(1))
    assert torch.equal(y[:, 0], x[:, 0])  # CLS stays in front, itself


def test_tome_of_equal_tokens_changes_nothing():
    """Proportional attention and size-weighted pooling: merged copies count as what they stand for."""
    vit = small(depth=3)
    with torch.no_grad():
        vit.pos_embed.zero_()
    x = torch.randn(2, 1, 8, 8).repeat(1, 1, 8, 8)
    torch.testing.assert_close(tome.tome(vit, x, 6), vit(x), atol=1e-4, rtol=1e-4)


def test_random_patches_are_even_without_repeats_and_follow_the_seed():
    drawn = random_patches(4000, 16, 0.25, torch.Generator().manual_seed(0))
    assert drawn.shape == (4000, 4)
    assert all(len(set(row)) == 4 and row == sorted(row) for row in drawn[:50].tolist())
    share = drawn.flatten().bincount(minlength=16) / 4000
    assert (share - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 4000)
    assert torch.equal(drawn, random_patches(4000, 16, 0.25, torch.Generator().manual_seed(0)))
    assert not torch.equal(drawn, random_patches(4000, 16, 0.25, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("pool", POOLS)
def test_pixels_of_dropped_patches_do_not_matter_and_of_kept_ones_do(pool):
    vit, x = small(pool, depth=2), pictures(1)
    kept = torch.tensor([[0, 9, 40]])
    with torch.no_grad():
        plain = random_drop(vit, x, kept)
        for row, same in ((1, True), (0, False)):  # patch (row, 1): number 1 or 9
            changed = x.clone()
            changed[..., 8 * (1 - row) : 8 * (2 - row), 8:16] += 5
            assert torch.equal(random_drop(vit, changed, kept), plain) == same


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("pool", POOLS)
def test_masked_gives_what_dropping_gives_at_the_dense_cost(pool, fused):
    vit, x = small(pool, depth=3, fused=fused), pictures()
    kept = random_patches(3, PATCHES, 0.3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(masked(vit, x, kept), random_drop(vit, x, kept), atol=1e-5, rtol=1e-5)
    assert lengths(vit, lambda: masked(vit, x, kept)) == [65] * 3
    assert lengths(vit, lambda: random_drop(vit, x, kept)) == [20] * 3


def test_low_resolution_is_timms_model_of_that_size():
    vit, x = small(depth=2), pictures()
    lower = low_resolution.at_size(vit, 32)
    prefix_and_places = resample_abs_pos_embed(
        vit.pos_embed, new_size=(4, 4), old_size=(8, 8), num_prefix_tokens=1
    )
    assert torch.equal(lower.pos_embed, prefix_and_places) and vit.pos_embed.shape[1] == 65
    assert lengths(lower, lambda: low_resolution.low_resolution(lower, x, 32)) == [17, 17]
    assert [low_resolution.equal_cost_size(224, 16, k) for k in (1, 0.5, 0.35, 0.25, 1e-4)] == [
        224,
        160,
        128,
        112,
        16,
    ]


def test_all_coarse_is_one_token_a_cell():
    sparse = SparseViT(small(depth=2), 2).eval()
    assert lengths(sparse.vit, lambda: low_resolution.all_coarse(sparse, pictures())) == [17, 17]


def test_gradients_reach_every_parameter():
    g = torch.Generator().manual_seed(0)
    kept = random_patches(3, PATCHES, 0.5, g)
    calls = {
        "evit": lambda vit: evit.evit(vit, pictures(), 0.7),
        "tome": lambda vit: tome.tome(vit, pictures(), 2),
        "random_drop": lambda vit: random_drop(vit, pictures(), kept),
        "masked": lambda vit: masked(vit, pictures(), kept),
    }
    for name, call in calls.items():
        vit = small().train()
        call(vit).square().sum().backward()
        assert not [n for n, p in vit.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0], (
            name
        )
    model = DynamicViT(small(), 0.7).train()
    model(pictures(), g).square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    coarse = SparseViT(small(), 2)
    low_resolution.all_coarse(coarse, pictures()).square().sum().backward()
    assert coarse.coarse.grad is not None and coarse.coarse.grad.abs().sum() > 0
