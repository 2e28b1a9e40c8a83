"""Where a method looks and how it embeds an image: a backbone and its scorer, whatever they learn from.

The scorer ranks the cells of an image; the highest are computed fine. The embedding is the mean over
the image, with ``method.focus`` beside a mean over the kept cells, weighted by softmax(scores).
"""

import torch
from torch import Tensor, nn

from sparsecontrast.methods.method import SHARED, Choice, Look, Views
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
from sparsecontrast.settings import MethodConfig


class Looking(nn.Module):
    """What all methods have in common but their loss.

    Args:
        config: the method's configuration.
        backbone: student; its cells are the scorer's.
    """

    views: Views = "two"

    def __init__(self, config: MethodConfig, backbone: SparseViT | SparseCNN):
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.saliency = (
            SaliencyPredictor(backbone.grid)
            if config.selection == "attention"
            else SurprisePredictor(backbone.grid, config.centre_prior)
        )
        self.keep = 1.0
        self._last: dict[str, Tensor] = {}

    def start_round(self, round_number: int, rounds: int) -> None:
        """Set the kept share for this server round."""
        self.keep = keep_ratio(self.config, round_number, rounds)

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

    @property
    def cell_size(self) -> int:
        """Side of a cell in pixels."""
        return self.backbone.img_size // self.backbone.grid[0]

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
        """Scores of all cells [N, cells], and what the scorer's own loss costs each view [N]."""
        if self.config.selection == "surprise" and self.config.surprise_weight > 0:
            scores, loss = self.saliency.read(views)  # type: ignore[operator]
            self._last["surprise"] = loss.detach().mean()
            return scores, self.config.surprise_weight * loss
        return self._scores(views, generator), views.new_zeros(len(views), dtype=torch.float32)

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


def build_projector(width: int, config: MethodConfig) -> nn.Sequential:
    """Two layers that map embeddings [..., width] to where they are compared; they never leave a site."""
    return nn.Sequential(
        nn.Linear(width, config.projection_hidden),
        nn.LayerNorm(config.projection_hidden),
        nn.GELU(),
        nn.Linear(config.projection_hidden, config.projection_dim),
    )
