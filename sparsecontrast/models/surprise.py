"""The saliency predictor: a cell is salient where its surroundings do not foretell it.

Ours (SparseContrast, arXiv 2605.00887, asks for a compact predictor and leaves its signal open). A
density of normal anatomy is learnt without labels: from all OTHER cells of the image, predict the
detail t_i of cell i, its mean and its variance,

    t_i ~ N(mu(x without i), sigma^2(x without i)),    loss = -log N(t_i),

and call the cell surprising by how far off the prediction was,

    s_i = log mean_k (t_ik - mu_ik)^2 / sigma_ik^2.

Ribs and vessels go on as their neighbours say and cost nothing; a mass does not. Dividing by the
predicted variance keeps noisy regions quiet. Contrast may be learnt without ever looking at a
lesion, and then attention and straight-through scores are a lottery; this loss cannot, and it needs
neither a teacher nor a second pass. Each image stands for itself, as private training demands.

That the cell itself stays unseen is a matter of structure, not of masking: everything before the
one ring-shaped convolution works inside a cell, everything after it on single positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsecontrast.models.saliency import centre_scores
from sparsecontrast.models.tokens import patchify, shrink

SIDE = 8  # pixels of a cell's side, as the predictor sees it
DETAIL = 4  # and as it is predicted: values of a side
DETAIL_SCALE = 3.0  # detail of a standardised radiograph has a deviation of about a third
LOG_VARIANCE = 5.0  # bound of the predicted log variance


class SurprisePredictor(nn.Module):
    """Score the cells of an image: [B, 1, H, W] -> [B, cells].

    Args:
        grid: (rows, columns) of cells; H and W are cut evenly.
        centre_prior: weight of minus the squared distance to the middle, in deviations of the surprise
            of one image: where surprise is equal, the chest comes before the arms.
        width: channels of a cell's code.
        hidden: channels of the two inner layers.
    """

    others: Tensor
    prior: Tensor

    def __init__(self, grid: tuple[int, int], centre_prior: float = 2.0, width: int = 32, hidden: int = 48):
        super().__init__()
        self.grid = grid
        self.encode = nn.Linear(SIDE**2, hidden)
        self.reduce = nn.Linear(hidden, width)
        self.ring = RingConv(width, width, 3, padding=1)
        self.rest = nn.Conv2d(width, width, 1)
        self.place = nn.Parameter(torch.zeros(1, width, *grid))
        self.expand = nn.Conv2d(width, hidden, 1)
        self.head = nn.Conv2d(hidden, 2 * DETAIL**2, 1)
        cells = grid[0] * grid[1]
        # a matrix, because sum less own value leaves a rounding error of the cell itself
        self.register_buffer("others", (1 - torch.eye(cells)) / max(cells - 1, 1), persistent=False)
        self.register_buffer("prior", -centre_prior * centre_scores(grid).square(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return scores [B, cells], row by row; higher is more salient."""
        return self.read(images)[0]

    def read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores [B, cells] without gradient, and the loss of each row [B]."""
        with torch.autocast(images.device.type, enabled=False):  # tiny, and squares need their digits
            exact = torch.promote_types(self.place.dtype, torch.float32)
            small = _resize(images.to(exact), self.grid)
            mean, log_variance = self.predict(small)
            error = (detail(small) - mean).square() * torch.exp(-log_variance)
            loss = 0.5 * (log_variance + error).mean((1, 2))
            surprise = torch.log(error.detach().mean(2) + 1e-6)
            return _standardised(surprise) + self.prior, loss

    def predict(self, small: Tensor) -> tuple[Tensor, Tensor]:
        """Foretell the detail of every cell from the other cells.

        Args:
            small: [B, 1, rows * SIDE, columns * SIDE].

        Returns:
            Mean and log variance, each [B, cells, DETAIL^2].
        """
        codes = F.gelu(self.reduce(F.gelu(self.encode(patchify(small, SIDE)))))
        others = (self.others @ codes).mT.unflatten(2, self.grid)
        near = self.ring(codes.mT.unflatten(2, self.grid))
        context = F.gelu(near + self.rest(others) + self.place)
        found = self.head(F.gelu(self.expand(context))).flatten(2).mT
        mean, log_variance = found.chunk(2, dim=2)
        return mean, LOG_VARIANCE * torch.tanh(log_variance / LOG_VARIANCE)


class RingConv(nn.Conv2d):
    """A 3 x 3 convolution that never sees the position it speaks of."""

    without_centre: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, padding: int):
        super().__init__(in_channels, out_channels, kernel_size, padding=padding)
        ring = torch.ones(1, 1, 3, 3)
        ring[..., 1, 1] = 0
        self.register_buffer("without_centre", ring, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve maps [B, C, h, w]."""
        return F.conv2d(input, self.weight * self.without_centre, self.bias, padding=self.padding)  # type: ignore[arg-type]


def detail(small: Tensor) -> Tensor:
    """What is to be foretold: the image less its 5 x 5 mean at half the size, [B, cells, DETAIL^2]."""
    half = shrink(small, SIDE // DETAIL)
    smooth = F.avg_pool2d(F.pad(half, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    return DETAIL_SCALE * patchify(half - smooth, DETAIL)


def _resize(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Reduce images to SIDE pixels a cell."""
    height, width = grid[0] * SIDE, grid[1] * SIDE
    if images.shape[2] % height == 0 and images.shape[2] * width == images.shape[3] * height:
        return shrink(images, images.shape[2] // height)
    return F.adaptive_avg_pool2d(images, (height, width))


def _standardised(scores: Tensor) -> Tensor:
    deviation = scores.var(1, correction=0, keepdim=True).add(1e-6).sqrt()
    return (scores - scores.mean(1, keepdim=True)) / deviation
