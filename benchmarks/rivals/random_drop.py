"""PatchDropout (Liu et al., WACV 2023) and FLIP (Li et al., CVPR 2023): a random part of the patches.

A uniform random subset of the patches, of the same size for every image, enters the ViT; nothing
stands for the others, and only the kept patches are embedded. Both papers train so and infer with all
patches (``kept=None``); inference at the same share is what a sparse rival would do.
"""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.rivals import blocks
from sparsecontrast.models import tokens


def random_drop(vit: VisionTransformer, images: Tensor, kept: Tensor | None) -> Tensor:
    """Embed images [B, 1, H, W] -> [B, D] from patches ``kept`` [B, K] alone; None is dense."""
    return blocks.finish(vit, vit.blocks(blocks.start(vit, images, kept)))


def random_patches(batch: int, patches: int, keep: float, generator: torch.Generator) -> Tensor:
    """Draw ``round(keep L)`` of L patches for each image, uniformly: [B, K], each row ascending."""
    return tokens.top_k(torch.rand(batch, patches, generator=generator), round(keep * patches))
