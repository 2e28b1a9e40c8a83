"""ToMe (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023): merge r similar tokens a layer.

Between attention and MLP of every block (section 3): tokens alternate into sets A and B; each token
of A has one edge, to the token of B of highest cosine similarity of their keys averaged over heads; the
r best edges are merged by the mean weighted with the tokens' sizes s (the patches they stand for).
Attention is proportional (eq. 1): softmax(Q K^T / sqrt(d) + log s). CLS never merges. A model
that pools by the mean weights it by size, as the authors do for MAE.
"""

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.rivals import blocks


def tome(vit: VisionTransformer, images: Tensor, r: int) -> Tensor:
    """Embed images [B, 1, H, W] -> [B, D].

    Args:
        vit: on one channel without a classifier.
        images: at its size.
        r: tokens merged away in each block, >= 0; at most half of those that are left.
    """
    x = blocks.start(vit, images)
    size: Tensor | None = None
    for block in blocks.layers(vit):
        if r == 0:
            x = block(x)
            continue
        x, _, k = blocks.attend(block, x, None if size is None else size.log()[..., 0])
        edges = bipartite_soft_matching(k.mean(1), r, vit.num_prefix_tokens)
        size = x.new_ones(*x.shape[:2], 1, dtype=torch.float32) if size is None else size
        x, size = merge(x, size, *edges)
        x = blocks.feed_forward(block, x)
    return blocks.finish(vit, x) if size is None else _pool(vit, x, size)


def merged_per_block(vit: VisionTransformer, keep: float) -> int:
    """The r that leaves about ``keep`` of the patches after the last block."""
    return round((1 - keep) * vit.patch_embed.num_patches / len(blocks.layers(vit)))


def bipartite_soft_matching(metric: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Match tokens of even places (set A) with tokens of odd places (set B).

    Args:
        metric: [B, N, d], compared by cosine.
        r: edges to take; fewer where A minus the CLS token is smaller.
        prefix: 1 if the first token is CLS and may not merge, else 0.

    Returns:
        Indices into A that stay [B, |A| - r], ascending; indices into A that merge [B, r]; and
        where into B [B, r].
    """
    with torch.no_grad():
        unit = F.normalize(metric, dim=-1)
        scores = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).float()
        scores[:, :prefix] = -torch.inf
        best, partner = scores.max(-1)
        order = best.argsort(dim=1, descending=True, stable=True)
        r = min(r, scores.shape[1] - prefix)
        source = order[:, :r]
        return order[:, r:].sort(1).values, source, partner.gather(1, source)


def merge(x: Tensor, size: Tensor, stay: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Merge tokens [B, N, D] of sizes [B, N, 1] by the mean weighted with size: N - r tokens, A before B."""
    total = _sum(torch.cat([x * size.to(x.dtype), size.to(x.dtype)], dim=-1), stay, source, target)
    x, merged = total[..., :-1], total[..., -1:]
    return x / merged, merged.float()


def _sum(x: Tensor, stay: Tensor, source: Tensor, target: Tensor) -> Tensor:
    a, b = x[:, ::2], x[:, 1::2]
    width = x.shape[-1]
    moved = a.gather(1, source[..., None].expand(-1, -1, width))
    b = b.scatter_add(1, target[..., None].expand(-1, -1, width), moved)
    return torch.cat([a.gather(1, stay[..., None].expand(-1, -1, width)), b], dim=1)


def _pool(vit: VisionTransformer, x: Tensor, size: Tensor) -> Tensor:
    if vit.global_pool == "token":
        return blocks.finish(vit, x)
    patches, weight = vit.norm(x)[:, vit.num_prefix_tokens :], size[:, vit.num_prefix_tokens :].to(x.dtype)
    return vit.head_drop(vit.fc_norm((patches * weight).sum(1) / weight.sum(1)))
