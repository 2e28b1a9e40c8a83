"""Build a method by name, deterministically from the seed."""

import dataclasses

import torch

from sparsecontrast.methods.method import refuse_coupled
from sparsecontrast.methods.miram import Miram
from sparsecontrast.methods.patch_contrast import PatchContrast
from sparsecontrast.methods.sparse_contrast import SparseContrast
from sparsecontrast.models.sparse_cnn import SparseCNN, build_sparse_cnn
from sparsecontrast.models.sparse_vit import SparseViT, build_sparse_vit
from sparsecontrast.settings import BackboneConfig, Config, MiramConfig

Built = SparseContrast | PatchContrast | Miram
METHODS: dict[str, type[SparseContrast] | type[PatchContrast]] = {
    "sparse_contrast": SparseContrast,
    "dense_contrast": SparseContrast,
    "patch_contrast": PatchContrast,
}


def build_method(config: Config, pretrained: bool = True) -> Built:
    """Build the method of ``config``; the same seed gives the same weights, bit for bit.

    torch's global generator is left as it was (timm initialises from it).

    Args:
        config: of the run.
        pretrained: False leaves ``backbone.pretrained`` aside, its file unread: for a network that
            stays untrained, or whose weights are loaded next.

    Raises:
        ModelError: the backbone cannot be built or its pretrained weights do not fit.
        MethodError: the method does not go with the backbone, or ``privacy`` is configured and it couples the
            images of a batch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        told = config.backbone if pretrained else dataclasses.replace(config.backbone, pretrained=False)
        backbone = _build_backbone(told, config.method.cell)
        if isinstance(config.method, MiramConfig):
            method = Miram(config.method, backbone)
        else:
            method = METHODS[config.method.name](config.method, backbone)
    if config.privacy.name != "none":
        refuse_coupled(method)
    return method


def _build_backbone(config: BackboneConfig, cell: int) -> SparseViT | SparseCNN:
    if config.tiles is not None:
        return build_sparse_cnn(config)
    backbone = build_sparse_vit(config, cell)
    torch.nn.init.trunc_normal_(backbone.coarse, std=0.02)
    return backbone
