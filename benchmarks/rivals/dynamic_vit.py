"""DynamicViT (Rao et al., NeurIPS 2021): small prediction modules drop tokens between stages.

A module (section 3.2, eq. 3-7) sees each patch beside the mean of all patches that are left and gives
log-probabilities of "keep" and "drop". At inference the tokens of highest keep probability stay and
the others are physically gone (section 3.3); that is what this file does in evaluation mode.

Training differs from the paper, knowingly. The paper trains with all tokens present, masks the
attention by Gumbel-softmax decisions and pays two extra losses (keep ratio, distillation): a training
step of it costs MORE than a dense one. Here training drops physically too: Gumbel noise perturbs the
scores, the top K stay, and a straight-through gate of value 1 carries the gradient to the module.
So its training times flatter DynamicViT, and nothing is said about its accuracy.
"""

from collections.abc import Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.rivals import blocks
from sparsecontrast.models import tokens


class PredictionModule(nn.Module):
    """Log-probabilities (keep, drop) of patches [B, L, D]: [B, L, 2].

    Args:
        dim: D, a multiple of 4.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.enter = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.leave = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(),
            nn.Linear(dim // 4, 2),
        )  # fmt: skip

    def forward(self, patches: Tensor) -> Tensor:
        """Judge each patch by its own half of the features and the mean of the others' half."""
        local, shared = self.enter(patches).chunk(2, dim=-1)
        whole = shared.mean(1, keepdim=True).expand_as(local)
        return self.leave(torch.cat([local, whole], dim=-1)).float().log_softmax(-1)


class DynamicViT(nn.Module):
    """A timm ViT with a prediction module in front of some blocks.

    Args:
        vit: on one channel without a classifier.
        rate: stage s keeps ``int(rate^s L)`` of the L patches of the image, s = 1, 2, ...; in (0, 1].
        layers: 0-based blocks in front of which tokens are dropped; None for ``blocks.quarters``, which of
            12 blocks are the paper's.

    Raises:
        ValueError: a block lies beyond the depth.
    """

    def __init__(self, vit: VisionTransformer, rate: float, layers: Sequence[int] | None = None):
        super().__init__()
        chosen = blocks.quarters(len(blocks.layers(vit))) if layers is None else tuple(layers)
        blocks.refuse_beyond(vit, chosen)
        self.vit, self.rate, self.layers = vit, rate, chosen
        self.predictors = nn.ModuleList(PredictionModule(vit.embed_dim) for _ in chosen)

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Embed images [B, 1, H, W] -> [B, D].

        Args:
            images: at the model's size.
            generator: of the Gumbel noise in training; without it nothing is perturbed.
        """
        vit = self.vit
        x = blocks.start(vit, images)
        for number, block in enumerate(blocks.layers(vit)):
            if number in self.layers and self.rate < 1:
                stage = self.layers.index(number)
                head, patches = blocks.split_prefix(vit, x)
                keep = int(self.rate ** (stage + 1) * vit.patch_embed.num_patches + 1e-9)
                x = torch.cat([head, self._drop(patches, stage, keep, generator)], dim=1)
            x = block(x)
        return blocks.finish(vit, x)

    def _drop(self, patches: Tensor, stage: int, keep: int, generator: torch.Generator | None) -> Tensor:
        logits = self.predictors[stage](patches)
        if not self.training:
            return tokens.gather(patches, tokens.top_k(logits[..., 0], keep))
        if generator is not None:
            logits = logits + _gumbel(logits, generator)
        soft = logits.softmax(-1)[..., 0]
        kept = tokens.top_k(soft, keep)
        gate = soft.gather(1, kept)[..., None].to(patches.dtype)
        return tokens.gather(patches, kept) * (1 + gate - gate.detach())


def _gumbel(like: Tensor, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(like.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    return -(-uniform.log()).log().to(like.device)
