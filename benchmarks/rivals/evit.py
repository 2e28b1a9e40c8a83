"""EViT (Liang et al., "Not All Patches are What You Need", ICLR 2022): drop by attention, fuse the rest.

At a dropping layer, between attention and MLP, the tokens that the pooling query attends to most
stay; the others become one fused token (section 3.2):

    x_fused = sum_{i dropped} a_i x_i,    a = attention of CLS to the patches, averaged over heads.

The weights a_i are those of the full attention row and are not normalised again, as in the paper and
the authors' code. Ours: a model that pools by the mean is asked by its mean query, and its fused
token counts as one token of the mean.
"""

import math
from collections.abc import Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.rivals import blocks
from sparsecontrast.models import tokens


def evit(vit: VisionTransformer, images: Tensor, rate: float, layers: Sequence[int] | None = None) -> Tensor:
    """Embed images [B, 1, H, W] -> [B, D].

    Args:
        vit: on one channel without a classifier.
        images: at its size.
        rate: share of the patches that stays at EACH layer of ``layers``, in (0, 1]; 1 is dense.
        layers: 0-based; one layer is the single-stage variant; None for ``blocks.quarters``, which in 12
            layers are the paper's: the 4th, 7th and 10th.

    Raises:
        ValueError: a layer lies beyond the depth.
    """
    layers = blocks.quarters(len(blocks.layers(vit))) if layers is None else layers
    blocks.refuse_beyond(vit, layers)
    x = blocks.start(vit, images)
    for number, block in enumerate(blocks.layers(vit)):
        if number not in layers or rate == 1:
            x = block(x)
            continue
        x, q, k = blocks.attend(block, x)
        attention = query_attention(q, k, vit.global_pool == "token", vit.num_prefix_tokens)
        head, patches = blocks.split_prefix(vit, x)
        x = blocks.feed_forward(block, torch.cat([head, drop_and_fuse(patches, attention, rate)], dim=1))
    return blocks.finish(vit, x)


def stage_rate(keep: float, stages: int) -> float:
    """Rate of each of ``stages`` equal stages that leaves the share ``keep`` of the patches at the end.

    Rounding up and a fused token at each stage leave a few tokens more.
    """
    return keep ** (1 / stages)


def query_attention(q: Tensor, k: Tensor, cls: bool, prefix: int) -> Tensor:
    """Attention of CLS, or of the mean query, to the patches, averaged over heads: [B, L].

    Args:
        q: queries of all tokens [B, h, N, d], not scaled.
        k: keys [B, h, N, d].
        cls: ask by the first token; else by the mean of all queries.
        prefix: tokens in front of the patches; they take part in the softmax, so rows sum to <= 1.
    """
    query = q[:, :, :1] if cls else q.mean(2, keepdim=True)
    weights = ((query * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).float().softmax(-1)
    return weights[:, :, 0, prefix:].mean(1)


def drop_and_fuse(patches: Tensor, attention: Tensor, rate: float) -> Tensor:
    """Keep ceil(rate L) of patches [B, L, D] by attention [B, L]; the fused token of the others comes last.

    With nothing dropped there is nothing to fuse, and no token is added.
    """
    length = patches.shape[1]
    kept = tokens.top_k(attention, math.ceil(rate * length - 1e-9))
    rest = tokens.complement(kept, length)
    if rest.shape[1] == 0:
        return patches
    weights = attention.gather(1, rest).to(patches.dtype)
    fused = (tokens.gather(patches, rest) * weights[..., None]).sum(1, keepdim=True)
    return torch.cat([tokens.gather(patches, kept), fused], dim=1)
