"""A timm ViT's forward pass taken apart, where a rival must look inside it.

With nothing dropped the pieces put together are timm's own forward pass. Shape letters: B batch, N
tokens with the CLS token, L = patches, K kept, D width, h heads.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from sparsecontrast.models import tokens


def layers(vit: VisionTransformer) -> list[Any]:
    """Name the blocks one by one, first to last."""
    return list(vit.blocks.children())


def quarters(depth: int) -> tuple[int, ...]:
    """Blocks in which tokens are dropped, 0-based: where EViT and DynamicViT drop in 12, at every quarter.

    3, 6 and 9 of 12 blocks; 1, 2 and 3 of 4; fewer stages where there are fewer blocks.
    """
    return tuple(dict.fromkeys(stage * depth // 4 for stage in (1, 2, 3)))


def refuse_beyond(vit: VisionTransformer, stages: Sequence[int]) -> None:
    """Refuse stages at which nothing would ever be dropped.

    Raises:
        ValueError: a stage lies beyond the depth.
    """
    depth = len(layers(vit))
    if beyond := [stage for stage in stages if not 0 <= stage < depth]:
        raise ValueError(f"rivals: no block {beyond} in a ViT of {depth} blocks, counted from 0")


def start(vit: VisionTransformer, images: Tensor, kept: Tensor | None = None) -> Tensor:
    """Return the first block's input [B, N, D]; with ``kept`` [B, K] only these patches are embedded.

    Raises:
        ValueError: the model has prefix tokens besides CLS, which none of the papers has.
    """
    if vit.num_prefix_tokens > 1 or vit.pos_embed is None:
        raise ValueError("rivals: only ViTs with learned positions and at most a CLS token")
    if kept is None:
        return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
    embed, places = vit.patch_embed, vit.pos_embed[0]
    patches = tokens.gather(tokens.patchify(images, embed.patch_size[0]), kept)
    x = embed.norm(F.linear(patches, embed.proj.weight.flatten(1), embed.proj.bias))
    prefix = len(places) - embed.num_patches
    x = x + places[prefix:][kept]
    if vit.cls_token is not None:
        first = vit.cls_token + places[:prefix] if prefix else vit.cls_token
        x = torch.cat([first.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
    return vit.norm_pre(vit.pos_drop(x))


def finish(vit: VisionTransformer, x: Tensor) -> Tensor:
    """Last norm and pooling of tokens [B, N, D]: [B, D]."""
    return vit.forward_head(vit.norm(x), pre_logits=True)


def attend(block: Any, x: Tensor, key_bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The attention half of a block, with the queries and keys that it used.

    Args:
        block: timm's.
        x: [B, N, D].
        key_bias: added to the logits of each key, [B, N].

    Returns:
        x after the residual [B, N, D], queries and keys [B, h, N, D / h].
    """
    attn, (b, n, _) = block.attn, x.shape
    q, k, v = attn.qkv(block.norm1(x)).reshape(b, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    bias = None if key_bias is None else key_bias[:, None, None, :].to(q.dtype)
    if attn.fused_attn:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    else:
        logits = (q * attn.scale) @ k.transpose(-2, -1)
        y = (logits if bias is None else logits + bias).softmax(-1) @ v
    y = attn.proj_drop(attn.proj(attn.norm(y.transpose(1, 2).reshape(b, n, -1))))
    return x + block.drop_path1(block.ls1(y)), q, k


def feed_forward(block: Any, x: Tensor) -> Tensor:
    """The MLP half of a block on tokens [B, N, D]."""
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def split_prefix(vit: VisionTransformer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Cut tokens [B, N, D] into the CLS token [B, 0 or 1, D] and the patches [B, L, D]."""
    return x[:, : vit.num_prefix_tokens], x[:, vit.num_prefix_tokens :]
