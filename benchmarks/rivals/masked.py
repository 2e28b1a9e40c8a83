"""Fake sparsity, for the record: dropped patches stay in every block and are only masked as keys.

The embedding equals that of ``random_drop`` for the same patches; the cost is the dense one.
"""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.rivals import blocks


def masked(vit: VisionTransformer, images: Tensor, kept: Tensor) -> Tensor:
    """Embed images [B, 1, H, W] -> [B, D], attention masked to CLS and patches ``kept`` [B, K]."""
    x = blocks.start(vit, images)
    prefix = vit.num_prefix_tokens
    seen = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    seen[:, :prefix] = True
    seen.scatter_(1, kept + prefix, True)
    for block in blocks.layers(vit):
        x = block(x, attn_mask=seen[:, None, None, :])
    if vit.global_pool == "token":
        return blocks.finish(vit, x)
    share = (seen[:, prefix:, None] / kept.shape[1]).to(x.dtype)
    return vit.head_drop(vit.fc_norm((vit.norm(x)[:, prefix:] * share).sum(1)))
