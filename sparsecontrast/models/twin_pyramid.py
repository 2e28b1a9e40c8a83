"""Two encoders and one decoder for A2A: an anatomy pyramid of few channels, a noise pyramid of many.

The anatomy code is the low-rank one: what apertures share. The noise code is the high-rank one. The decoder
adds the noise code to the anatomy code level by level through maps without bias, so that the noise code 0
is exactly no noise code. No layer normalises over an image: a scale belongs to the signal.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SLOPE = 0.1


class PyramidEncoder(nn.Module):
    """An image -> one code a level, each level half the size of the one before.

    Args:
        inputs: channels of the image.
        widths: channels of the levels, finest first.
    """

    def __init__(self, inputs: int, widths: Sequence[int]):
        super().__init__()
        befores = [inputs, *widths[:-1]]
        self.first = nn.ModuleList(_conv(i, o) for i, o in zip(befores, widths, strict=True))
        self.second = nn.ModuleList(_conv(o, o) for o in widths)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Encode [B, C, H, W] into [B, widths[l], H / 2^l, W / 2^l], sizes rounded up."""
        codes, x = [], image
        for level, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            if level:
                x = F.avg_pool2d(x, 2, ceil_mode=True)
            x = F.leaky_relu(second(F.leaky_relu(first(x), SLOPE)), SLOPE)
            codes.append(x)
        return codes


class TwinPyramid(nn.Module):
    """Anatomy encoder, noise encoder and their decoder.

    Args:
        inputs: channels of an encoder's input.
        anatomy: channels of the anatomy levels, finest first.
        noise: channels of the noise levels, as many levels.
    """

    def __init__(self, inputs: int, anatomy: Sequence[int], noise: Sequence[int]):
        super().__init__()
        self.anatomy = PyramidEncoder(inputs, anatomy)
        self.noise = PyramidEncoder(inputs, noise)
        self.mix = nn.ModuleList(nn.Conv2d(n, a, 1, bias=False) for n, a in zip(noise, anatomy, strict=True))
        self.up = nn.ModuleList(
            _conv(fine + coarse, fine) for fine, coarse in zip(anatomy[:-1], anatomy[1:], strict=True)
        )
        self.last = _conv(anatomy[0], anatomy[0])
        self.head = nn.Conv2d(anatomy[0], 1, 1)
        nn.init.zeros_(self.head.weight)  # the first output is the baseline itself
        nn.init.zeros_(self.head.bias)  # pyright: ignore[reportArgumentType]

    def decode(self, anatomy: Sequence[Tensor], noise: Sequence[Tensor] | None = None) -> Tensor:
        """Decode codes into [B, H, W]; ``noise`` None is the noise code 0."""
        codes = list(anatomy)
        if noise is not None:
            codes = [a + mix(n) for a, n, mix in zip(codes, noise, self.mix, strict=True)]
        x = codes[-1]
        for fine, up in zip(codes[-2::-1], reversed(self.up), strict=True):
            x = F.interpolate(x, size=fine.shape[-2:], mode="bilinear", align_corners=False)
            x = F.leaky_relu(up(torch.cat([fine, x], 1)), SLOPE)
        return self.head(F.leaky_relu(self.last(x), SLOPE))[:, 0]


def build_twin_pyramid(
    inputs: int, anatomy: Sequence[int], noise: Sequence[int], generator: torch.Generator
) -> TwinPyramid:
    """Build a twin pyramid whose weights come from ``generator`` alone; the global one is left as it was."""
    state = torch.get_rng_state()
    try:
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return TwinPyramid(inputs, anatomy, noise)
    finally:
        torch.set_rng_state(state)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="replicate")
