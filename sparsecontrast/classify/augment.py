"""Pictures of cells as a network gets them, and the changes that training makes to them.

A cell has no upright, so it is turned and mirrored at will; the colours differ from stain to stain, so
they are moved: brightness, contrast, saturation, white balance and gamma.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN, SPREAD = 0.6, 0.25  # of stained smears, roughly; fixed, so that no row depends on others
SCALE, SHIFT = 0.2, 0.1  # at most, of the side


def normalise(images: Tensor) -> Tensor:
    """Turn uint8 or [0, 1] images [B, 3, S, S] into the network's float32."""
    values = images.float() / 255 if images.dtype == torch.uint8 else images
    return (values - MEAN) / SPREAD


def augment(images: Tensor, colour: float, generator: torch.Generator) -> Tensor:
    """Turn, mirror, scale, shift and recolour uint8 images [B, 3, S, S], each by its own draw: in [0, 1].

    Args:
        images: as read.
        colour: strength of the recolouring; 0 leaves the colours.
        generator: the only source of randomness.
    """
    values = images.float() / 255
    return _recolour(_move(values, generator), colour, generator)


def _move(images: Tensor, generator: torch.Generator) -> Tensor:
    count = len(images)
    angle = torch.rand(count, generator=generator) * 2 * math.pi
    mirror = (torch.rand(count, generator=generator) < 0.5).float() * 2 - 1
    scale = 1 + _around(generator, count) * SCALE
    shift = _around(generator, count, 2) * SHIFT * 2  # the grid spans 2 units
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [
        torch.stack([cos * mirror, -sin, shift[:, 0]], dim=1),
        torch.stack([sin * mirror, cos, shift[:, 1]], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    # what a turn brings in from outside is the mirrored border, not a black corner that tells the angle
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _recolour(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    one = (len(images), 1, 1, 1)
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * (1 + 0.2 * strength * _around(generator, *one)) + mean
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (1 + 0.3 * strength * _around(generator, *one)) + grey
    gain = 1 + strength * (0.15 * _around(generator, *one) + 0.1 * _around(generator, len(images), 3, 1, 1))
    gamma = torch.exp(0.3 * strength * _around(generator, *one))
    return (images * gain).clamp(0, 1).pow(gamma)


def _around(generator: torch.Generator, *shape: int) -> Tensor:
    """Uniform in [-1, 1]."""
    return torch.rand(*shape, generator=generator) * 2 - 1
