"""What a share of the tokens comes to: a film has whole cells, and few of them.

At 224 px a ViT has 49 cells, and every cell is at least one token: of ``keep=0.25`` one fine cell is left,
and 0.265 of the tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import yaml

from benchmarks.contenders import OURS, Model, is_vit
from benchmarks.rivals.low_resolution import equal_cost_size
from sparsecontrast.levels import STRIDE
from sparsecontrast.models.pyramid import build_pyramid
from sparsecontrast.models.sparse_cnn import SparseCNN, build_sparse_cnn


@dataclass(frozen=True)
class Computed:
    """What of an image a contender computes.

    Attributes:
        fine_cells: cells in full detail; None where nothing is cut into cells.
        cells: of the image.
        token_share: of the patches (a ViT's tokens) or of the tiles (CNN), those that every block computes;
            None where their number falls from block to block.
    """

    fine_cells: int | None = None
    cells: int | None = None
    token_share: float | None = None

    def row(self) -> dict[str, Any]:
        """What is known, as columns of a row."""
        return {name: value for name, value in vars(self).items() if value is not None}


@cache
def computed(method: str, keep: float, model: Model) -> Computed:
    """Work out what a contender computes, by the library's own rules.

    Raises:
        MethodError: the backbone cannot be had at this share.
    """
    if method in ("stock", "dense", "masked"):
        return Computed(token_share=1.0)
    backbone, config = model.configs()
    if method == "low_resolution":
        step = backbone.patch_size if is_vit(model) else STRIDE
        assert step is not None  # a ViT's configuration has one
        return Computed(token_share=(equal_cost_size(backbone.img_size, step, keep) / backbone.img_size) ** 2)
    if not is_vit(model):
        cnn = _cnn(model)
        m = cnn.kept_cells(keep)
        return Computed(m, cnn.num_cells, cnn.share(m))
    assert backbone.patch_size is not None
    side = backbone.img_size // backbone.patch_size
    pyramid = build_pyramid((side, side), config.cell)
    if method == "random_drop":
        return Computed(token_share=round(keep * side**2) / side**2)
    if method not in (OURS, "all_coarse"):
        return Computed()
    m = pyramid.kept_cells(keep) if method == OURS else 0
    return Computed(m, pyramid.sizes[1], sum(pyramid.token_counts(m)) / pyramid.sizes[0])


def computed_of_row(row: Mapping[str, Any]) -> Computed:
    """Read what a row of ``benchmarks.sparsity`` computed; of rows that do not say so, work it out."""
    if "token_share" in row or "fine_cells" in row:
        return Computed(row.get("fine_cells"), row.get("cells"), row.get("token_share"))
    pairs = (word.partition("=") for word in row.get("changes", "").split())
    changes = tuple((key, yaml.safe_load(value)) for key, _, value in pairs)
    return computed(row["method"], row["keep"], Model(row["backbone"], row["size_px"], changes))


@lru_cache(maxsize=1)  # the shares of one model are asked for one after the other
def _cnn(model: Model) -> SparseCNN:
    return build_sparse_cnn(model.configs()[0])
