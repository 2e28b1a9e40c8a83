"""How the gradient of each row is read off a layer: what per-row clipping needs to know of the models.

A layer's weight gradient is a sum over the rows of a batch; the formulas here leave that sum out. They
take what Opacus' grad samplers take: the layer, its inputs, the gradient of its output; N rows each.
Formulas for the layers of torch come from Opacus, but for convolutions, whose formula there computes a
depthwise one (ConvNeXt) as if it were full. Where rows are large they are given as two factors (``Outer``),
for whoever asks to multiply them out where they are to lie.

A parameter outside of any layer is given to the model once per row instead (``ROW_PARAMETERS``): a
token, a table of positions. The models that own one accept it with a batch axis.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.layer_scale import LayerScale
from timm.layers.norm import GroupNorm, LayerNorm, LayerNorm2d
from timm.models.convnext import ConvNeXtBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from sparsecontrast.models.linformer import TokenMix
from sparsecontrast.models.masked_decoder import MaskedDecoder
from sparsecontrast.models.small_maps import SmallMapConv2d
from sparsecontrast.models.sparse_cnn import SparseCNN
from sparsecontrast.models.sparse_vit import PatchProjection, SparseViT
from sparsecontrast.models.surprise import RingConv, SurprisePredictor


class Outer(NamedTuple):
    """Rows of a weight in two factors: row n is ``gradient[n].T @ inputs[n]``, in the shape of the weight.

    Attributes:
        gradient: [N, T, out], of the layer's output at T positions.
        inputs: [N, T, in].
        shape: of the weight, out * in numbers.
    """

    gradient: Tensor
    inputs: Tensor
    shape: torch.Size

    def folded(self, count: int) -> "Outer":
        """Take parts of an image together: [count * parts, T, ...] -> [count, parts * T, ...]."""
        if len(self.gradient) == count:
            return self
        gradient, inputs = (x.reshape(count, -1, x.shape[2]) for x in (self.gradient, self.inputs))
        return Outer(gradient, inputs, self.shape)

    def add_to(self, rows: Tensor, first: bool) -> None:
        """Write the rows to [N, *shape], or add them to what lies there."""
        left, into = self.gradient.mT, rows.view(len(rows), self.gradient.shape[2], -1)
        if rows.dtype == left.dtype:
            torch.baddbmm(into, left, self.inputs, beta=0 if first else 1, out=into)
        elif first:
            into.copy_(left @ self.inputs)
        else:
            into.add_(left @ self.inputs)

    def rows(self) -> Tensor:
        """Multiply out: [N, *shape]."""
        return (self.gradient.mT @ self.inputs).view(len(self.gradient), *self.shape)


Rows = dict[Tensor, Tensor | Outer]
Sampler = Callable[[nn.Module, list[Tensor], Tensor], Rows]

ROW_PARAMETERS: dict[type[nn.Module], tuple[str, ...]] = {
    VisionTransformer: ("cls_token", "reg_token", "pos_embed"),
    SparseViT: ("coarse",),
    SparseCNN: ("position",),
    SurprisePredictor: ("place",),
    MaskedDecoder: ("mask_token",),
}

INNER: dict[type[nn.Module], str] = {ConvNeXtBlock: "mlp"}
"""Modules whose own parameter scales the output of a child, and that child."""


def linear_rows(layer: nn.Module, inputs: list[Tensor], gradient: Tensor) -> Rows:
    """Rows of a linear layer on [N, ..., in]: weight [N, out, in] and bias [N, out]."""
    assert isinstance(layer, nn.Linear)
    n, rows = len(gradient), {}
    g = gradient.reshape(n, -1, layer.out_features)
    if layer.weight.requires_grad:
        x = inputs[0].to(g.dtype).reshape(n, -1, layer.in_features)
        rows[layer.weight] = Outer(g, x, layer.weight.shape)
    if layer.bias is not None and layer.bias.requires_grad:
        rows[layer.bias] = g.sum(1)
    return rows


def mix_rows(layer: nn.Module, inputs: list[Tensor], gradient: Tensor) -> Rows:
    """Rows of a linear layer over the tokens of [N, tokens, D]: weight [N, out, tokens]."""
    assert isinstance(layer, TokenMix) and layer.bias is None
    return {layer.weight: Outer(gradient.mT, inputs[0].to(gradient.dtype).mT, layer.weight.shape)}


def conv_rows(layer: nn.Module, inputs: list[Tensor], gradient: Tensor) -> Rows:
    """Rows of a 2-D convolution's weight [N, out, in / groups, k, k] and bias [N, out]."""
    assert isinstance(layer, nn.Conv2d)
    x, n, rows = inputs[0].to(gradient.dtype), len(gradient), {}
    if layer.weight.requires_grad:
        rows[layer.weight] = _full(layer, x, gradient) if layer.groups == 1 else _grouped(layer, x, gradient)
    if layer.bias is not None and layer.bias.requires_grad:
        rows[layer.bias] = gradient.reshape(n, layer.out_channels, -1).sum(2)
    return rows


def _full(layer: nn.Conv2d, x: Tensor, gradient: Tensor) -> Outer:
    """One matrix product a row over the unfolded input."""
    if layer.kernel_size == layer.stride == (1, 1):
        columns = x.flatten(2)
    else:
        columns = F.unfold(x, layer.kernel_size, layer.dilation, _padding(layer), layer.stride)
    return Outer(gradient.flatten(2).mT, columns.mT, layer.weight.shape)


def _grouped(layer: nn.Conv2d, x: Tensor, gradient: Tensor) -> Tensor:
    """Rows become groups of one image: each group's weight gradient is a row's."""
    n, shape = len(x), layer.weight.shape
    found = conv2d_weight(
        x.reshape(1, -1, *x.shape[2:]), (n * shape[0], *shape[1:]),
        gradient.reshape(1, -1, *gradient.shape[2:]),
        layer.stride, _padding(layer), layer.dilation, n * layer.groups,  # type: ignore[arg-type]
    )  # fmt: skip
    return found.view(n, *shape)


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    assert not isinstance(layer.padding, str) and layer.padding_mode == "zeros", "timm pads with numbers"
    return layer.padding


def ring_rows(layer: nn.Module, inputs: list[Tensor], gradient: Tensor) -> Rows:
    """Rows of a convolution whose centre is cut out."""
    assert isinstance(layer, RingConv)
    rows = conv_rows(layer, inputs, gradient)
    found = rows.get(layer.weight)
    if isinstance(found, Outer):
        rows[layer.weight] = found.rows() * layer.without_centre
    return rows


def projection_rows(layer: nn.Module, inputs: list[Tensor], gradient: Tensor) -> Rows:
    """Rows of the patch embedding's convolution, applied to patches [N, K, C * p^2] that were cut before."""
    assert isinstance(layer, PatchProjection)
    conv = layer.convolution
    rows: Rows = {conv.weight: Outer(gradient, inputs[0].to(gradient.dtype), conv.weight.shape)}
    if conv.bias is not None:
        rows[conv.bias] = gradient.sum(1)
    return {p: g for p, g in rows.items() if p.requires_grad}


def layer_norm_rows(layer: nn.Module, inputs: list[Tensor], gradient: Tensor) -> Rows:
    """Rows of a norm over the last axis: scale and shift [N, D]."""
    assert isinstance(layer, nn.LayerNorm)
    plain = F.layer_norm(inputs[0], layer.normalized_shape, eps=layer.eps)
    return _scale_and_shift(layer, plain, gradient)


def layer_norm_2d_rows(layer: nn.Module, inputs: list[Tensor], gradient: Tensor) -> Rows:
    """Rows of a norm over the channels of maps [N, D, h, w]."""
    assert isinstance(layer, LayerNorm2d)
    plain = F.layer_norm(inputs[0].permute(0, 2, 3, 1), layer.normalized_shape, eps=layer.eps)
    return _scale_and_shift(layer, plain, gradient.permute(0, 2, 3, 1))


def group_norm_rows(layer: nn.Module, inputs: list[Tensor], gradient: Tensor) -> Rows:
    """Rows of a norm over groups of channels of maps [N, D, h, w]."""
    assert isinstance(layer, nn.GroupNorm)
    plain = F.group_norm(inputs[0], layer.num_groups, eps=layer.eps)
    return _scale_and_shift(layer, plain.movedim(1, -1), gradient.movedim(1, -1))


def _scale_and_shift(layer: nn.LayerNorm | nn.GroupNorm, plain: Tensor, gradient: Tensor) -> Rows:
    """Sum over all positions of [N, ..., D]."""
    n, width = len(gradient), gradient.shape[-1]
    rows = {}
    if layer.weight is not None and layer.weight.requires_grad:
        rows[layer.weight] = (plain * gradient).reshape(n, -1, width).sum(1)
    if layer.bias is not None and layer.bias.requires_grad:
        rows[layer.bias] = gradient.reshape(n, -1, width).sum(1)
    return rows


def layer_scale_rows(layer: nn.Module, inputs: list[Tensor], gradient: Tensor) -> Rows:
    """Rows of a factor per channel of [N, ..., D]."""
    assert isinstance(layer, LayerScale)
    return {layer.gamma: (inputs[0] * gradient).reshape(len(gradient), -1, gradient.shape[-1]).sum(1)}


def block_scale_rows(layer: nn.Module, inputs: list[Tensor], gradient: Tensor) -> Rows:
    """Rows of the factor at the end of a ConvNeXt block; ``inputs`` is what it scales, the MLP's output."""
    assert isinstance(layer, ConvNeXtBlock) and isinstance(layer.gamma, nn.Parameter)
    scaled = inputs[0] if layer.use_conv_mlp else inputs[0].permute(0, 3, 1, 2)
    return {layer.gamma: (scaled * gradient).flatten(2).sum(2)}


SAMPLERS: dict[type[nn.Module], Sampler] = {
    nn.Linear: linear_rows,
    TokenMix: mix_rows,
    nn.Conv2d: conv_rows,
    SmallMapConv2d: conv_rows,
    RingConv: ring_rows,
    PatchProjection: projection_rows,
    nn.LayerNorm: layer_norm_rows,
    LayerNorm: layer_norm_rows,
    LayerNorm2d: layer_norm_2d_rows,
    nn.GroupNorm: group_norm_rows,
    GroupNorm: group_norm_rows,
    LayerScale: layer_scale_rows,
    ConvNeXtBlock: block_scale_rows,
}

FOLDED = (nn.Linear, nn.LayerNorm, LayerNorm)
"""Layers whose formulas sum over any axes between the first and the last: parts of an image may be one."""


def per_row(parameter: Tensor, rows: int) -> Tensor:
    """Give a parameter a batch axis, one leaf for all rows [rows, ...]: its gradient keeps them apart.

    A leading axis of 1 is that axis: cls_token [1, 1, D] becomes [rows, 1, D], position [cells, D] becomes
    [rows, cells, D].
    """
    own = parameter.detach()
    whole = own if own.dim() > 1 and len(own) == 1 else own[None]
    return whole.expand(rows, *whole.shape[1:]).requires_grad_()
