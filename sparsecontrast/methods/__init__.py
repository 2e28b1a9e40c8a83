"""Build a method by name, deterministically from the seed."""

import torch

from sparsecontrast.config import Config
from sparsecontrast.methods.sparse_contrast import SparseContrast
from sparsecontrast.models.sparse_vit import build_sparse_vit

METHODS = {"sparse_contrast": SparseContrast, "dense_contrast": SparseContrast}


def build_method(config: Config) -> SparseContrast:
    """Build the method of ``config``; the same seed gives the same weights, bit for bit.

    torch's global generator is left as it was (timm initialises from it).

    Raises:
        ModelError: the backbone cannot be built or its pretrained weights do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone = build_sparse_vit(config.backbone, config.method.cell)
        torch.nn.init.trunc_normal_(backbone.coarse, std=0.02)
        return METHODS[config.method.name](config.method, backbone)
