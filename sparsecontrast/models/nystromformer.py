"""Nystromformer: softmax attention through landmarks, the Nystrom way (Xiong et al., arXiv 2102.03902).

    softmax(Q K~^T) softmax(Q~ K~^T)^+ (softmax(Q~ K^T) V)        (equation 13; logits over sqrt(d))

Q~ and K~ are means of runs of neighbouring queries and keys. The pseudo-inverse is found by iterations of
matrix products alone (equation 10). They start from A^T / (|A|_1 |A|_inf) with the norms of ONE sample and
head; the authors' code takes the largest of the batch, through which every row would depend on all others.
With as many landmarks as tokens it is softmax attention, as far as the iterations have converged.
"""

from typing import Any

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
    """Approach the Moore-Penrose inverse of [B, H, m, m], whose rows are shares (>= 0, sum 1).

    Razavi et al. 2014. The smaller a singular value, the more iterations it takes; those that are not
    inverted yet are left out almost, never blown up.
    """
    start = a.sum(-2).amax(-1)[..., None, None]  # |A|_1; |A|_inf is the largest sum of a row, which is 1
    square, first = (x.flatten(0, -3) for x in (a, a.mT / start))
    return _Iterate.apply(square, first, iterations).view(a.shape)  # type: ignore[union-attr]


class _Iterate(torch.autograd.Function):
    """z <- z (13 - y (15 - y (7 - y))) / 4 with y = a z, again and again.

    A step is four small products; recorded one by one they would cost more than they compute. What is kept
    is z of each step.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, z: Tensor, iterations: int) -> Tensor:
        held = [a, z]
        for _ in range(iterations):
            z = torch.baddbmm(z, z, _polynomial(torch.bmm(a, z))[0], beta=0, alpha=0.25)
            held.append(z)
        ctx.save_for_backward(*held)
        return z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (a, *steps), up = ctx.saved_tensors, gradients[0]
        d_a = torch.zeros_like(a)
        for z in reversed(steps[:-1]):
            y = torch.bmm(a, z)
            p, inner, innermost = _polynomial(y)
            d_p = torch.bmm(z.mT, up).mul_(0.25)
            d_inner = torch.bmm(y.mT, d_p)  # less than nothing: each bracket is subtracted
            d_y = torch.bmm(d_p, inner.mT).neg_().baddbmm_(d_inner, innermost.mT)
            d_y.baddbmm_(y.mT, d_inner, alpha=-1)
            d_a.baddbmm_(d_y, z.mT)
            up = torch.bmm(up, p.mT).mul_(0.25).baddbmm_(a.mT, d_y)
        return d_a, up, None


def _polynomial(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """13 - y (15 - y (7 - y)), and its two inner brackets."""
    eye = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
    innermost = 7 * eye - y
    inner = torch.baddbmm(15 * eye, y, innermost, alpha=-1)
    return torch.baddbmm(13 * eye, y, inner, alpha=-1), inner, innermost


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
