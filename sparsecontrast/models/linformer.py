"""Linformer: tokens read k learned mixtures of tokens instead of each other (Wang et al., arXiv 2006.04768).

    softmax(Q (E K)^T / sqrt(d)) E V        (equation 7; E [k, N] is learned)

E is one for all heads, for keys and for values (their "key-value sharing", section 4), which keeps the
number of weights low: k N. A projection over tokens and one over channels commute, so ``Linformer``
projects the tokens first, and makes keys and values of k tokens instead of N.

E starts as means of neighbouring tokens (ours; theirs is random). At k = N that is the identity and the
attention is softmax attention; the more mixtures, the nearer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsecontrast.models.heads import merge_heads, split_heads
from sparsecontrast.models.segments import segment_matrix


def linformer_attention(q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> Tensor:
    """Attend to projected keys and values.

    Args:
        q: [B, H, N, d].
        k: [B, H, N, d].
        v: [B, H, N, d].
        projection: E [k, N].

    Returns:
        [B, H, N, d].
    """
    return F.scaled_dot_product_attention(q, projection @ k, projection @ v)


class TokenMix(nn.Linear):
    """A linear layer over the tokens instead of the channels: [B, N, D] -> [B, k, D], nothing transposed."""

    def forward(self, input: Tensor) -> Tensor:
        """Mix tokens."""
        return torch.bmm(self.weight.expand(len(input), -1, -1), input)


class Linformer(nn.Module):
    """Self-attention of linear complexity over exactly N tokens.

    Args:
        dim: D, a multiple of ``heads``.
        heads: H.
        tokens: N.
        landmarks: k, mixtures of tokens that stand for all; at most N are made.
    """

    def __init__(self, dim: int, heads: int, tokens: int, landmarks: int):
        super().__init__()
        self.heads = heads
        self.mix = TokenMix(tokens, min(landmarks, tokens), bias=False)
        self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        with torch.no_grad():
            self.mix.weight.copy_(segment_matrix(tokens, landmarks))

    def forward(self, x: Tensor) -> Tensor:
        """Attend: [B, N, D] -> [B, N, D]."""
        q = split_heads(self.q(x), self.heads)
        k, v = (split_heads(part, self.heads) for part in self.kv(self.mix(x)).chunk(2, dim=-1))
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v)))
