"""Tokens as pure functions: cut an image into patches and cells, choose cells, move tokens.

A *patch* is ``p x p`` pixels (one fine token). A *cell* is ``c x c`` patches; it enters the backbone
either as its ``c * c`` fine tokens or as one coarse token. All tokens L = cells x c^2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut images [B, C, H, W] into patches [B, L, C * patch * patch], row by row.

    The last axis is ordered (channel, row, column), as a convolution's weight is, so that a
    patch-embedding convolution equals one matrix product.
    """
    b, c, h, w = images.shape
    x = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // patch) * (w // patch), c * patch * patch)


def cell_patches(images: Tensor, patch: int, cell: int) -> Tensor:
    """Cut images [B, C, H, W] into fine patches grouped by cell: [B, cells, cell^2, C * patch^2].

    Within a cell the patches run row by row.
    """
    b, c = images.shape[:2]
    return _cell_view(images, patch, cell).reshape(b, -1, cell * cell, c * patch * patch)


def join_cells(patches: Tensor, grid: tuple[int, int], patch: int, cell: int) -> Tensor:
    """Put one-channel patches grouped by cell together: the inverse of ``cell_patches``.

    Args:
        patches: [B, cells, cell^2, patch^2].
        grid: cells (rows, columns).
        patch: side of a patch in pixels.
        cell: patches of a cell's side.

    Returns:
        Images [B, 1, H, W].
    """
    rows, columns = grid
    x = patches.reshape(-1, rows, columns, cell, cell, patch, patch).permute(0, 1, 3, 5, 2, 4, 6)
    side = patch * cell
    return x.reshape(-1, 1, rows * side, columns * side)


def kept_patches(images: Tensor, patch: int, cell: int, kept: Tensor) -> Tensor:
    """Copy the fine patches of cells ``kept`` [B, m], and no other pixel: [B, m * cell^2, C * patch^2]."""
    b, c, _, width = images.shape
    columns = width // (patch * cell)
    rows = torch.arange(b, device=images.device)[:, None]
    fine = _cell_view(images, patch, cell)[rows, kept // columns, kept % columns]
    return fine.reshape(b, -1, c * patch * patch)


def _cell_view(images: Tensor, patch: int, cell: int) -> Tensor:
    """View images [B, C, H, W] as [B, rows, columns, cell, cell, C, patch, patch], nothing copied."""
    b, c, h, w = images.shape
    side = patch * cell
    x = images.reshape(b, c, h // side, cell, patch, w // side, cell, patch)
    return x.permute(0, 2, 5, 3, 6, 1, 4, 7)


def cell_positions(grid: tuple[int, int], cell: int) -> Tensor:
    """Patch indices of each cell: [cells, cell^2] long, for a patch grid (rows, columns)."""
    rows, columns = grid
    index = torch.arange(rows * columns).reshape(1, 1, rows, columns)
    return cell_patches(index, 1, cell).reshape(-1, cell * cell)


def shrink(images: Tensor, factor: int) -> Tensor:
    """Mean-pool images [B, C, H, W] by ``factor``, which divides H and W.

    Halving by strided sums takes a quarter of the time of ``avg_pool2d`` on a CPU.
    """
    while factor % 2 == 0:
        rows = images[..., ::2, :] + images[..., 1::2, :]
        images, factor = (rows[..., ::2] + rows[..., 1::2]) * 0.25, factor // 2
    return images if factor == 1 else F.avg_pool2d(images, factor)


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices [B, k] of the k highest scores [B, N] of each row, ascending; ties go to the lower index."""
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    return order[:, :k].sort(dim=1).values


def explore_top_k(
    scores: Tensor, k: int, explore: float, generator: torch.Generator, allowed: Tensor | None = None
) -> Tensor:
    """Choose k of N cells: ``k - round(explore * k)`` top-scored, the rest uniform among the others.

    Args:
        scores: [B, N].
        k: how many, in 0..N.
        explore: share drawn at random, in [0, 1).
        generator: the only source of randomness.
        allowed: boolean [B, N], at least k true in each row; others are never chosen. None allows all.

    Returns:
        Indices [B, k], ascending, without repeats.
    """
    quota = round(explore * k)
    noise = torch.rand(scores.shape, generator=generator).to(scores.device)
    if allowed is not None:
        noise, scores = noise.masked_fill(~allowed, -1.0), scores.masked_fill(~allowed, -torch.inf)
    if quota == k:
        return top_k(noise, k)
    best = top_k(scores, k - quota)
    # a value above every random draw puts the top-scored cells first and leaves the rest to chance
    return top_k(noise.scatter(1, best, 2.0), k)


def complement(taken: Tensor, n: int, among: Tensor | None = None) -> Tensor:
    """Indices that ``taken`` [B, k] leaves out, ascending.

    A stable sort of the mask, not ``nonzero``: its shape is known beforehand, which a graph with a
    free batch needs, and for which a GPU need not wait.

    Args:
        taken: indices in 0..n-1, each row without repeats.
        n: how many there are.
        among: [B, a] that holds all of ``taken``; None for all of 0..n-1.

    Returns:
        [B, n - k], or [B, a - k].
    """
    b = taken.shape[0]
    left = torch.zeros(b, n, dtype=torch.uint8, device=taken.device)
    if among is None:
        left, total = left + 1, n
    else:
        left, total = left.scatter(1, among, 1), among.shape[1]
    left = left.scatter(1, taken, 0)
    return left.sort(dim=1, descending=True, stable=True).indices[:, : total - taken.shape[1]]


def gather(tokens: Tensor, index: Tensor) -> Tensor:
    """Take rows ``index`` [B, K] of tokens [B, L, ...]: [B, K, ...]."""
    shape = (*index.shape, *tokens.shape[2:])
    return tokens.gather(1, index.reshape(*index.shape, *[1] * (tokens.dim() - 2)).expand(shape))


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """Take rows ``index`` [B, K] of one table for all [1, L, D], or of a table each [B, L, D]: [B, K, D]."""
    return table[0][index] if table.shape[0] == 1 else gather(table, index)


def scatter(tokens: Tensor, index: Tensor, length: int) -> Tensor:
    """Put tokens [B, K, ...] at ``index`` [B, K] of zeros [B, length, ...]: the inverse of gather."""
    out = tokens.new_zeros(tokens.shape[0], length, *tokens.shape[2:])
    return out.scatter(1, index.reshape(*index.shape, *[1] * (tokens.dim() - 2)).expand_as(tokens), tokens)
