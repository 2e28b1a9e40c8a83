"""The plain rivals: the whole image, coarser everywhere.

``low_resolution`` is a dense ViT on a smaller image of equal cost, its position embedding resampled
by timm (bicubic); ``all_coarse`` is SparseViT with every cell one token, no predictor needed.
"""

import copy

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from sparsecontrast.models.sparse_vit import SparseViT


def equal_cost_size(size: int, step: int, keep: float) -> int:
    """Side of the square image with about ``keep`` of the area: a multiple of ``step``, at least one."""
    return max(1, round(keep**0.5 * size / step)) * step


def at_size(vit: VisionTransformer, size: int) -> VisionTransformer:
    """Copy a ViT for images of ``size`` pixels, a multiple of its patch; the weights stay what they are."""
    small = copy.deepcopy(vit)
    small.set_input_size(img_size=(size, size))
    return small


def low_resolution(network: torch.nn.Module, images: Tensor, size: int) -> Tensor:
    """Embed images [B, 1, H, W], reduced to ``size`` pixels, by a timm network of that size: [B, D]."""
    if images.shape[-1] != size:
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return network(images)


def all_coarse(sparse: SparseViT, images: Tensor) -> Tensor:
    """Embed images [B, 1, H, W] -> [B, D] with one token a cell."""
    return sparse(images, torch.zeros(len(images), 0, dtype=torch.long, device=images.device))
