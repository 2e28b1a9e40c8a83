"""The compact saliency predictor: which cells of a radiograph deserve fine tokens.

SparseContrast (arXiv 2605.00887) names a compact predictor and nothing more; this one is ours: the
image reduced four times, three small convolutions, no normalisation (rows stay independent, so the
scorer is valid under per-sample privacy), about 20 k parameters (DP noise grows with dimension).
"""

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

    Border: at least 90 % of the cell lies within 4 % of the image's darkest value. Text: a pixel
    within 3 % of the brightest value stands beside one darker by 40 % of the range; anatomy does not
    change that fast.

    Args:
        images: [B, 1, H, W], any scale.
        grid: (rows, columns) of cells.

    Returns:
        Boolean [B, cells], true where a cell should not be kept fine.
    """
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    x = (images - low) / (high - low).clamp_min(1e-6)
    black = F.adaptive_avg_pool2d((x < 0.04).float(), grid) >= 0.9
    drop = x - -F.max_pool2d(-x, 3, stride=1, padding=1)
    text = F.adaptive_max_pool2d(((x > 0.97) & (drop > 0.4)).float(), grid) > 0
    return (black | text).flatten(1)


def centre_scores(grid: tuple[int, int]) -> Tensor:
    """A centre prior, [cells]: minus the distance of each cell to the middle of the grid."""
    rows, columns = (torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in grid)
    return -(rows[:, None] ** 2 + columns[None, :] ** 2).sqrt().flatten()


def energy_scores(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Local energy: the variance of the pixels of each cell, [B, cells]."""
    mean = F.adaptive_avg_pool2d(images, grid)
    return (F.adaptive_avg_pool2d(images**2, grid) - mean**2).flatten(1)
