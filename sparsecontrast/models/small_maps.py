"""Convolutions of maps as small as a kept tile's: a matrix product, with nothing multiplied by padding.

A window of 32 px leaves maps of 8, 4, 2 and 1 pixels a side, where a convolution is slow: its kernels are
made for large maps, and most taps meet the padding. Written out, such a convolution is a linear map from
the pixels that go in to those that come out, its matrix made of the weight's taps (Toeplitz). Over a whole
batch of windows that is one matrix product: exact but for rounding, and several times faster on a CPU
(``python -m benchmarks.small_maps``).
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEPTHWISE_PIXELS = 64  # of the largest map that is a product: beyond, the matrices outgrow their use
FULL_PIXELS = 4


class SmallMapConv2d(nn.Conv2d):
    """A ``Conv2d`` that multiplies matrices where maps are small; an exported graph keeps the convolution."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve [N, C, H, W]."""
        pixels = input.shape[-2] * input.shape[-1]
        if torch.compiler.is_exporting() or input.is_meta:  # what is only counted is counted as a convolution
            return super().forward(input)
        if self.kernel_size == (1, 1) and pixels <= DEPTHWISE_PIXELS:
            return self._pointwise(input)
        if self.groups == 1 and pixels <= FULL_PIXELS:
            return self._full(input)
        if self.groups == self.in_channels and pixels <= DEPTHWISE_PIXELS:
            return self._depthwise(input)
        return super().forward(input)

    def _pointwise(self, x: Tensor) -> Tensor:
        rows, columns = self.stride
        pixels = x[:, :, ::rows, ::columns].permute(0, 2, 3, 1)
        maps = F.linear(pixels.flatten(0, 2), self.weight.flatten(1), self.bias)
        maps = maps.unflatten(0, pixels.shape[:3]).permute(0, 3, 1, 2)
        return maps.contiguous() if x.is_contiguous() else maps  # GroupNorm is slow with the channels last

    def _full(self, x: Tensor) -> Tensor:
        taps = self._taps(x)
        weight = _with_zero(_cast(self.weight, x).flatten(2), taps)
        matrix = weight.index_select(2, taps.table.flatten()).unflatten(2, taps.table.shape)
        matrix = matrix.transpose(1, 2).flatten(2).flatten(0, 1)  # [out * pixels out, in * pixels in]
        bias = None if self.bias is None else self.bias.repeat_interleave(len(taps.table))
        return F.linear(x.flatten(1), matrix, bias).view(len(x), self.out_channels, *taps.size)

    def _depthwise(self, x: Tensor) -> Tensor:
        taps = self._taps(x)
        matrices = _with_zero(_cast(self.weight, x).flatten(1), taps)[:, taps.table.T]  # [C, in, out pixels]
        maps = torch.bmm(x.flatten(2).transpose(0, 1).contiguous(), matrices)  # [C, N, out pixels]
        if self.bias is not None:
            maps = maps + self.bias.to(maps.dtype)[:, None, None]
        return maps.transpose(0, 1).unflatten(2, taps.size)

    def _taps(self, x: Tensor) -> "Taps":
        axes = zip(x.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        return find_taps(*axes, x.device)  # type: ignore[arg-type]


class Taps(NamedTuple):
    """Which tap of a kernel leads from a pixel to a pixel of the result.

    Attributes:
        table: [pixels out, pixels in], numbered as the kernel is flattened; the number of taps for none.
        holes: whether there is a pair that none leads to.
        size: of the result, (height, width).
    """

    table: Tensor
    holes: bool
    size: tuple[int, int]


def set_small_maps(network: nn.Module) -> None:
    """Let the convolutions inside multiply matrices where maps are small; the weights stay the same."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            depthwise = (
                isinstance(child, nn.Conv2d) and 1 < child.groups == child.in_channels == child.out_channels
            )
            if type(child) is nn.Conv2d and _plain(child) and (child.groups == 1 or depthwise):
                setattr(parent, name, _same_weights(child))


Axis = tuple[int, int, int, int, int]
"""Size of the map, then kernel, stride, padding and dilation along one axis."""


@functools.lru_cache(maxsize=64)
def find_taps(vertical: Axis, horizontal: Axis, device: torch.device) -> Taps:
    """Find the taps between all pixels of a map and of its convolution."""
    rows, columns, width = _line(*vertical), _line(*horizontal), horizontal[1]
    none = vertical[1] * width
    index = [
        [none if a is None or b is None else a * width + b for a in into_row for b in into_column]
        for into_row in rows
        for into_column in columns
    ]
    holes = any(none in line for line in index)
    return Taps(torch.tensor(index, device=device), holes, (len(rows), len(columns)))


def _line(size: int, kernel: int, stride: int, padding: int, dilation: int) -> list[list[int | None]]:
    """Taps along one axis, by pixel out and pixel in; None where none leads."""
    count = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    distances = [[i + padding - stride * o for i in range(size)] for o in range(count)]
    return [
        [d // dilation if d % dilation == 0 and 0 <= d < dilation * kernel else None for d in line]
        for line in distances
    ]


def _plain(layer: nn.Conv2d) -> bool:
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _same_weights(layer: nn.Conv2d) -> SmallMapConv2d:
    made = SmallMapConv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,  # type: ignore[arg-type]
        layer.dilation, layer.groups, layer.bias is not None, device="meta",  # type: ignore[arg-type]
    )  # fmt: skip
    made.weight, made.bias = layer.weight, layer.bias
    return made


def _with_zero(weight: Tensor, taps: Taps) -> Tensor:
    """Append the zero that stands where no tap leads."""
    return F.pad(weight, (0, 1)) if taps.holes else weight


def _cast(weight: Tensor, x: Tensor) -> Tensor:
    """Cast before the taps are copied out, as autocast would cast the larger matrices after it."""
    if torch.is_autocast_enabled(x.device.type):
        return weight.to(torch.get_autocast_dtype(x.device.type))
    return weight
