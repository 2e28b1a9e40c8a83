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
        [B, H, N, d] in the type of ``v``; features are computed in float32 at least.
    """
    with torch.autocast(q.device.type, enabled=False):
        wide = torch.promote_types(q.dtype, torch.float32)
        scale = q.shape[-1] ** -0.25
        w = directions.to(wide) * scale
        length = k.to(wide).square().sum(-1) * (scale**2 / 2)
        mass, summaries = _gather(w @ k.to(wide).mT - length[..., None, :], v)
        weights = (q.to(wide) @ w.mT + mass[..., None, :]).softmax(-1)
        return weights.to(v.dtype) @ summaries.to(v.dtype)


def _gather(logits: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """From logits [B, H, M, N], log of their sum of exponentials [B, H, M], softmax times v [B, H, M, d]."""
    top = logits.detach().amax(-1, keepdim=True)
    shares = (logits - top).exp()
    total = shares.sum(-1, keepdim=True)
    return (total.log() + top).squeeze(-1), (shares.to(v.dtype) @ v).to(logits.dtype) / total


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
