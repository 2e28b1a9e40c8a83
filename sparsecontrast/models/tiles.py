"""Tiles of an image as pure functions: where they lie, cutting them out, pooling feature maps over them.

An image of S x S pixels is divided into ``tiles x tiles`` cells, numbered row by row. A cell is computed
inside a *window*: its own pixels and ``halo`` more to each side, moved inwards at the edge of the image:
no pixel is made up. Cells and halo are whole strides of the network, so the feature maps of a window
lie on those of the whole image; off them a ConvNeXt's features come out wrong by a half and more.
"""

import torch
from torch import Tensor

from sparsecontrast.levels import STRIDE as STRIDE


def window_size(img_size: int, tiles: int, halo: int) -> int:
    """Side of a window in pixels: a tile and two halos, at most the image."""
    return min(img_size // tiles + 2 * halo, img_size)


def window_starts(img_size: int, tiles: int, window: int, halo: int) -> Tensor:
    """First pixel of each window along one axis: [tiles] long, within 0..img_size - window."""
    return (torch.arange(tiles) * (img_size // tiles) - halo).clamp(0, img_size - window)


def cut(images: Tensor, kept: Tensor, starts: Tensor, window: int) -> Tensor:
    """Cut the windows of the cells ``kept`` [B, m] out of images [B, 1, H, W]: [B * m, 1, window, window].

    Args:
        images: whole images.
        kept: cell numbers, in any order.
        starts: first pixel of each window along one axis, [tiles].
        window: side of a window.
    """
    offsets = torch.arange(window, device=images.device)
    rows = starts[kept // len(starts)][..., None] + offsets
    columns = starts[kept % len(starts)][..., None] + offsets
    # shape, not len(), which would fix the batch of a graph that is traced
    sample = torch.arange(images.shape[0], device=images.device)[:, None, None, None]
    return images[:, 0][sample, rows[..., :, None], columns[..., None, :]].flatten(0, 1)[:, None]


def span_weights(start: float, stop: float, size: int, bins: int) -> Tensor:
    """Share of the pixels ``start..stop`` in each of ``bins`` equal parts of ``size``: [bins], sum 1."""
    edges = torch.linspace(0, size, bins + 1, dtype=torch.float64)
    shared = (edges[1:].clamp_max(stop) - edges[:-1].clamp_min(start)).clamp_min(0)
    return (shared / shared.sum()).float()


def whole_weights(img_size: int, tiles: int, bins: int) -> Tensor:
    """Weights [cells, bins^2] that pool a ``bins x bins`` map of the whole image over each cell's area."""
    tile = img_size // tiles
    spans = [span_weights(i * tile, (i + 1) * tile, img_size, bins) for i in range(tiles)]
    return torch.stack([torch.outer(row, column).flatten() for row in spans for column in spans])


def window_weights(img_size: int, starts: Tensor, window: int, bins: int) -> Tensor:
    """Weights [cells, bins^2] that pool each window's own map over its cell: the halo has none."""
    tile = img_size // len(starts)
    first = [i * tile - start for i, start in enumerate(starts.tolist())]
    spans = [span_weights(f, f + tile, window, bins) for f in first]
    return torch.stack([torch.outer(row, column).flatten() for row in spans for column in spans])


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Relative L2 error of descriptors [..., D]: [...], 0 where they agree."""
    return (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
