"""Means of runs of neighbouring tokens: the landmarks that stand for them; pure functions.

N tokens are cut into m runs whose lengths differ by one at most: where m does not divide N, the first
N mod m runs are the longer ones. Every token counts in one run, none is padded.
"""

import torch
from torch import Tensor


def segment_means(tokens: Tensor, count: int) -> Tensor:
    """Mean of each run of [..., N, D]: [..., min(count, N), D]."""
    n = tokens.shape[-2]
    count = min(count, n)
    short, longer = divmod(n, count)
    split = longer * (short + 1)
    evenly = tokens[..., split:, :].unflatten(-2, (count - longer, short)).mean(-2)
    if not longer:
        return evenly
    head = tokens[..., :split, :].unflatten(-2, (longer, short + 1)).mean(-2)
    return torch.cat([head, evenly], dim=-2)


def segment_matrix(n: int, count: int) -> Tensor:
    """The same as a matrix [min(count, N), N] of float32: its product with tokens [N, D] is their means."""
    count = min(count, n)
    lengths = torch.full((count,), n // count)
    lengths[: n % count] += 1
    owner = torch.arange(count).repeat_interleave(lengths)
    matrix = torch.zeros(count, n)
    matrix[owner, torch.arange(n)] = 1 / lengths[owner].float()
    return matrix
