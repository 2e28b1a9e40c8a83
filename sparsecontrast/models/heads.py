"""Tokens to heads of attention and back; pure functions, views wherever memory allows."""

from torch import Tensor


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """[B, N, H d] -> [B, H, N, d]."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(tokens: Tensor) -> Tensor:
    """[B, H, N, d] -> [B, N, H d]."""
    return tokens.transpose(1, 2).flatten(2)
