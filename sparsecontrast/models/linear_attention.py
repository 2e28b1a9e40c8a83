"""Self-attention by name: softmax, or one of three whose cost grows with the tokens, not with their square.

Every one takes tokens [B, N, D] to [B, N, D], projections included, for any B, and treats each row of the
batch alone. What they cost: ``python -m benchmarks.decoders``.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from sparsecontrast.errors import ModelError
from sparsecontrast.models.heads import merge_heads, split_heads
from sparsecontrast.models.linformer import Linformer
from sparsecontrast.models.nystromformer import Nystromformer
from sparsecontrast.models.performer import Performer


class SoftmaxAttention(nn.Module):
    """Self-attention as ever (Vaswani et al., arXiv 1706.03762), by torch's fused kernel.

    Args:
        dim: D, a multiple of ``heads``.
        heads: H.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend: [B, N, D] -> [B, N, D]."""
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v)))


class SelfAttention(nn.Module):
    """An attention that takes nothing but what it was built for.

    Args:
        attention: [B, N, D] -> [B, N, D].
        tokens: N.
        dim: D.
    """

    def __init__(self, attention: nn.Module, tokens: int, dim: int):
        super().__init__()
        self.attention = attention
        self.shape = (tokens, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attend: [B, N, D] -> [B, N, D].

        Raises:
            ModelError: x has other tokens or another width than it was built for.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ModelError(
                f"attention over {list(x.shape)}: it was built for [B, {self.shape[0]}, {self.shape[1]}]; "
                "build it with the number of tokens and the width of the decoder"
            )
        return self.attention(x)


ATTENTIONS: dict[str, Callable[[int, int, int, int, int], nn.Module]] = {
    "softmax": lambda dim, heads, tokens, landmarks, seed: SoftmaxAttention(dim, heads),
    "linformer": lambda dim, heads, tokens, landmarks, seed: Linformer(dim, heads, tokens, landmarks),
    "performer": lambda dim, heads, tokens, landmarks, seed: Performer(dim, heads, landmarks, seed),
    "nystromformer": lambda dim, heads, tokens, landmarks, seed: Nystromformer(dim, heads, landmarks),
}


def build_attention(name: str, dim: int, heads: int, tokens: int, landmarks: int, seed: int = 0) -> nn.Module:
    """Build self-attention over N tokens; the caller seeds torch for the weights.

    Args:
        name: ``softmax``, ``linformer``, ``performer`` or ``nystromformer``.
        dim: D, a multiple of ``heads``.
        heads: H.
        tokens: N.
        landmarks: what stands for all tokens: landmarks (nystromformer), mixtures of tokens (linformer) or
            random features (performer), which needs more of them; softmax has none.
        seed: of the performer's directions.

    Raises:
        ModelError: the name is unknown, a number is below 1, or ``heads`` does not divide ``dim``.
    """
    if name not in ATTENTIONS:
        raise ModelError(f"attention {name!r}: unknown; one of {', '.join(ATTENTIONS)}")
    for key, value in {"dim": dim, "heads": heads, "tokens": tokens, "landmarks": landmarks}.items():
        if value < 1:
            raise ModelError(f"attention {name}: {key}={value} must be at least 1")
    if dim % heads:
        raise ModelError(f"attention {name}: dim={dim} is not a multiple of heads={heads}")
    return SelfAttention(ATTENTIONS[name](dim, heads, tokens, landmarks, seed), tokens, dim)
