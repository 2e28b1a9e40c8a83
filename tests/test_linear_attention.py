"""Three linear attentions: each nears softmax attention, couples no rows, and stays finite in bf16."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsecontrast.coupling import coupling, noise_batch
from sparsecontrast.errors import ModelError
from sparsecontrast.models.linear_attention import ATTENTIONS, build_attention
from sparsecontrast.models.linformer import Linformer, linformer_attention
from sparsecontrast.models.nystromformer import Nystromformer, nystrom_attention, pseudo_inverse
from sparsecontrast.models.performer import orthogonal_directions, performer_attention
from sparsecontrast.models.segments import segment_matrix
from sparsecontrast.row_gradients import RowGradients
from tests.private import Tiny

NAMES = list(ATTENTIONS)
LINEAR = NAMES[1:]


def heads(n, d=8, b=2, h=2, seed=0, dtype=torch.float64, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(b, h, n, d, generator=g, dtype=torch.float64).to(dtype) for _ in range(3)]


def smooth(n, seed=0):
    """Tokens whose neighbours are alike, as those of a picture are."""
    line = torch.linspace(0, 1, n, dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    waves = torch.stack([(line * (3 + 2 * i) + i).sin() for i in range(8)], dim=1)
    return [0.7 * waves @ torch.randn(2, 2, 8, 8, generator=g, dtype=torch.float64) for _ in range(3)]


def error(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def features(count, d=8, h=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.stack([orthogonal_directions(count, d, g) for _ in range(h)])


def make(name, n=10, landmarks=4, dim=8, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return build_attention(name, dim, 2, n, landmarks).to(dtype)


def test_linformer_is_softmax_at_as_many_mixtures_as_tokens_and_nears_it_before():
    q, k, v = smooth(96)
    wanted = F.scaled_dot_product_attention(q, k, v)
    told = [error(linformer_attention(q, k, v, segment_matrix(96, m).double()), wanted) for m in (6, 24, 96)]
    assert told[0] > 2 * told[1] > 0 and told[2] < 1e-12, told


def test_nystrom_is_softmax_at_as_many_landmarks_as_tokens_and_nears_it_before():
    q, k, v = smooth(96)
    wanted = F.scaled_dot_product_attention(q, k, v)
    told = [error(nystrom_attention(q, k, v, m, iterations=12), wanted) for m in (4, 8, 24, 96)]
    assert told[0] > 2 * told[1] > 4 * told[2] and told[3] < 1e-3, told
    assert error(nystrom_attention(q, k, v, 96, iterations=40), wanted) < 1e-6


def test_nystrom_gets_better_with_iterations():
    q, k, v = heads(24)
    wanted = F.scaled_dot_product_attention(q, k, v)
    told = [error(nystrom_attention(q, k, v, 24, iterations=i), wanted) for i in (1, 3, 6, 30)]
    assert told == sorted(told, reverse=True) and told[2] < 0.2 and told[3] < 1e-8, told


def test_the_pseudo_inverse_is_one_and_small_singular_values_do_not_blow_up():
    a = (
        3 * torch.randn(2, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ).softmax(-1)
    z = pseudo_inverse(a, 40)
    torch.testing.assert_close(z, torch.linalg.pinv(a), rtol=1e-6, atol=1e-6)
    alike = torch.full((1, 9, 9), 1 / 9)  # of rank one
    torch.testing.assert_close(pseudo_inverse(alike, 6), alike)


def test_performers_error_falls_with_the_square_root_of_the_features():
    q, k, v = heads(32, scale=0.3)
    wanted = F.scaled_dot_product_attention(q, k, v)

    def mean_error(count):
        seeds = [features(count, seed=s) for s in range(24)]
        return sum(error(performer_attention(q, k, v, w), wanted) for w in seeds) / 24

    told = [mean_error(count) for count in (32, 128, 512, 2048)]
    falls = [a / b for a, b in zip(told, told[1:], strict=False)]
    assert all(1.6 < fall < 2.5 for fall in falls) and told[-1] < 0.02, (told, falls)


def test_performer_is_the_ratio_of_positive_features():
    """Equation 5 and lemma 1 as they stand, without maxima."""
    q, k, v = heads(7)
    w = features(16).double()

    def phi(x):
        x = x * x.shape[-1] ** -0.25
        return (x @ w.mT - x.square().sum(-1, keepdim=True) / 2).exp()

    weights = phi(q) @ phi(k).mT
    wanted = weights / weights.sum(-1, keepdim=True) @ v
    torch.testing.assert_close(performer_attention(q, k, v, w), wanted)


def test_directions_are_orthogonal_in_blocks_with_gaussian_lengths_and_of_their_seed():
    w = orthogonal_directions(20, 8, torch.Generator().manual_seed(0))
    unit = F.normalize(w, dim=1)
    for block in unit.split(8):
        torch.testing.assert_close(block @ block.T, torch.eye(len(block)), atol=1e-5, rtol=0)
    many = orthogonal_directions(8000, 8, torch.Generator().manual_seed(1))
    torch.testing.assert_close(many.T @ many / 8000, torch.eye(8), atol=0.06, rtol=0)
    assert 7.7 < float(many.square().sum(1).mean()) < 8.3 and 3.0 < float(many.square().sum(1).std()) < 5.0
    again, other = (orthogonal_directions(20, 8, torch.Generator().manual_seed(s)) for s in (0, 1))
    assert torch.equal(w, again) and not torch.equal(w, other)


def test_linformer_mixes_tokens_before_their_keys_to_the_same_effect():
    torch.manual_seed(0)
    own = Linformer(8, 2, 10, 4).double()
    nn.init.normal_(own.mix.weight)
    nn.init.zeros_(own.kv.bias)
    x = torch.randn(3, 10, 8, dtype=torch.float64)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (own.q(x), *own.kv(x).chunk(2, -1)))
    wanted = own.out(linformer_attention(q, k, v, own.mix.weight).transpose(1, 2).flatten(2))
    torch.testing.assert_close(own(x), wanted)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [10, 1])
def test_no_row_reaches_another(name, n):
    own = make(name, n)
    x = torch.randn(3, n, 8)
    x[2] = 3 * x[1]  # the row of the largest norms, which must not scale the others
    x.requires_grad_()
    y = own(x)
    for row in range(3):
        (found,) = torch.autograd.grad(y[row].square().sum(), x, retain_graph=True)
        assert found[row].abs().max() > 0
        assert all(torch.equal(found[other], torch.zeros(n, 8)) for other in range(3) if other != row)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_computed_alike_in_any_company(name):
    own, x = make(name, dtype=torch.float64), torch.randn(4, 10, 8, dtype=torch.float64)
    x[3] *= 30
    torch.testing.assert_close(own(x)[:1], own(x[:1]), atol=1e-12, rtol=1e-12)
    assert own(x[:0]).shape == (0, 10, 8)


class Decoder(Tiny):
    """A method whose tokens are the rows of an image."""

    def __init__(self, name):
        super().__init__()
        torch.manual_seed(0)
        self.attention = build_attention(name, 8, 2, 8, 3)

    def forward(self, batch):
        return (self.attention(batch.first[:, 0]) - batch.second[:, 0]).square().mean(
            (1, 2)
        ) + super().forward(batch)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_has_its_gradient_of_each_row(name):
    method = Decoder(name)
    assert coupling(method, noise_batch(method, 3)) == 0
    rows = RowGradients(method)
    reached = rows.verify(partial(noise_batch, method, 3))
    rows.cleanup()
    assert {n for n, _ in method.named_parameters() if n.startswith("attention")} <= reached


def test_the_convolution_of_the_values_has_its_gradient_of_each_row_too():
    method = Decoder("nystromformer")
    method.attention.attention = Nystromformer(8, 2, 3, kernel=5)
    rows = RowGradients(method)
    assert "attention.attention.residual.weight" in rows.verify(partial(noise_batch, method, 3))
    rows.cleanup()


def test_the_convolution_of_the_values_is_along_the_tokens_of_each_head():
    torch.manual_seed(0)
    own, x = Nystromformer(8, 2, 3, kernel=5), torch.randn(2, 9, 8)
    with torch.no_grad():
        own.out.weight.copy_(torch.eye(8))
        plain = Nystromformer(8, 2, 3)
        plain.load_state_dict(own.state_dict(), strict=False)
        values = own.qkv(x)[..., 16:]
        added = own(x) - plain(x)
        for head in range(2):
            lines = values[..., 4 * head : 4 * head + 4].mT.reshape(-1, 1, 9)
            wanted = F.conv1d(lines, own.residual.weight[head, :, :, 0][None], padding=2).view(2, 4, 9).mT
            torch.testing.assert_close(added[..., 4 * head : 4 * head + 4], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_right(name):
    own = make(name, n=7, landmarks=3, dtype=torch.float64)
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    named = list(own.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: own(x), (x, *named), fast_mode=True)
    if name == "nystromformer":
        assert torch.autograd.gradcheck(own, (x,))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1.0, 4.0])
def test_bf16_stays_near_float32(name, size):
    own = make(name, n=50, landmarks=16, dim=32)
    with torch.no_grad():
        named = dict(own.named_parameters())
        for key in ("attention.qkv.weight", "attention.q.weight", "attention.kv.weight"):
            if key in named:
                named[key].mul_(size)
    x = torch.randn(3, 50, 32, generator=torch.Generator().manual_seed(0))
    results = []
    for on in (False, True):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            y = own(given)
        y.float().square().sum().backward()
        results.append((y.detach().float(), given.grad))
    (wanted, slope), (found, its) = results
    assert found.isfinite().all() and its.isfinite().all()
    assert error(found, wanted) < 0.05 and error(its, slope) < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_huge_logits_stay_finite(name):
    own, x = make(name, n=20), 1e3 * torch.randn(2, 20, 8)
    for on in (False, True):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            y = own(given)
        y.float().sum().backward()
        assert y.isfinite().all() and given.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_gives_the_same_bits(name):
    x = torch.randn(2, 10, 8)
    assert torch.equal(make(name)(x), make(name)(x))
    assert not torch.equal(make(name)(x), make(name, seed=1)(x))


def test_directions_are_state_and_follow_their_own_seed():
    first, second = (build_attention("performer", 8, 2, 10, 4, seed=s) for s in (0, 1))
    assert not torch.equal(first.attention.directions, second.attention.directions)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.attention.directions, second.attention.directions)
    assert not torch.equal(*first.attention.directions)  # a head each


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (("soft", 8, 2, 10, 4), "attention 'soft': unknown; one of softmax, linformer"),
        (("softmax", 8, 3, 10, 4), "dim=8 is not a multiple of heads=3"),
        (("linformer", 8, 2, 0, 4), "tokens=0 must be at least 1"),
        (("performer", 8, 2, 10, 0), "landmarks=0 must be at least 1"),
    ],
)
def test_what_cannot_be_built_says_why(told, why):
    with pytest.raises(ModelError, match=why):
        build_attention(*told)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(2, 9, 8), (2, 10, 4), (10, 8)])
def test_other_tokens_than_it_was_built_for_are_refused(name, shape):
    with pytest.raises(ModelError, match=r"it was built for \[B, 10, 8\]"):
        make(name)(torch.randn(shape))
