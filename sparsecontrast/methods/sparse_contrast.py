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
from torch import Tensor, nn

from sparsecontrast import losses
from sparsecontrast.config import MethodConfig
from sparsecontrast.methods.method import SHARED, Batch, Choice, Look
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
from sparsecontrast.models.surprise import SurprisePredictor


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
        self.saliency = (
            SaliencyPredictor(backbone.grid)
            if config.selection == "attention"
            else SurprisePredictor(backbone.grid, config.centre_prior)
        )
        self.projector = nn.Sequential(
            nn.Linear(self.embed_dim, config.projection_hidden),
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
        """Scalars of the last step: contrast, its chance level, kept share, the scorer's terms.

        ``loss`` is the contrast alone, which chance can be held against; the scorer's own term has a name.
        """
        told = {name: float(value) for name, value in self._last.items()}
        return {"keep": self.keep, **told, **({"loss": told["contrast"]} if told else {})}

    @property
    def embed_dim(self) -> int:
        """Width of an embedding: the backbone's, twice with focus."""
        return self.backbone.embed_dim * (2 if self.config.focus else 1)

    @torch.no_grad()
    def encode(self, images: Tensor, keep: str | float = "dense") -> Tensor:
        """Embed images [B, 1, H, W] -> [B, D]; ``keep`` is dense, sparse (as configured) or a number."""
        return self.backbone(images, *self.choose(images, keep))

    @torch.no_grad()
    def choose(self, images: Tensor, keep: str | float = "sparse") -> Choice:
        """Choose what ``encode`` computes of images [B, 1, H, W]; nothing is scored that need not be.

        Raises:
            MethodError: ``keep`` is a number below what all-coarse cells need, or above 1.
        """
        named = {"dense": 1.0, "sparse": self.config.keep}
        m = self.backbone.kept_cells(named[keep] if isinstance(keep, str) else keep)
        if m == self.backbone.num_cells and not self.config.focus:
            return Choice(None, None)
        return self.choose_among(self.score(images)[1], m)

    @torch.no_grad()
    def score(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of all cells, and the ranking by which they are kept (border and text last): [B, cells]."""
        scores = self._scores(images)
        return scores, self._masked(images, scores)

    def choose_among(self, scores: Tensor, m: int) -> Choice:
        """Choose the m highest cells of a ranking [B, cells]."""
        kept = None if m == self.backbone.num_cells else tokens.top_k(scores, m)
        return Choice(kept, self._focus(scores, kept))

    @torch.no_grad()
    def look(self, images: Tensor) -> Look:
        """Return scores and the cells kept at the configured share."""
        scores = self.score(images)[1]
        return Look(
            scores, tokens.top_k(scores, self.backbone.kept_cells(self.config.keep)), self.backbone.grid
        )

    def _read(self, views: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Scores of all cells [N, cells], and what the scorer's own terms cost each view [N]."""
        c = self.config
        nothing = views.new_zeros(len(views), dtype=torch.float32)
        if c.selection == "attention":
            scores = self.saliency(views).float()
            return scores, self._budget_terms(scores)
        if c.selection == "surprise" and c.surprise_weight > 0:
            scores, loss = self.saliency.read(views)  # type: ignore[operator]
            self._last["surprise"] = loss.detach().mean()
            return scores, c.surprise_weight * loss
        return self._scores(views, generator), nothing

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

    def _focus(self, scores: Tensor, kept: Tensor | None) -> Tensor | None:
        """Weights of the kept cells, rows sum to 1."""
        if not self.config.focus:
            return None
        return (scores if kept is None else scores.gather(1, kept)).softmax(1)

    def _scores(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scores [B, cells] of the configured selection; ``random`` without a generator is a fixed draw."""
        selection, grid = self.config.selection, self.backbone.grid
        if selection in ("surprise", "attention"):
            scores = self.saliency(images).float()
        elif selection == "random":
            shape = (images.shape[0] if generator else 1, self.backbone.num_cells)
            scores = torch.rand(shape, generator=generator or torch.Generator().manual_seed(0))
        else:
            scores = centre_scores(grid)[None] if selection == "centre" else energy_scores(images, grid)
        return scores.to(images.device).expand(images.shape[0], -1)

    def _masked(self, images: Tensor, scores: Tensor) -> Tensor:
        return scores + EXCLUDED * excluded_cells(images, self.backbone.grid)

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
