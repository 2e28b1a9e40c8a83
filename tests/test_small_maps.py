"""Small maps as matrix products: the same function as the convolution, forwards and backwards."""

import copy

import pytest
import torch
from torch import nn

from sparsecontrast.models.small_maps import DEPTHWISE_PIXELS, SmallMapConv2d, set_small_maps

SIZES = ((1, 1), (2, 2), (1, 2), (4, 1), (5, 3), (8, 8), (9, 9))
LAYERS = {
    "3x3": (6, 8, 3, 1, 1),
    "3x3 stride 2": (6, 8, 3, 2, 1),
    "2x2 stride 2, no padding": (6, 8, 2, 2, 0),
    "3x3 dilated": (6, 8, 3, 1, 2, 2),
    "5x5 wider than the map": (6, 8, 5, 1, 3),
    "7x7 depthwise": (6, 6, 7, 1, 3, 1, 6),
    "3x3 depthwise stride 2": (6, 6, 3, 2, 1, 1, 6),
    "1x1": (6, 8, 1),
    "1x1 stride 2": (6, 8, 1, 2),
}


def both(*told, bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(*told, bias=bias)).to(dtype)
    small = copy.deepcopy(plain)
    set_small_maps(small)
    assert type(small[0]) is SmallMapConv2d and type(plain[0]) is nn.Conv2d
    return plain, small


def gradients(network, x, weights):
    y = network(x)
    return [
        y,
        *torch.autograd.grad((y * weights[: y.numel()].view(y.shape)).sum(), [x, *network.parameters()]),
    ]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_results_and_gradients_are_the_convolutions(name, bias):
    plain, small = both(*LAYERS[name], bias=bias)
    compared = 0
    for size in SIZES:
        x = torch.randn(3, 6, *size, dtype=torch.float64, requires_grad=True)
        weights = torch.randn(3 * 8 * 200, dtype=torch.float64)
        try:
            wanted = gradients(plain, x, weights)
        except RuntimeError:  # the kernel is larger than this map
            continue
        for channels_last in (False, True):
            layout = torch.channels_last if channels_last else torch.contiguous_format
            given = x.detach().contiguous(memory_format=layout).requires_grad_()
            for found, right in zip(gradients(small, given, weights), wanted, strict=True):
                torch.testing.assert_close(found, right, atol=1e-12, rtol=1e-12)
        compared += 1
    assert compared >= 4


def test_small_maps_never_reach_the_convolution_and_large_ones_do(monkeypatch):
    reached = []
    run = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda layer, x: (reached.append(x.shape[2]), run(layer, x))[1])
    for name in ("3x3", "7x7 depthwise", "1x1"):
        _, small = both(*LAYERS[name])
        for side in (1, 2, 8, 9):
            small(torch.randn(2, 6, side, side, dtype=torch.float64))
    assert DEPTHWISE_PIXELS == 64 and reached == [8, 9, 9, 9]


def test_what_it_cannot_write_as_a_matrix_stays_a_convolution():
    network = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 8, 3, groups=4),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.ConvTranspose2d(4, 4, 3),
    )  # fmt: skip
    set_small_maps(network)
    assert not [m for m in network.modules() if isinstance(m, SmallMapConv2d)]


def test_weights_keep_their_names_and_stay_the_same_objects():
    network = nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 3)), nn.Conv2d(2, 2, 1, bias=False))
    before = dict(network.named_parameters())
    set_small_maps(network)
    after = dict(network.named_parameters())
    assert list(before) == list(after) and all(before[name] is after[name] for name in before)


@pytest.mark.parametrize("name", ["3x3", "7x7 depthwise", "1x1"])
def test_autocast_computes_in_bf16_like_the_convolution(name):
    plain, small = both(*LAYERS[name], dtype=torch.float32)
    x = torch.randn(4, 6, 2, 2)
    exact = plain(x)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = plain(x), small(x)
    assert wanted.dtype == found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, atol=0.03, rtol=0.03)
