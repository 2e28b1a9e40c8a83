"""Performer: softmax attention through positive random features (FAVOR+; Choromanski et al., 2009.14794).

With directions w_j drawn from N(0, I), exp(q k) is the mean over j of exp(w_j q - |q|^2 / 2) times
exp(w_j k - |k|^2 / 2) (lemma 1; q and k are scaled by d^(-1/4)). Directions of one block are orthogonal,
their lengths those of Gaussian vectors (section 2.4). Attention is the ratio of two such means, so a
factor of one query cancels, and so does one of all keys. What is left is written as two softmaxes:

    a_j = log sum_n exp(w_j k_n - |k_n|^2 / 2),  s_j = mean of the values under that softmax over tokens n
    o_n = mean of s_j under the softmax over directions j of (w_j q_n + a_j)

The maxima that keep an exponential finite are thus those of one direction and of one query, of one sample
(the authors' code takes one over all keys), and no division comes near zero, however large the logits.
"""

import torch
from torch import Tensor, nn

from sparsecontrast.models.heads import merge_heads, split_heads
from sparsecontrast.models.summaries import gather, spread


def orthogonal_directions(count: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw directions [count, width] of float32: orthogonal in blocks of ``width``, of Gaussian lengths."""
    blocks = -(-count // width)
    drawn = torch.randn(blocks, width, width, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(drawn)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]  # of all rotations alike (Mezzadri 2007)
    lengths = torch.randn(count, width, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
    return (q.flatten(0, 1)[:count] * lengths).float()


def performer_attention(q: Tensor, k: Tensor, v: Tensor, directions: Tensor) -> Tensor:
    """Attend through random features.

    Args:
        q: [B, H, N, d].
        k: [B, H, N, d].
        v: [B, H, N, d].
        directions: [H, M, d].

    Returns:
        [B, H, N, d] in the type of ``q``; computed in float32 at least.
    """
    scale = q.shape[-1] ** -0.25
    wide = torch.promote_types(q.dtype, torch.float32)
    w = directions.to(wide).expand(len(q), -1, -1, -1)
    with torch.autocast(q.device.type, enabled=False):
        size = k.to(wide).square().sum(-1)
        summaries, mass = gather(w, k, v, scale, size * (-(scale**2) / 2))
        return spread(q, w, summaries, scale, mass)


class Performer(nn.Module):
    """Self-attention of linear complexity through features drawn once.

    Args:
        dim: D, a multiple of ``heads``.
        heads: H; each has directions of its own.
        features: M.
        seed: of the directions, which are a buffer and part of the state.
    """

    directions: Tensor

    def __init__(self, dim: int, heads: int, features: int, seed: int = 0):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        generator = torch.Generator().manual_seed(seed)
        drawn = [orthogonal_directions(features, dim // heads, generator) for _ in range(heads)]
        self.register_buffer("directions", torch.stack(drawn))

    def forward(self, x: Tensor) -> Tensor:
        """Attend: [B, N, D] -> [B, N, D]."""
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.out(merge_heads(performer_attention(q, k, v, self.directions)))
