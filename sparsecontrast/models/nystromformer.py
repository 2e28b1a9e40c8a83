"""Nystromformer: softmax attention through landmarks, the Nystrom way (Xiong et al., arXiv 2102.03902).

    softmax(Q K~^T) softmax(Q~ K~^T)^+ (softmax(Q~ K^T) V)        (equation 13; logits over sqrt(d))

Q~ and K~ are means of runs of neighbouring queries and keys. The pseudo-inverse is found by iterations of
matrix products alone (equation 10). They start from A^T / (|A|_1 |A|_inf) with the norms of ONE sample and
head; the authors' code takes the largest of the batch, through which every row would depend on all others.
With as many landmarks as tokens it is softmax attention, as far as the iterations have converged.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsecontrast.models.heads import merge_heads, split_heads
from sparsecontrast.models.segments import segment_means

ITERATIONS = 6


def nystrom_attention(
    q: Tensor, k: Tensor, v: Tensor, landmarks: int, iterations: int = ITERATIONS
) -> Tensor:
    """Attend through landmarks.

    Args:
        q: [B, H, N, d].
        k: [B, H, N, d].
        v: [B, H, N, d].
        landmarks: m; at most N are made.
        iterations: of the pseudo-inverse.

    Returns:
        [B, H, N, d]; what lies between the landmarks is computed in float32 at least.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        few_q, few_k = (segment_means(x, landmarks).to(wide) for x in (q, k))
        between = (few_q @ few_k.mT * q.shape[-1] ** -0.5).softmax(-1)
        read = F.scaled_dot_product_attention(few_q.to(q.dtype), k, v)
        summaries = pseudo_inverse(between, iterations) @ read.to(wide)
        return F.scaled_dot_product_attention(q, few_k.to(q.dtype), summaries.to(q.dtype))


def pseudo_inverse(a: Tensor, iterations: int) -> Tensor:
    """Approach the Moore-Penrose inverse of [..., m, m], whose rows are shares (>= 0, sum 1).

    Razavi et al. 2014. The smaller a singular value, the more iterations it takes; those that are not
    inverted yet are left out almost, never blown up.
    """
    start = a.sum(-2).amax(-1)[..., None, None]  # |A|_1; |A|_inf is the largest sum of a row, which is 1
    z = a.mT / start
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        az = a @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    return z


class Nystromformer(nn.Module):
    """Self-attention of linear complexity through landmarks.

    Args:
        dim: D, a multiple of ``heads``.
        heads: H.
        landmarks: m.
        kernel: odd width in tokens of a depthwise convolution of the values that is added, the paper's
            residual for training (theirs is 33); None for none.
        iterations: of the pseudo-inverse.
    """

    def __init__(
        self, dim: int, heads: int, landmarks: int, kernel: int | None = None, iterations: int = ITERATIONS
    ):
        super().__init__()
        self.heads, self.landmarks, self.iterations = heads, landmarks, iterations
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.residual = None
        if kernel is not None:
            self.residual = nn.Conv2d(
                heads, heads, (kernel, 1), padding=(kernel // 2, 0), groups=heads, bias=False
            )

    def forward(self, x: Tensor) -> Tensor:
        """Attend: [B, N, D] -> [B, N, D]."""
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        read = nystrom_attention(q, k, v, self.landmarks, self.iterations)
        if self.residual is not None:
            read = read + self.residual(v)
        return self.out(merge_heads(read))
