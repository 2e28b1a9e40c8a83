"""SparseContrast (arXiv 2605.00887): contrastive pretraining on the regions a scorer selects.

From the paper: a compact saliency predictor trims attention to relevant regions during contrastive
training; sparsity and feature quality are optimised together. Ours, all of it below:

- the background is demoted to coarse tokens instead of deleted (``models/sparse_vit.py``,
  ``models/sparse_cnn.py``);
- a quarter of the kept cells is drawn at random while training, so that no cell is never seen fine;
- the scorer s learns what normal anatomy looks like and keeps what it does not foretell
  (``models/surprise.py``), beside the contrast and independent of it:

    L_i = InfoNCE_i + lambda_p (-log N(detail_i; mu, sigma));

- the embedding is the mean over the image beside a mean over the kept cells, weighted by softmax(s)
  (``method.focus``): in a mean over the whole chest a small lesion drowns.

``selection=attention`` puts a plain convolutional scorer in its place, which learns from the
attention a_t of an EMA teacher, run dense on a part of the batch, and from the task through those
weights:

    L_i = InfoNCE_i + lambda_d KL(a_t || softmax(s_i)) + lambda_h [floor - H(softmax(s_i))]_+
          + lambda_s (mean sigmoid(s_i) - m / cells)^2.

``method=dense_contrast`` is this file with ``keep = 1`` and no scorer terms; the other values of
``selection`` are baselines without learning. InfoNCE couples the rows of a batch, so ``per_sample``
is false.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecontrast import losses
from sparsecontrast.methods.looking import Looking, build_projector
from sparsecontrast.methods.method import Batch, Choice
from sparsecontrast.models import tokens
from sparsecontrast.models.sparse_cnn import SparseCNN
from sparsecontrast.models.sparse_vit import SparseViT
from sparsecontrast.settings import MethodConfig


class SparseContrast(Looking):
    """Mixed-resolution contrastive pretraining of one backbone and one saliency predictor.

    Args:
        config: the method's configuration.
        backbone: student; its cells are the scorer's.
    """

    per_sample = False

    def __init__(self, config: MethodConfig, backbone: SparseViT | SparseCNN):
        super().__init__(config, backbone)
        self.projector = build_projector(self.embed_dim, config)
        distils = config.selection == "attention" and config.distill_weight > 0
        self.teacher = copy.deepcopy(backbone).requires_grad_(False) if distils else None

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss of each row [B].

        Raises:
            MethodError: ``keep`` is below what all-coarse cells need.
        """
        self._last = {}
        views = torch.cat([batch.first, batch.second])
        scores, terms = self._read(views, batch.generator)
        choice = self._explore(views, scores, batch.generator)
        first, second = self.projector(self.backbone(views, *choice)).float().chunk(2)
        target = self._attention(batch)
        # bf16 autocast would round similarities and log-probabilities to three digits
        with torch.autocast(batch.first.device.type, enabled=False):
            contrast = losses.info_nce(first, second, self.config.temperature, batch.patients)
            chance = losses.chance_level(batch.patients)
            self._last |= {"contrast": contrast.detach().mean(), "chance_loss": chance}
            return contrast + terms.reshape(2, -1).mean(0) + self._distillation(scores, target)

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

    def _read(self, views: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Scores of all cells [N, cells], and what the scorer's own terms cost each view [N]."""
        if self.config.selection != "attention":
            return super()._read(views, generator)
        scores = self.saliency(views).float()
        return scores, self._budget_terms(scores)

    def _explore(self, views: Tensor, scores: Tensor, generator: torch.Generator) -> Choice:
        """Choose as ``choose`` does, with a share of the cells drawn at random."""
        m = self.backbone.kept_cells(self.keep)
        dense = m == self.backbone.num_cells
        if dense and not self.config.focus:
            return Choice(None, None)
        scores = self._masked(views, scores)
        explore = 0.0 if self.config.selection == "random" else self.config.explore
        kept = None if dense else tokens.explore_top_k(scores.detach(), m, explore, generator)
        return Choice(kept, self._focus(scores, kept))

    def _budget_terms(self, scores: Tensor) -> Tensor:
        """Sparsity budget and entropy floor of attention scores, [B]."""
        c = self.config
        share = self.backbone.kept_cells(c.keep) / self.backbone.num_cells
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
        """KL of the first views that the teacher saw, zero for the other rows: [B] of scores [2B, cells]."""
        if target is None:
            return scores.new_zeros(len(scores) // 2)
        kl = losses.distillation(scores[: len(target)], target)
        self._last["distillation"] = kl.detach().mean()
        return self.config.distill_weight * F.pad(kl, (0, len(scores) // 2 - len(target)))
