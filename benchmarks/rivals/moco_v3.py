"""MoCo v3 (Chen, Xie and He, arXiv 2104.02057): contrast over the batch with a momentum encoder, no queue.

Algorithm 1 and section 4: an encoder with a three-layer projector and a two-layer predictor gives queries,
an average of its past weights gives keys, and InfoNCE is symmetric and scaled by 2 tau. The patch projection
stays as it was drawn, which the authors found to keep ViTs stable, and the average's momentum rises to 1
along a cosine. The heads hold BatchNorm, as theirs do: every row knows of every other, so this could not be
private. Ours: heads as wide as a small ViT needs, and positions that are learned, as in every other arm.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsecontrast.methods.method import Batch
from sparsecontrast.models.sparse_vit import SparseViT

MOMENTUM = 0.99  # at the start
TEMPERATURE = 0.2


class MocoV3(nn.Module):
    """Momentum contrast of one backbone.

    Args:
        backbone: student.
        steps: of the whole training, along which the momentum rises.
        hidden: width of the heads.
        out: of what is compared.
    """

    def __init__(self, backbone: SparseViT, steps: int, hidden: int = 512, out: int = 128):
        super().__init__()
        self.backbone, self.steps, self.momentum = backbone, steps, MOMENTUM
        backbone.vit.patch_embed.proj.requires_grad_(False)
        backbone.coarse.requires_grad_(False)  # no coarse cell is ever computed
        self.projector = head(backbone.embed_dim, hidden, out, 3)
        self.predictor = head(out, hidden, out, 2)
        self.average = copy.deepcopy(nn.ModuleList([backbone, self.projector])).requires_grad_(False)

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss of each row [B], which depends on all rows."""
        self.momentum = momentum(batch.step, self.steps)
        queries = [self.predictor(self.projector(self.backbone(x))) for x in (batch.first, batch.second)]
        with torch.no_grad():
            keys = [self.average[1](self.average[0](x)) for x in (batch.first, batch.second)]
        with torch.autocast(batch.first.device.type, enabled=False):
            return contrast(queries[0], keys[1]) + contrast(queries[1], keys[0])

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the average towards the encoder."""
        student = nn.ModuleList([self.backbone, self.projector])
        for mean, now in zip(self.average.parameters(), student.parameters(), strict=True):
            mean.lerp_(now, 1 - self.momentum)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Embed images [B, 1, H, W] -> [B, D]."""
        return self.backbone(images)


def contrast(queries: Tensor, keys: Tensor) -> Tensor:
    """InfoNCE of queries [B, C] whose positives are the keys of the same rows, times 2 tau: [B]."""
    logits = F.normalize(queries.float(), dim=1) @ F.normalize(keys.float(), dim=1).T / TEMPERATURE
    target = torch.arange(len(logits), device=logits.device)
    return 2 * TEMPERATURE * F.cross_entropy(logits, target, reduction="none")


def momentum(step: int, steps: int) -> float:
    """Share of the past in the average at a 0-based step: from ``MOMENTUM`` to 1 along a cosine."""
    return 1 - (1 - MOMENTUM) * (1 + math.cos(math.pi * min(1.0, step / steps))) / 2


def head(width: int, hidden: int, out: int, layers: int) -> nn.Sequential:
    """Linear layers with BatchNorm after each, the last without weights of its own, and ReLU between."""
    widths = [width, *[hidden] * (layers - 1), out]
    parts: list[nn.Module] = []
    for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
        last = i == layers - 1
        parts += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b, affine=not last)]
        parts += [] if last else [nn.ReLU()]
    return nn.Sequential(*parts)
