"""Differentiable top-k by perturbation (Cordonnier et al., "Differentiable Patch Selection", CVPR 2021).

The k highest of N scores s, as a matrix Y(s) of k one-hot rows in rising order of place, are averaged
over Gaussian noise (section 3.3, after Berthet et al. 2020, "Learning with Differentiable Perturbed
Optimizers", proposition 2.2):

    P(s) = E[Y(s + sigma Z)],    dP / ds = E[Y(s + sigma Z) Z^T] / sigma.

The backward pass uses the whole matrix of the formula: <G, Y> Z / sigma, averaged over the draws. The
listing in the paper's appendix keeps only its diagonal.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecontrast.models.tokens import top_k

SIGMA = 0.05  # of scores in [0, 1], as in the paper
DRAWS = 100  # the paper draws 500; its gradient is as unbiased with fewer


def perturbed_top_k(
    scores: Tensor, k: int, generator: torch.Generator, sigma: float = SIGMA, draws: int = DRAWS
) -> Tensor:
    """Average the one-hot rows of the k highest scores over noise.

    Args:
        scores: [B, N].
        k: how many.
        generator: of the noise.
        sigma: deviation of the noise.
        draws: of the noise.

    Returns:
        P [B, k, N]: rows sum to 1, columns to a cell's probability of being kept.
    """
    noise = torch.randn(len(scores), draws, scores.shape[1], generator=generator).to(scores.device)
    return _Perturbed.apply(scores, noise, k, sigma)  # type: ignore[no-any-return]


def unit_range(scores: Tensor) -> Tensor:
    """Map each row of scores [B, N] to [0, 1], as the paper does before it adds noise."""
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    return (scores - low) / (high - low + 1e-5)


class _Perturbed(torch.autograd.Function):
    """Forward: the mean over draws; backward: <G, Y> Z / sigma."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, noise: Tensor, k: int, sigma: float) -> Tensor:
        batch, draws, cells = noise.shape
        kept = top_k((scores[:, None] + sigma * noise).flatten(0, 1), k).unflatten(0, (batch, draws))
        ctx.save_for_backward(noise, kept)
        ctx.sigma = sigma
        return F.one_hot(kept, cells).to(scores.dtype).mean(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        noise, kept = ctx.saved_tensors
        gradient = gradients[0][:, None].expand(-1, noise.shape[1], -1, -1)
        gained = gradient.gather(3, kept[..., None]).sum((2, 3))
        return torch.einsum("bn,bnc->bc", gained, noise) / (noise.shape[1] * ctx.sigma), None, None, None
