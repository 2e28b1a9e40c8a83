"""SparseContrast (arXiv 2605.00887): contrastive pretraining on the regions a scorer selects.

From the paper: a compact saliency predictor trims attention to relevant regions during contrastive
training; sparsity and feature quality are optimised together. Ours, all of it below:

- the background is demoted to coarse tokens instead of deleted (``models/sparse_vit.py``);
- a quarter of the kept cells is drawn at random while training, so that no cell is never seen fine;
- the scorer s learns what normal anatomy looks like and keeps what it does not foretell
  (``models/surprise.py``), beside the contrast and independent of it:

    L_i = InfoNCE_i + lambda_p (-log N(detail_i; mu, sigma)).

``selection=attention`` puts a plain convolutional scorer in its place, which learns from the
attention a_t of an EMA teacher, run dense on a part of the batch, and from the task through gates of
value 1 on the kept tokens:

    L_i = InfoNCE_i + lambda_d KL(a_t || softmax(s_i)) + lambda_h [floor - H(softmax(s_i))]_+
          + lambda_s (mean sigmoid(s_i) - m / cells)^2.

``method=dense_contrast`` is this file with ``keep = 1`` and no scorer terms; the other values of
``selection`` are baselines without learning. InfoNCE couples the rows of a batch, so ``per_sample``
is false.
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
from sparsecontrast.models.sparse_vit import SparseViT
from sparsecontrast.models.surprise import SurprisePredictor


class SparseContrast(nn.Module):
    """Mixed-resolution contrastive pretraining of one backbone and one saliency predictor.

    Args:
        config: the method's configuration.
        backbone: student; its cells are the scorer's.
    """

    per_sample = False

    def __init__(self, config: MethodConfig, backbone: SparseViT):
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.saliency = (
            SaliencyPredictor(backbone.grid)
            if config.selection == "attention"
            else SurprisePredictor(backbone.grid, config.centre_prior)
        )
        self.projector = nn.Sequential(
            nn.Linear(backbone.embed_dim, config.projection_hidden),
            nn.LayerNorm(config.projection_hidden),
            nn.GELU(),
            nn.Linear(config.projection_hidden, config.projection_dim),
        )
        distils = config.selection == "attention" and config.distill_weight > 0
        self.teacher = copy.deepcopy(backbone).requires_grad_(False) if distils else None
        self.keep = 1.0
        self._last: dict[str, Tensor] = {}

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss of each row [B].

        Raises:
            MethodError: ``keep`` is below what all-coarse cells need.
        """
        self._last = {}
        views = (batch.first, batch.second)
        scores, terms = zip(*(self._read(view) for view in views), strict=True)
        z = [self._project(v, s, batch.generator).float() for v, s in zip(views, scores, strict=True)]
        target = self._attention(batch)
        # bf16 autocast would round similarities and log-probabilities to three digits
        with torch.autocast(batch.first.device.type, enabled=False):
            contrast = losses.info_nce(z[0], z[1], self.config.temperature, batch.patients)
            chance = losses.chance_level(batch.patients)
            self._last |= {"contrast": contrast.detach().mean(), "chance_loss": chance}
            return contrast + (terms[0] + terms[1]) / 2 + self._distillation(scores[0], target)

    def start_round(self, round_number: int, rounds: int) -> None:
        """Set the kept share for this server round."""
        self.keep = keep_ratio(self.config, round_number, rounds)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the EMA teacher towards the student."""
        if self.teacher is None:
            return
        pairs = zip(self.teacher.parameters(), self.backbone.parameters(), strict=True)
        for teacher, student in pairs:
            teacher.lerp_(student, 1 - self.config.momentum)

    def reset_local(self) -> None:
        """Make the teacher the student's equal."""
        if self.teacher is None:
            return
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
        return self.backbone(images, self.kept(images, keep))

    @torch.no_grad()
    def kept(self, images: Tensor, keep: str | float = "sparse") -> Tensor | None:
        """Cells [B, m] that ``encode`` keeps fine, ascending; None, and nothing scored, where all are.

        Raises:
            MethodError: a number below what all-coarse cells need, or above 1.
        """
        m = tokens.fine_cells(self._share(keep), self.backbone.num_cells, self.config.cell)
        return None if m == self.backbone.num_cells else tokens.top_k(self._scores(images), m)

    @torch.no_grad()
    def look(self, images: Tensor) -> Look:
        """Return scores and the cells kept at the configured share."""
        scores = self._scores(images)
        m = tokens.fine_cells(self.config.keep, self.backbone.num_cells, self.config.cell)
        return Look(scores, tokens.top_k(scores, m), self.backbone.grid)

    def _share(self, keep: str | float) -> float:
        named = {"dense": 1.0, "sparse": self.config.keep}
        return named[keep] if isinstance(keep, str) else keep

    def _scores(self, images: Tensor) -> Tensor:
        return self._mask(images, self._select(images, self._learned(images)))

    def _read(self, view: Tensor) -> tuple[Tensor, Tensor]:
        """The scorer's scores [B, cells] and what they cost each row [B]."""
        c = self.config
        if c.selection == "attention":
            scores = self.saliency(view).float()
            return scores, self._budget_terms(scores)
        if c.selection == "surprise" and c.surprise_weight > 0:
            scores, loss = self.saliency.read(view)  # type: ignore[operator]
            self._last["surprise"] = loss.detach().mean()
            return scores, c.surprise_weight * loss
        nothing = view.new_zeros(len(view), dtype=torch.float32)
        return nothing[:, None].expand(-1, self.backbone.num_cells), nothing

    def _project(self, view: Tensor, scores: Tensor, generator: torch.Generator) -> Tensor:
        m = tokens.fine_cells(self.keep, self.backbone.num_cells, self.config.cell)
        if m == self.backbone.num_cells:
            return self.projector(self.backbone(view))
        ranks = self._mask(view, self._select(view, scores.detach(), generator))
        explore = 0.0 if self.config.selection == "random" else self.config.explore
        kept = tokens.explore_top_k(ranks, m, explore, generator)
        if not scores.requires_grad:
            return self.projector(self.backbone(view, kept))
        gate = scores.gather(1, kept).sigmoid()
        return self.projector(self.backbone(view, kept, 1 + gate - gate.detach()))

    def _learned(self, images: Tensor) -> Tensor:
        if self.config.selection in ("surprise", "attention"):
            return self.saliency(images).float()
        return images.new_zeros(images.shape[0], self.backbone.num_cells, dtype=torch.float32)

    def _select(self, images: Tensor, learned: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scores [B, cells] of the configured selection; ``random`` without a generator is a fixed draw."""
        if self.config.selection in ("surprise", "attention"):
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

    def _budget_terms(self, scores: Tensor) -> Tensor:
        """Sparsity budget and entropy floor of attention scores, [B]."""
        c = self.config
        share = tokens.fine_cells(c.keep, self.backbone.num_cells, c.cell) / self.backbone.num_cells
        budget = c.sparsity_weight * losses.sparsity_budget(scores, share)
        return budget + c.entropy_weight * losses.entropy_shortfall(scores, c.entropy_floor)

    def _attention(self, batch: Batch) -> Tensor | None:
        """The teacher's attention on a part of the batch [n, cells], every ``distill_every`` steps."""
        c = self.config
        if self.teacher is None or batch.step % c.distill_every:
            return None
        n = max(1, round(c.distill_fraction * len(batch.first)))
        with torch.no_grad():
            return self.teacher.attention(batch.first[:n]).float()

    def _distillation(self, scores: Tensor, target: Tensor | None) -> Tensor:
        """KL of the rows that the teacher saw, zero for the others, [B]."""
        if target is None:
            return scores.new_zeros(len(scores))
        kl = losses.distillation(scores[: len(target)], target)
        self._last["distillation"] = kl.detach().mean()
        return self.config.distill_weight * F.pad(kl, (0, len(scores) - len(target)))
