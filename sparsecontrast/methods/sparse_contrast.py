"""SparseContrast (arXiv 2605.00887): contrastive pretraining on the regions a scorer selects.

From the paper: a compact saliency predictor trims attention to relevant regions during contrastive
training; sparsity and feature quality are optimised together. Ours, all of it below:

- the background is demoted to coarse tokens instead of deleted (``models/sparse_vit.py``,
  ``models/sparse_cnn.py``);
- a quarter of the kept cells is drawn at random while training, so that no cell is never seen fine;
- the scorer s learns from the attention a_t of an EMA teacher, run dense on a part of the batch:

    L_i = InfoNCE_i + lambda_d KL(a_t || softmax(s_i)) + lambda_h [floor - H(softmax(s_i))]_+
          + lambda_s (mean sigmoid(s_i) - m / cells)^2,

- and from the task itself through gates of value 1 on the kept tokens.

``method=dense_contrast`` is this file with ``keep = 1`` and no scorer terms; ``selection=`` replaces
the learned scores by a baseline. InfoNCE couples the rows of a batch, so ``per_sample`` is false.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsecontrast import losses
from sparsecontrast.config import MethodConfig
from sparsecontrast.methods.method import SHARED, Batch, Look
from sparsecontrast.methods.schedule import keep_ratio
from sparsecontrast.models import tokens
from sparsecontrast.models.saliency import (
    EXCLUDED,
    SaliencyPredictor,
    centre_scores,
    energy_scores,
    excluded_cells,
)
from sparsecontrast.models.sparse_cnn import SparseCNN
from sparsecontrast.models.sparse_vit import SparseViT


class SparseContrast(nn.Module):
    """Mixed-resolution contrastive pretraining of one backbone and one saliency predictor.

    Args:
        config: the method's configuration.
        backbone: student; its cells are the scorer's.
    """

    per_sample = False

    def __init__(self, config: MethodConfig, backbone: SparseViT | SparseCNN):
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.saliency = SaliencyPredictor(backbone.grid)
        self.projector = nn.Sequential(
            nn.Linear(backbone.embed_dim, config.projection_hidden),
            nn.LayerNorm(config.projection_hidden),
            nn.GELU(),
            nn.Linear(config.projection_hidden, config.projection_dim),
        )
        self.teacher = copy.deepcopy(backbone).requires_grad_(False)
        self.keep = 1.0
        self._last: dict[str, Tensor] = {}

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss of each row [B].

        Raises:
            MethodError: ``keep`` is below what all-coarse cells need.
        """
        views = (batch.first, batch.second)
        scores = [self.saliency(view).float() for view in views]
        z = [self._project(v, s, batch.generator).float() for v, s in zip(views, scores, strict=True)]
        target = self._attention(batch)
        # bf16 autocast would round similarities and log-probabilities to three digits
        with torch.autocast(batch.first.device.type, enabled=False):
            contrast = losses.info_nce(z[0], z[1], self.config.temperature, batch.patients)
            chance = losses.chance_level(batch.patients)
            self._last = {"contrast": contrast.detach().mean(), "chance_loss": chance}
            return contrast + self._scorer_terms(scores, target)

    def start_round(self, round_number: int, rounds: int) -> None:
        """Set the kept share for this server round."""
        self.keep = keep_ratio(self.config, round_number, rounds)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the EMA teacher towards the student."""
        pairs = zip(self.teacher.parameters(), self.backbone.parameters(), strict=True)
        for teacher, student in pairs:
            teacher.lerp_(student, 1 - self.config.momentum)

    def reset_local(self) -> None:
        """Make the teacher the student's equal."""
        self.teacher.load_state_dict(self.backbone.state_dict())

    def shared_parameters(self) -> list[str]:
        """Names of the backbone's and the saliency predictor's tensors."""
        return [name for name in self.state_dict() if name.startswith(SHARED)]

    def metrics(self) -> dict[str, float]:
        """Scalars of the last step: contrast, its chance level, kept share, scorer terms."""
        return {"keep": self.keep, **{k: float(v) for k, v in self._last.items()}}

    @torch.no_grad()
    def encode(self, images: Tensor, keep: str | float = "dense") -> Tensor:
        """Embed images [B, 1, H, W] -> [B, D]; ``keep`` is dense, sparse (as configured) or a number."""
        return self.backbone(images, self._kept(self._scores(images), self._share(keep)))

    @torch.no_grad()
    def look(self, images: Tensor) -> Look:
        """Return scores and the cells kept at the configured share."""
        scores = self._scores(images)
        m = self.backbone.kept_cells(self.config.keep)
        return Look(scores, tokens.top_k(scores, m), self.backbone.grid)

    def _share(self, keep: str | float) -> float:
        named = {"dense": 1.0, "sparse": self.config.keep}
        return named[keep] if isinstance(keep, str) else keep

    def _scores(self, images: Tensor) -> Tensor:
        return self._mask(images, self._select(images, self.saliency(images), None))

    def _kept(self, scores: Tensor, share: float) -> Tensor | None:
        """Cells to keep for a share of the tokens; None when all are."""
        m = self.backbone.kept_cells(share)
        return None if m == self.backbone.num_cells else tokens.top_k(scores, m)

    def _project(self, view: Tensor, scores: Tensor, generator: torch.Generator) -> Tensor:
        m = self.backbone.kept_cells(self.keep)
        if m == self.backbone.num_cells:
            return self.projector(self.backbone(view))
        ranks = self._mask(view, self._select(view, scores.detach(), generator))
        explore = 0.0 if self.config.selection == "random" else self.config.explore
        kept = tokens.explore_top_k(ranks, m, explore, generator)
        gate = scores.gather(1, kept).sigmoid()
        return self.projector(self.backbone(view, kept, 1 + gate - gate.detach()))

    def _select(self, images: Tensor, learned: Tensor, generator: torch.Generator | None) -> Tensor:
        """Scores [B, cells] of the configured selection; ``random`` without a generator is a fixed draw."""
        if self.config.selection == "learned":
            return learned
        if self.config.selection == "random":
            if generator is None:
                generator = torch.Generator().manual_seed(0)
                return torch.rand(learned.shape[1], generator=generator).to(learned).expand_as(learned)
            return torch.rand(learned.shape, generator=generator).to(learned)
        if self.config.selection == "centre":
            return centre_scores(self.backbone.grid).to(learned).expand_as(learned)
        return energy_scores(images, self.backbone.grid)

    def _mask(self, images: Tensor, scores: Tensor) -> Tensor:
        return scores + EXCLUDED * excluded_cells(images, self.backbone.grid)

    def _attention(self, batch: Batch) -> Tensor | None:
        """The teacher's attention on a part of the batch [n, cells], every ``distill_every`` steps."""
        c = self.config
        if c.distill_weight == 0 or batch.step % c.distill_every:
            return None
        n = max(1, round(c.distill_fraction * len(batch.first)))
        with torch.no_grad():
            return self.teacher.attention(batch.first[:n]).float()

    def _scorer_terms(self, scores: list[Tensor], target: Tensor | None) -> Tensor:
        """Sparsity, entropy floor and, where there is a target, distillation: [B]."""
        c = self.config
        share = self.backbone.kept_cells(c.keep) / self.backbone.num_cells
        loss = scores[0].new_zeros(len(scores[0]))
        for s in scores:
            loss = loss + c.sparsity_weight * losses.sparsity_budget(s, share) / 2
            loss = loss + c.entropy_weight * losses.entropy_shortfall(s, c.entropy_floor) / 2
        if target is not None:
            n = len(target)
            kl = losses.distillation(scores[0][:n], target)
            self._last["distillation"] = kl.detach().mean()
            loss = loss + c.distill_weight * F.pad(kl, (0, len(loss) - n))
        return loss
