"""Which cells of a radiograph deserve fine tokens: ``selection=attention``, and what needs no learning.

The default scorer is ``surprise.py``. This one is plain: the image reduced four times, three small
convolutions, no normalisation (rows stay independent, so the scorer is valid under per-sample
privacy), about 20 k parameters (DP noise grows with dimension).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

REDUCTION = 4  # side of the average pool in front of the scorer
EXCLUDED = -1e4  # added to excluded cells: chosen last, yet finite


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

    Border: at least 90 % of the cell lies within 4 % of the image's darkest value. Text: in a block of
    up to 4 x 4 pixels one is within 3 % of the brightest value and another darker by 40 % of the range;
    anatomy does not change that fast.

    Args:
        images: [B, 1, H, W], any scale; H and W are multiples of the grid's rows and columns.
        grid: (rows, columns) of cells.

    Returns:
        Boolean [B, cells], true where a cell should not be kept fine.
    """
    brightest, darkest = _blocks(images, torch.maximum, grid), _blocks(images, torch.minimum, grid)
    low, high = darkest.amin((1, 2, 3), keepdim=True), brightest.amax((1, 2, 3), keepdim=True)
    extent = (high - low).clamp_min(1e-6)
    black = _per_cell((brightest < low + 0.04 * extent).float(), grid).mean((3, 5)) >= 0.9
    text = (brightest > high - 0.03 * extent) & (brightest - darkest > 0.4 * extent)
    return (black | _per_cell(text, grid).any(5).any(3)).flatten(1)


def _blocks(images: Tensor, pick: Callable[[Tensor, Tensor], Tensor], grid: tuple[int, int]) -> Tensor:
    """Reduce blocks of 4 x 4 pixels to one, or of 2 x 2 or none where cells are not cut evenly."""
    for _ in range(2):
        if any(size % (2 * cells) for size, cells in zip(images.shape[2:], grid, strict=True)):
            break
        rows = pick(images[..., ::2, :], images[..., 1::2, :])
        images = pick(rows[..., ::2], rows[..., 1::2])
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
