"""Attention through a few summaries: many tokens are gathered into them, and read from them again.

    gather: s_j = sum_n P_jn v_n,  P_jn = softmax over the tokens n of (scale q_j k_n + bias_n)
    spread: o_n = sum_j P_nj v_j,  P_nj = softmax over the summaries j of (scale q_n k_j + bias_j)

Torch's fused attention does either, but takes no bias that has a gradient and does not tell what a softmax
was divided by. Here P [m, N] never lies in memory as a whole either: it is made for a run of tokens, short
enough for the processor's cache, and anew for the backward pass (Dao et al., arXiv 2205.14135). Logits and
sums are in float32 at least, whatever the tokens are in: in bf16 a logit of 100 would be off by a quarter.
Maxima are those of one query of one sample and head; no row of a batch knows of another.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CACHE_BYTES = 2**20  # of the logits of one run, on a CPU: half of a level-2 cache
GPU_BYTES = 2**28  # a GPU wants few large products
LEAST_RUN = 64


def gather(
    queries: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Let few queries read all tokens.

    Args:
        queries: [B, H, m, d], one a summary.
        k: [B, H, N, d], N >= 1.
        v: [B, H, N, e].
        scale: of the logits.
        bias: of the tokens [B, H, N], added to the logits of every query.

    Returns:
        Summaries [B, H, m, e], and the logarithm of what each one's softmax was divided by [B, H, m], both in
        float32 at least.
    """
    return _Gather.apply(queries, k, v, bias, scale)  # type: ignore[return-value]


def spread(q: Tensor, keys: Tensor, values: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Let all tokens read few summaries: [B, H, N, e] in the type of ``q``.

    Args:
        q: [B, H, N, d].
        keys: [B, H, m, d], one a summary, m >= 1.
        values: [B, H, m, e].
        scale: of the logits.
        bias: of the summaries [B, H, m], added to the logits of every token.
    """
    return _Spread.apply(q, keys, values, bias, scale)  # type: ignore[return-value]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Any:
        few = _wide(queries)
        top = few.new_full((*few.shape[:2], 1), -torch.inf)
        mass, total = torch.zeros_like(top), few.new_zeros(*few.shape[:2], v.shape[3])
        for run in _runs(k, few):
            logits = _logits(few, _wide(k, run), scale, None if bias is None else _wide(bias, run)[:, None])
            higher = torch.maximum(top, logits.amax(2, keepdim=True))
            shrink, shares = (top - higher).exp_(), logits.sub_(higher).exp_()
            mass.mul_(shrink).add_(shares.sum(2, keepdim=True))
            total.mul_(shrink).baddbmm_(shares, _wide(v, run))
            top = higher
        total.div_(mass)
        mass = mass.log_().add_(top)
        ctx.scale = scale
        ctx.save_for_backward(queries, k, v, bias, total, mass)
        return total.unflatten(0, k.shape[:2]), mass.view(queries.shape[:3])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        queries, k, v, bias, total, mass = ctx.saved_tensors
        few, up, scale = _wide(queries), _wide(gradients[0]), ctx.scale
        common = (up * total).sum(2, keepdim=True) - _wide(gradients[1])[..., None]
        d_few, d_k, d_v = torch.zeros_like(few), _empty_tokens(k), _empty_tokens(v)
        d_bias = None if bias is None else torch.empty_like(bias)
        for run in _runs(k, few):
            keys = _wide(k, run)
            logits = _logits(few, keys, scale, None if bias is None else _wide(bias, run)[:, None])
            shares = logits.sub_(mass).exp_()
            _write(d_v, run, shares.mT @ up)
            down = torch.bmm(up, _wide(v, run).mT).sub_(common).mul_(shares)
            if ctx.needs_input_grad[0]:
                d_few.baddbmm_(down, keys, alpha=scale)
            _write(d_k, run, torch.bmm(down.mT, few).mul_(scale))
            if d_bias is not None:
                _write(d_bias, run, down.sum(1))
        return d_few.to(queries.dtype).view(queries.shape), d_k, d_v, d_bias, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        few, worth, shift = _wide(keys), _wide(values), None if bias is None else _wide(bias)[:, None]
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], values.shape[3]).transpose(1, 2)
        for run in _runs(q, few):
            shares = _logits(_wide(q, run), few, scale, shift).softmax(2)
            _write(out, run, shares @ worth)
        ctx.scale = scale
        ctx.save_for_backward(q, keys, values, bias)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q, keys, values, bias = ctx.saved_tensors
        few, worth, shift = _wide(keys), _wide(values), None if bias is None else _wide(bias)[:, None]
        scale, d_q = ctx.scale, _empty_tokens(q)
        d_few, d_worth = torch.zeros_like(few), torch.zeros_like(worth)
        d_shift = None if shift is None else torch.zeros_like(shift)
        for run in _runs(q, few):
            asked, up = _wide(q, run), _wide(gradients[0], run)
            shares = _logits(asked, few, scale, shift).softmax(2)
            d_worth.baddbmm_(shares.mT, up)
            down = torch.bmm(up, worth.mT)
            down.sub_((down * shares).sum(2, keepdim=True)).mul_(shares)
            if ctx.needs_input_grad[1]:
                d_few.baddbmm_(down.mT, asked, alpha=scale)
            _write(d_q, run, torch.bmm(down, few).mul_(scale))
            if d_shift is not None:
                d_shift.add_(down.sum(1, keepdim=True))
        d_few, d_worth = d_few.to(keys.dtype).view(keys.shape), d_worth.to(values.dtype).view(values.shape)
        d_bias = None if bias is None or d_shift is None else d_shift.to(bias.dtype).view(bias.shape)
        return d_q, d_few, d_worth, d_bias, None


def _runs(tokens: Tensor, few: Tensor) -> Iterator[slice]:
    """Cut the tokens [B, H, N, ...] so that the logits of a run fit the cache."""
    limit = CACHE_BYTES if tokens.device.type == "cpu" else GPU_BYTES
    length = max(LEAST_RUN, limit // max(1, few.shape[0] * few.shape[1] * few.element_size()))
    return (slice(start, start + length) for start in range(0, tokens.shape[2], length))


def _wide(x: Tensor, run: slice | None = None) -> Tensor:
    """Take a run of [B, H, N, ...] as [B H, run, ...] in float32 at least; a copy only where it must be."""
    part = x if run is None else x[:, :, run]
    return part.flatten(0, 1).to(torch.promote_types(x.dtype, torch.float32))


def _logits(left: Tensor, right: Tensor, scale: float, shift: Tensor | None) -> Tensor:
    if shift is None:
        return torch.bmm(left, right.mT).mul_(scale)
    return torch.baddbmm(shift, left, right.mT, alpha=scale)


def _write(whole: Tensor, run: slice, part: Tensor) -> None:
    """Put [B H, run, ...] to its place in [B, H, N, ...], in the type of the whole."""
    whole[:, :, run] = part.view(*whole.shape[:2], *part.shape[1:])


def _empty_tokens(like: Tensor) -> Tensor:
    """Room for [B, H, N, d] that lies in memory as tokens [B, N, H d] do, heads side by side."""
    b, h, n, d = like.shape
    return like.new_empty(b, n, h, d).transpose(1, 2)
