"""Which cells of a radiograph deserve fine tokens: ``selection=attention``, and what needs no learning.

The default scorer is ``surprise.py``. This one is plain: the image reduced four times, three small
convolutions, no normalisation (rows stay independent, so the scorer is valid under per-sample
privacy), about 20 k parameters (DP noise grows with dimension).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsecontrast.models.tokens import shrink

REDUCTION = 4  # side of the average pool in front of the scorer
EXCLUDED = -1e4  # added to excluded cells: chosen last, yet finite
THIN = 0.12
"""Of the image's range: what strokes of up to 2 pixels add to a window's mean. In the middle of 314 real
films text, arrows and electrodes lay above it, and one honeycombed lung; from .10 to .12 ribs as well."""
WIDE = 0.2  # the same of strokes of up to 4 pixels, where a wall of the chest reaches .3 as well ...
WHITE = 0.95  # ... and only what is nearly white is text
RARE = 3  # times the mean of the image's windows: above it in noisy or over-sharpened films


class SaliencyPredictor(nn.Module):
    """Score the cells of an image: [B, 1, H, W] -> [B, cells].

    Args:
        grid: (rows, columns) of cells.
        width: channels of the first convolution; the next two have 2x and 3x.
    """

    def __init__(self, grid: tuple[int, int], width: int = 16):
        super().__init__()
        self.grid = grid
        self.conv1 = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(2 * width, 3 * width, 3, padding=1)
        self.head = nn.Conv2d(3 * width, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return raw scores [B, cells], row by row; higher is more salient."""
        x = F.avg_pool2d(images, REDUCTION)
        x = F.gelu(self.conv1(x))
        x = F.gelu(self.conv2(x))
        x = F.gelu(self.conv3(x))
        return self.head(F.adaptive_avg_pool2d(x, self.grid)).flatten(1)


def excluded_cells(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Find cells of collimation border or burnt-in text by two cheap rules, each image on its own.

    Border: at least 90 % of the cell lies within 4 % of the image's darkest value. Text: thin strokes side
    by side, brighter than anatomy's, see ``_strokes``. A letter that is hardly brighter than what it lies on
    is not found: whether such letters draw a choice is for ``stamps.py`` to say.

    Args:
        images: [B, 1, H, W], any scale; H and W are multiples of the grid's rows and columns.
        grid: (rows, columns) of cells.

    Returns:
        Boolean [B, cells], true where a cell should not be kept fine.
    """
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    bright = _blocks(images, grid) > low + 0.04 * (high - low).clamp_min(1e-6)
    black = _per_cell((~bright).float(), grid).mean((3, 5)) >= 0.9
    text = _per_cell(_strokes(_reduced(images, grid), grid), grid).any(5).any(3)
    return (black | text).flatten(1)


def _strokes(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mark text in images [B, 1, h, w]: boolean, one value a window of 4 x 4 pixels, whole ones a cell.

    What an opening takes away (the darkest value nearby, then the brightest of those) is brighter than what
    lies on both sides of it: a stroke, but neither an edge nor anything broad, as a lesion is. Letters are
    strokes side by side, so the mean over a window tells them from a wire or a rib's rim; the peak does not.
    """
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    x = (images - low) / (high - low).clamp_min(1e-6)
    eroded = _nearby(x, torch.minimum)
    thin = x - _nearby(eroded, torch.maximum)
    wide = x - _nearby(_nearby(_nearby(eroded, torch.minimum), torch.maximum), torch.maximum)
    white = _windows((x > WHITE).float(), grid) > 0
    return _rare(_windows(thin, grid), THIN) | _rare(_windows(wide, grid), WIDE) & white


def _rare(windows: Tensor, bound: float) -> Tensor:
    """Above the bound, and far above the image's own mean: where all is noise, nothing is text."""
    return windows > (RARE * windows.mean((1, 2, 3), keepdim=True)).clamp_min(bound)


def _nearby(x: Tensor, pick: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Brightest or darkest of the 3 x 3 pixels around each; on a CPU far faster than ``max_pool2d``."""
    for dim in (2, 3):
        n = x.shape[dim] - 1
        pairs = pick(x.narrow(dim, 0, n), x.narrow(dim, 1, n))
        inner = pick(pairs.narrow(dim, 0, n - 1), pairs.narrow(dim, 1, n - 1))
        x = torch.cat([pairs.narrow(dim, 0, 1), inner, pairs.narrow(dim, n - 1, 1)], dim)
    return x


def _windows(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean of windows of 4 x 4 pixels, which begin in the same places of every cell."""
    rows, columns = (math.gcd(size // cells, 4) for size, cells in zip(x.shape[2:], grid, strict=True))
    return F.avg_pool2d(F.pad(x, (0, 4 - columns, 0, 4 - rows)), 4, stride=(rows, columns))


def _reduced(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Halve images to 128 pixels a side or 16 a cell, whichever is more: letters are known there, cheaply."""
    while images.shape[2] > 128 and all(
        size // cells > 16 and size % (2 * cells) == 0
        for size, cells in zip(images.shape[2:], grid, strict=True)
    ):
        images = shrink(images, 2)
    return images


def _blocks(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Brightest pixel of blocks of 4 x 4, or of 2 x 2 or 1 where cells are not cut evenly."""
    for _ in range(2):
        if any(size % (2 * cells) for size, cells in zip(images.shape[2:], grid, strict=True)):
            break
        rows = torch.maximum(images[..., ::2, :], images[..., 1::2, :])
        images = torch.maximum(rows[..., ::2], rows[..., 1::2])
    return images


def _per_cell(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """View [B, 1, H, W] as [B, 1, rows, h, columns, w]."""
    b, c, h, w = x.shape
    return x.reshape(b, c, grid[0], h // grid[0], grid[1], w // grid[1])


def centre_scores(grid: tuple[int, int]) -> Tensor:
    """A centre prior, [cells]: minus the distance of each cell to the middle of the grid."""
    rows, columns = (torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in grid)
    return -(rows[:, None] ** 2 + columns[None, :] ** 2).sqrt().flatten()


def energy_scores(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Local energy: the variance of the pixels of each cell, [B, cells]."""
    mean = F.adaptive_avg_pool2d(images, grid)
    return (F.adaptive_avg_pool2d(images**2, grid) - mean**2).flatten(1)
