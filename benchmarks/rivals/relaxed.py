"""Selection learnt through the task itself: the contrast's gradient reaches the scorer through the tokens.

Two ways through a hard choice of cells. The straight-through estimator (Bengio et al. 2013,
"Estimating or Propagating Gradients Through Stochastic Neurons") runs the plain sparse network and, in
the backward pass only, pretends that each kept token was multiplied by sigmoid(score). Perturbed
top-k (``perturbed.py``) feeds the network mixtures of cells and tends to a hard choice as the scores
grow apart. Ours: mixed resolution around both, so that they differ from SparseContrast in the scorer's
signal alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.contenders import Contrast
from benchmarks.rivals.perturbed import perturbed_top_k, unit_range
from sparsecontrast.models import tokens
from sparsecontrast.models.saliency import EXCLUDED, SaliencyPredictor, excluded_cells
from sparsecontrast.models.sparse_vit import SparseViT
from sparsecontrast.settings import MethodConfig


class ChangedViT(SparseViT):
    """A sparse ViT whose fine tokens are changed on their way in."""

    def changed(self, images: Tensor, kept: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Embed images as ``forward`` does, with ``change`` of the fine tokens [B, m, cell^2, D]."""
        self.change = change
        try:
            return self(images, kept)
        finally:
            del self.change

    def embed(self, images: Tensor, kept: Tensor) -> Tensor:
        """Return the input tokens, the fine ones changed."""
        x = super().embed(images, kept)
        if not hasattr(self, "change"):
            return x
        start, length = self.vit.num_prefix_tokens, self.cell**2 * kept.shape[1]
        head, fine, coarse = x.tensor_split((start, start + length), dim=1)
        fine = self.change(fine.unflatten(1, (-1, self.cell**2))).flatten(1, 2)
        return torch.cat([head, fine.to(x.dtype), coarse], dim=1)

    def every(self, images: Tensor) -> Tensor:
        """Fine tokens of all cells, [B, cells, cell^2, D]."""
        kept = torch.arange(self.num_cells, device=images.device).expand(len(images), -1)
        return self.embed(images, kept)[:, self.vit.num_prefix_tokens :].unflatten(1, (-1, self.cell**2))


class StraightThrough(nn.Module):
    """Embed images with the tokens of the top-scored cells, gated in the backward pass.

    As SparseContrast does, a share of the kept cells is drawn at random: the gates of cells that are
    never kept would have no gradient.

    Args:
        sparse: the backbone.
        config: keep and explore.
        generator: of the exploration.
    """

    def __init__(self, sparse: ChangedViT, config: MethodConfig, generator: torch.Generator):
        super().__init__()
        self.backbone, self.config, self.generator = sparse, config, generator
        self.saliency = SaliencyPredictor(sparse.grid)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images [B, 1, H, W] -> [B, D]."""
        scores = self.saliency(images).float()
        barred = scores.detach() + EXCLUDED * excluded_cells(images, self.backbone.grid)
        m = self.backbone.kept_cells(self.config.keep)
        kept = tokens.explore_top_k(barred, m, self.config.explore, self.generator)
        gates = straight_through(scores.gather(1, kept))
        return self.backbone.changed(images, kept, lambda fine: fine * gates[:, :, None, None])


class PerturbedTopK(nn.Module):
    """Embed images with mixtures of cells, each row of P one; coarse tokens stand for the others.

    Args:
        sparse: the backbone.
        config: keep.
        generator: of the noise.
    """

    def __init__(self, sparse: ChangedViT, config: MethodConfig, generator: torch.Generator):
        super().__init__()
        self.backbone, self.config, self.generator = sparse, config, generator
        self.saliency = SaliencyPredictor(sparse.grid)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images [B, 1, H, W] -> [B, D]."""
        sparse = self.backbone
        # scaled before the bar is added: the bar would press all other scores into one
        scores = unit_range(self.saliency(images).float())
        barred = scores + EXCLUDED * excluded_cells(images, sparse.grid)
        m = sparse.kept_cells(self.config.keep)
        mixture, every = perturbed_top_k(barred, m, self.generator), sparse.every(images)
        mixed = torch.einsum("bmn,bnpd->bmpd", mixture.to(every.dtype), every)
        return sparse.changed(images, tokens.top_k(barred.detach(), m), lambda _: mixed)


def straight_through(scores: Tensor) -> Tensor:
    """Gates that are 1 and have the gradient of sigmoid(scores)."""
    gates = scores.sigmoid()
    return gates - gates.detach() + 1  # in this order exactly 1


def contrast(encoder: StraightThrough | PerturbedTopK, config: MethodConfig) -> Contrast:
    """Put the projector and InfoNCE of SparseContrast on top."""
    return Contrast(encoder, encoder.backbone.embed_dim, config)
