"""Patch contrast: SparseContrast whose loss of an image depends on that image alone.

InfoNCE over a batch couples its images: what one record can change has no bound, and no clipping of
single records repairs that. Here the negatives are the other kept tokens of the same image
(``losses.patch_info_nce``), so that patient-level DP-SGD (``sparsecontrast/privacy.py``) may clip:

    L_i = PatchInfoNCE_i + lambda_p (-log N(detail_i; mu, sigma)).

Backbone, scorer and embedding are SparseContrast's (``looking.py``). What differs:

- both views share ONE set of kept cells, ranked by the scorer on the first view among the cells that
  both views show; no gradient goes through the choice;
- the views lie whole cells apart (``transforms.shifted_views``): token t shows the same place in both,
  at another position, or positions alone would solve the task;
- each view passes the network on its own: in one batch of 2B rows an image would be two rows, and
  clipping rows would let it count twice.

A token is a patch of a kept cell in a ViT and a kept tile in a CNN. The background's coarse tokens take
part in the attention (the overview, in a CNN), but stand for other areas in each view: they are not
contrasted. Nothing here knows a statistic of the batch; LayerNorm and GroupNorm see one image (one
window). The hard choice gives the scorer no gradient, so ``selection=attention``, which needs one, is
refused, as is everything else that would couple images.
"""

import math

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from sparsecontrast import losses
from sparsecontrast.errors import MethodError
from sparsecontrast.methods.looking import Looking, build_projector
from sparsecontrast.methods.method import Batch, Views
from sparsecontrast.models import tokens
from sparsecontrast.models.sparse_cnn import SparseCNN
from sparsecontrast.models.sparse_vit import SparseViT
from sparsecontrast.settings import MethodConfig


class PatchContrast(Looking):
    """Within-image contrastive pretraining of one backbone and one saliency predictor.

    Args:
        config: the method's configuration.
        backbone: student; its cells are the scorer's.

    Raises:
        MethodError: the configuration couples images, or leaves the embedding untrained.
    """

    per_sample = True
    views: Views = "shifted"

    def __init__(self, config: MethodConfig, backbone: SparseViT | SparseCNN):
        _refuse_coupling(config, backbone)
        super().__init__(config, backbone)
        self.projector = build_projector(backbone.embed_dim, config)

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss of each row [B], of row i alone.

        Raises:
            MethodError: the views' places to each other are not known.
        """
        if batch.shift is None:
            raise MethodError("patch_contrast needs views of known geometry: transforms.shifted_views")
        self._last = {}
        scores, terms = self._read(batch.first, batch.generator)
        cells, dense = self._shared_cells(batch, scores.detach())
        down, across = batch.shift.unbind(1)
        moved = cells + (down * self.backbone.grid[1] + across)[:, None]
        first = self.projector(self.backbone.local(batch.first, cells, dense))
        second = self.projector(self.backbone.local(batch.second, moved, dense))
        # bf16 autocast would round similarities to three digits
        with torch.autocast(batch.first.device.type, enabled=False):
            contrast = losses.patch_info_nce(first, second, self.config.temperature)
        chance = torch.tensor(math.log(first.shape[1]))
        self._last |= {"contrast": contrast.detach().mean(), "chance_loss": chance}
        return contrast + terms

    def after_step(self) -> None:
        """Nothing follows the weights."""

    def reset_local(self) -> None:
        """Leave the projection head as it is: it has no shared part to start from."""

    def _shared_cells(self, batch: Batch, scores: Tensor) -> tuple[Tensor, bool]:
        """Choose cells of the first view [B, n] that the second shows too; and whether all are computed.

        Where more are to be kept than any two views share, both are computed dense.
        """
        assert batch.shift is not None
        rows, columns = self.backbone.grid
        m, room = self.backbone.kept_cells(self.keep), (rows - 1) * (columns - 1)
        explore = 0.0 if self.config.selection == "random" else self.config.explore
        shared = _overlap(batch.shift, (rows, columns))
        ranking = self._masked(batch.first, scores)
        cells = tokens.explore_top_k(ranking, min(m, room), explore, batch.generator, shared)
        return cells, m > room


def _overlap(shift: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cells of the first view that the second shows too, boolean [B, cells]."""
    inside = []
    for axis, size in enumerate(grid):
        there = torch.arange(size, device=shift.device) + shift[:, axis, None]
        inside.append((there >= 0) & (there < size))
    return (inside[0][:, :, None] & inside[1][:, None, :]).flatten(1)


def _refuse_coupling(config: MethodConfig, backbone: SparseViT | SparseCNN) -> None:
    """Refuse what would make a row's loss depend on other rows, or train what the embedding leaves out.

    Raises:
        MethodError: says which key, and what to set instead.
    """
    norms = [name for name, module in backbone.named_modules() if isinstance(module, _BatchNorm)]
    pool = backbone.vit.global_pool if isinstance(backbone, SparseViT) else "avg"
    wrong = {
        f"backbone.{norms[0] if norms else ''}: BatchNorm couples images; use GroupNorm": bool(norms),
        "selection=attention: its teacher sees a part of the batch; use surprise": config.selection
        == "attention",
        "method.same_patient=true: two films of a patient have no tokens in common; set it to false": (
            config.same_patient
        ),
        f"backbone.pool={pool}: the loss reaches the patches' tokens alone; use avg": pool != "avg",
    }
    for message, found in wrong.items():
        if found:
            raise MethodError(f"method=patch_contrast: {message}")
