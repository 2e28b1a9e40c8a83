"""A timm CNN that computes the kept tiles only, beside an overview of the whole image.

A *cell* is one tile of the image. The kept tiles go through the network at full resolution as one
dense batch of windows; nothing is masked, a tile that is not kept never enters. The background is
demoted, never deleted: the *overview*, the network's own first two stages with weights of their own
on the image reduced by ``REDUCTION``, describes every cell, and an attention over all cells pools
them (Ilse et al., Attention-based Deep Multiple Instance Learning, arXiv 1802.04712, eq. 8).

Dense (no ``kept``) is timm's network on the whole image, its last feature map pooled over the same
cells, so dense and sparse share every weight. They differ at the windows' borders, where the cut
network pads with zeros and, in ResNets, GroupNorm sees one window instead of the image;
``backbone.halo`` buys it down. ``python -m benchmarks.borders`` measures the relative error of a tile's
features: with fresh weights, residual branches open, phantoms of 256 px in 4 x 4 tiles, halo 0 / 32 / 64:
ConvNeXt-atto 0.31 / 0.16 / 0.05, ResNet-18 0.52 / 0.33 / 0.18. At a quarter of the tiles a halo of
32 px costs as much as the dense pass.
"""

import copy
from typing import Any

import timm
import torch
from timm.models import is_model_in_modules
from timm.models.convnext import ConvNeXt
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsecontrast.errors import MethodError, ModelError
from sparsecontrast.models import tiles, tokens
from sparsecontrast.models.pretrained import load_fitting, pretrained_state, sum_over_rgb
from sparsecontrast.models.small_maps import set_small_maps
from sparsecontrast.settings import BackboneConfig

REDUCTION = 4  # side of the average pool in front of the overview, as in front of the scorer
OVERVIEW_STRIDE = 8  # of its last feature map, in its own pixels: two stages
ATTENTION_WIDTH = 128


class SparseCNN(nn.Module):
    """A timm ConvNeXt or ResNet, its overview and the attention that joins them.

    Args:
        cnn: on one channel, without a classifier; total stride ``tiles.STRIDE``, no BatchNorm.
        img_size: side of the images in pixels.
        tiles_per_side: the image is divided into ``tiles_per_side^2`` cells, whole strides each.
        halo: pixels that a window sees around its cell, whole strides.
    """

    def __init__(self, cnn: ConvNeXt | ResNet, img_size: int, tiles_per_side: int, halo: int):
        super().__init__()
        self.img_size = img_size
        self.grid = (tiles_per_side, tiles_per_side)
        self.cell = REDUCTION  # the background is seen this many times coarser
        self.embed_dim = int(cnn.num_features)
        self.window = tiles.window_size(img_size, tiles_per_side, halo)
        self.overview = _overview_of(cnn)
        self.norm = _take_last_norm(cnn)
        self.cnn = cnn
        width = int(self.overview.num_features)
        self.coarse = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, self.embed_dim))
        self.position = nn.Parameter(torch.zeros(self.num_cells, self.embed_dim))
        self.score = nn.Sequential(
            nn.Linear(self.embed_dim, ATTENTION_WIDTH), nn.Tanh(), nn.Linear(ATTENTION_WIDTH, 1, bias=False)
        )
        nn.init.trunc_normal_(self.position, std=0.02)
        starts = tiles.window_starts(img_size, tiles_per_side, self.window, halo)
        whole = tiles.whole_weights(img_size, tiles_per_side, img_size // tiles.STRIDE)
        cut = tiles.window_weights(img_size, starts, self.window, self.window // tiles.STRIDE)
        self.starts: Tensor
        self.whole_weights: Tensor
        self.window_weights: Tensor
        for name, buffer in (("starts", starts), ("whole_weights", whole), ("window_weights", cut)):
            self.register_buffer(name, buffer, persistent=False)

    @property
    def num_cells(self) -> int:
        """Cells of an image."""
        return self.grid[0] * self.grid[1]

    def kept_cells(self, keep: float) -> int:
        """Tiles to compute for a share ``keep`` of them: the nearest number, at least one.

        Raises:
            MethodError: ``keep`` is not in (0, 1].
        """
        if not 0 < keep <= 1:
            raise MethodError(f"keep={keep}: must be in (0, 1], the share of the tiles that are computed")
        return max(1, round(keep * self.num_cells))

    @property
    def least_keep(self) -> float:
        """The smallest share of the tiles: one of them."""
        return 1 / self.num_cells

    def share(self, m: int) -> float:
        """Share of the tiles that m of them are; the overview is computed at any share."""
        return m / self.num_cells

    def forward(self, images: Tensor, kept: Tensor | None = None, focus: Tensor | None = None) -> Tensor:
        """Embed images [B, 1, H, W] -> [B, D], or [B, 2 D] with ``focus``.

        Args:
            images: at the backbone's size.
            kept: cells to compute at full resolution [B, m], in any order; None for all (dense).
            focus: weights of the kept cells [B, m], of all [B, cells] where all are kept; rows sum to 1.
                The second half of the embedding is the mean of their descriptions under these weights.

        Raises:
            ModelError: the images are of another size.
        """
        if images.shape[1:] != (1, self.img_size, self.img_size):
            raise ModelError(
                f"images of shape {list(images.shape)}: the backbone was built for "
                f"[B, 1, {self.img_size}, {self.img_size}]; resize them or set backbone.img_size"
            )
        cells = self.describe(images, kept)
        pooled = (self._weights(cells)[..., None] * cells).sum(1)
        if focus is None:
            return pooled
        kept_cells = cells if kept is None else tokens.gather(cells, kept)
        return torch.cat([pooled, (focus[..., None] * kept_cells).sum(1)], dim=1)

    def attention(self, images: Tensor) -> Tensor:
        """Return how the dense pass weighs the cells: [B, cells], rows sum to 1."""
        return self._weights(self.describe(images))

    def describe(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """Describe every cell [B, cells, D]: the overview, on the kept ones joined by the full resolution."""
        coarse, fine = self.coarse_cells(images), self.fine_cells(images, kept)
        if kept is not None:
            fine = tokens.scatter(fine, kept, self.num_cells)
        return self.norm(coarse + fine)

    def local(self, images: Tensor, cells: Tensor, dense: bool = False) -> Tensor:
        """Describe ``cells`` [B, n], computed at full resolution (all of them if ``dense``): [B, n, D]."""
        return tokens.gather(self.describe(images, None if dense else cells), cells)

    def coarse_cells(self, images: Tensor) -> Tensor:
        """Describe every cell from the reduced image, and where it lies: [B, cells, D]."""
        maps = _maps(self.overview, tokens.shrink(images, REDUCTION))
        return self.coarse(_pool(maps, self.whole_weights)) + self.position

    def fine_cells(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """Describe the kept cells [B, m, D] from their windows, or all [B, cells, D] from the whole image."""
        if kept is None:
            return _pool(_maps(self.cnn, images), self.whole_weights)
        windows = tiles.cut(images, kept, self.starts, self.window)
        weights = self.window_weights[kept].flatten(0, 1)[:, None]
        return _pool(_maps(self.cnn, windows), weights).reshape(*kept.shape, -1)

    def timm_state(self) -> dict[str, Tensor]:
        """Weights of the plain timm network inside: a ConvNeXt gets the norm back that was taken from it."""
        norm = self.norm.state_dict() if self._took_norm else {}
        return {**self.cnn.state_dict(), **{f"head.norm.{name}": tensor for name, tensor in norm.items()}}

    def timm_features(self, images: Tensor) -> Tensor:
        """Embed images [B, 1, H, W] -> [B, D] as that network does: no overview, all cells weigh the same.

        A ConvNeXt's norm, if it had one to take, was trained on cells with the overview added.
        """
        mean = self.fine_cells(images).mean(1)
        return self.norm(mean) if self._took_norm else mean

    @property
    def _took_norm(self) -> bool:
        return isinstance(getattr(self.cnn, "head", None), nn.Identity)

    def _weights(self, cells: Tensor) -> Tensor:
        return self.score(cells)[..., 0].float().softmax(1)


def timm_arguments(config: BackboneConfig) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` for the network inside; ResNets are built with GroupNorm."""
    norm = {"norm_layer": "groupnorm"} if is_model_in_modules(config.name, "resnet") else {}
    return {"model_name": config.name, "in_chans": 1, "num_classes": 0, **norm}


def build_sparse_cnn(config: BackboneConfig) -> SparseCNN:
    """Build the backbone by timm name, on one channel; the caller seeds torch.

    To ResNets, weights that were trained with BatchNorm give their convolutions, scales and shifts;
    running statistics have no place.

    Raises:
        ModelError: the name is no ConvNeXt or ResNet without BatchNorm, or the weights do not fit it.
        MissingDataError: ``pretrained`` names a file that is not there, or weights that cannot be fetched.
    """
    try:
        cnn = timm.create_model(**timm_arguments(config))
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ModelError(f"backbone.name={config.name}: timm cannot build it: {error}") from error
    if not isinstance(cnn, ConvNeXt | ResNet) or any(isinstance(m, _BatchNorm) for m in cnn.modules()):
        raise ModelError(
            f"backbone.name={config.name}: backbone.tiles needs a ConvNeXt or a ResNet without BatchNorm; "
            "for a ViT set backbone.patch_size instead"
        )
    if config.pretrained:
        _load_pretrained(cnn, config)
    set_small_maps(cnn)
    assert config.tiles is not None  # what makes it a CNN's configuration
    return SparseCNN(cnn, config.img_size, config.tiles, config.halo or 0)


def _load_pretrained(cnn: Any, config: BackboneConfig) -> None:
    stem, state = f"{cnn.default_cfg['first_conv']}.weight", pretrained_state(config)
    if stem not in state:
        raise ModelError(f"backbone.pretrained: expected weights of {config.name}, found no {stem}")
    load_fitting(cnn, sum_over_rgb(state, stem))


def _overview_of(cnn: ConvNeXt | ResNet) -> Any:
    """Copy the network's stages up to ``OVERVIEW_STRIDE``: pretrained weights start both."""
    overview = copy.deepcopy(cnn)
    last = [i for i, stage in enumerate(overview.feature_info) if stage["reduction"] == OVERVIEW_STRIDE]
    overview.prune_intermediate_layers(last)
    return overview


def _take_last_norm(cnn: ConvNeXt | ResNet) -> nn.LayerNorm:
    """A norm over D; ConvNeXt's own, which follows its pooling, moves here."""
    own = getattr(getattr(cnn, "head", None), "norm", None)
    if not isinstance(own, nn.LayerNorm):
        return nn.LayerNorm(int(cnn.num_features))
    norm = nn.LayerNorm(int(cnn.num_features), eps=own.eps)
    norm.load_state_dict(own.state_dict())
    cnn.head = nn.Identity()  # type: ignore[assignment]
    return norm


def _maps(cnn: Any, images: Tensor) -> Tensor:
    """Run a network: [N, 1, H, W] -> [N, D, h, w]."""
    if isinstance(cnn, ConvNeXt):
        return cnn.forward_features(images)
    maps = cnn.act1(cnn.bn1(cnn.conv1(images)))
    # on a CPU max pooling in bf16 wants the channels last, GroupNorm the channels first
    maps = cnn.maxpool(maps.contiguous(memory_format=torch.channels_last)).contiguous()
    return cnn.layer4(cnn.layer3(cnn.layer2(cnn.layer1(maps))))


def _pool(maps: Tensor, weights: Tensor) -> Tensor:
    """Pool maps [N, D, h, w] with weights [cells, h * w], or [N, cells, h * w] of each: [N, cells, D]."""
    return weights.to(maps.dtype) @ maps.flatten(2).transpose(1, 2)
