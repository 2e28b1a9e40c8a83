"""A timm ViT that runs on mixed-resolution tokens: kept cells fine, the rest one token a cell.

Nothing is masked: a dropped token is physically absent from every block. With all cells kept the
forward pass is timm's own. The background is demoted, never deleted, so no lesion can become
invisible; that coverage is ours (SparseContrast, arXiv 2605.00887, trims attention to the
predicted regions). A coarse token is a cell, or in large images a cell of cells (``pyramid.py``),
mean-pooled to one patch, embedded by the same projection, at the mean of its patches' positions, plus
a learned embedding of its level. In the attention it weighs as the patches it stands for (log area).
"""

from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from sparsecontrast.errors import ModelError
from sparsecontrast.models import tokens
from sparsecontrast.models.pretrained import load_fitting, pretrained_state, sum_over_rgb
from sparsecontrast.models.pyramid import build_pyramid
from sparsecontrast.settings import BackboneConfig


class SparseViT(nn.Module):
    """A plain timm ViT and what its coarse tokens need.

    Args:
        vit: a timm ``VisionTransformer`` on one channel without a classifier.
        cell: a cell is ``cell x cell`` patches.
    """

    def __init__(self, vit: VisionTransformer, cell: int):
        super().__init__()
        self.vit = vit
        self.project = PatchProjection(vit.patch_embed.proj)
        self.cell = cell
        patches: tuple[int, int] = vit.patch_embed.grid_size
        self.pyramid = build_pyramid(patches, cell)
        self.grid = self.pyramid.grids[1]
        self.coarse = nn.Parameter(torch.zeros(1, len(self.pyramid.grids) - 1, vit.embed_dim))

    @property
    def positions(self) -> Tensor:
        """Patches of each cell, [cells, cell^2]."""
        return self.pyramid.inside(0)

    @property
    def num_cells(self) -> int:
        """Cells of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def embed_dim(self) -> int:
        """Width D of the embedding."""
        return self.vit.embed_dim

    @property
    def img_size(self) -> int:
        """Side of the images in pixels."""
        return self.grid[0] * self.cell * self.vit.patch_embed.patch_size[0]

    def kept_cells(self, keep: float) -> int:
        """Cells to keep fine for a share ``keep`` of all tokens (``Pyramid.kept_cells``)."""
        return self.pyramid.kept_cells(keep)

    @property
    def least_keep(self) -> float:
        """The smallest share of the tokens: every cell coarse, at the highest level."""
        return self.share(0)

    def share(self, m: int) -> float:
        """Share of all tokens that m fine cells leave to compute, in [``least_keep``, 1]."""
        return sum(self.pyramid.token_counts(m)) / self.pyramid.sizes[0]

    def forward(self, images: Tensor, kept: Tensor | None = None, focus: Tensor | None = None) -> Tensor:
        """Embed images [B, 1, H, W] -> [B, D], or [B, 2 D] with ``focus``.

        Args:
            images: at the backbone's size.
            kept: cells to keep fine [B, m], each row ascending; None keeps all (dense).
            focus: weights of the kept cells [B, m], of all [B, cells] where all are kept; rows sum to 1.
                The second half of the embedding is the mean of the fine tokens under these weights.
        """
        vit = self.vit
        x = self.features(images, kept)
        if kept is None or vit.global_pool == "token":
            pooled = vit.pool(x)
        else:
            pooled = self._area_mean(x, self._areas(kept.shape[1], x.device))
        pooled = vit.fc_norm(pooled)
        if focus is not None:
            pooled = torch.cat([pooled, vit.fc_norm(self._focused(x, kept, focus))], dim=1)
        return vit.head_drop(pooled)

    def features(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return the last tokens [B, prefix + K, D]: fine, then coarse; all patches row by row if dense."""
        vit = self.vit
        if kept is None:
            return vit.forward_features(images)
        x = self.embed(images, kept)
        bias = self._areas(kept.shape[1], x.device).log().to(_attention_dtype(x))[None, None, None]
        for block in vit.blocks.children():
            x = block(x, attn_mask=bias)
        return vit.norm(x)

    def local(self, images: Tensor, cells: Tensor, dense: bool = False) -> Tensor:
        """Describe the patches of ``cells`` [B, n]: [B, n * cell^2, D], cell by cell.

        Args:
            images: [B, 1, H, W].
            cells: each row ascending; they alone are computed fine.
            dense: compute all cells fine.
        """
        body = self.features(images, None if dense else cells)[:, self.vit.num_prefix_tokens :]
        if dense:
            found = tokens.gather(body, self.positions[cells].flatten(1))
        else:
            found = body[:, : cells.shape[1] * self.cell**2]
        return self.vit.fc_norm(found)

    def visible(self, images: Tensor, patches: Tensor) -> Tensor:
        """Compute some patches [B, K] as if the image had no others: [B, prefix + K, D].

        Nothing stands for the rest: its pixels are not read (a masked autoencoder's encoder).
        """
        vit = self.vit
        prefix, table = self._position_table()
        pixels = tokens.kept_patches(images, vit.patch_embed.patch_size[0], 1, patches)
        body = vit.patch_embed.norm(self.project(pixels)) + tokens.look_up(table, patches)
        x = self._begun(prefix, body)
        for block in vit.blocks.children():
            x = block(x)
        return vit.fc_norm(vit.norm(x))

    def embed(self, images: Tensor, kept: Tensor) -> Tensor:
        """Return the input tokens [B, prefix + K, D]: fine, then coarse, level by level."""
        vit, cell = self.vit, self.cell
        patch = vit.patch_embed.patch_size[0]
        prefix, table = self._position_table()
        pixels = [tokens.kept_patches(images, patch, cell, kept)]
        places, index, offset = [table], [self.positions[kept].flatten(1)], 0
        for level, chosen in enumerate(self.pyramid.coarse(kept)):
            images = tokens.shrink(images, cell)
            pixels.append(tokens.gather(tokens.patchify(images, patch), chosen))
            offset += table.shape[1]
            index.append(chosen + offset)
            table = table[:, self.pyramid.inside(level)].mean(2)
            places.append(table + self.coarse[:, level, None])
        found = tokens.look_up(torch.cat(places, dim=1), torch.cat(index, dim=1))
        body = vit.patch_embed.norm(self.project(torch.cat(pixels, dim=1))) + found
        return self._begun(prefix, body)

    def _begun(self, prefix: Tensor, body: Tensor) -> Tensor:
        """Put the prefix tokens before the others, as the first block gets them."""
        heads = prefix.expand(body.shape[0], -1, -1).to(body.dtype)
        return self.vit.norm_pre(self.vit.pos_drop(torch.cat([heads, body], dim=1)))

    def attention(self, images: Tensor) -> Tensor:
        """Average the pooling query's attention over layers and heads, per cell: [B, cells], rows sum to 1.

        A model that pools by the mean gives the attention of its mean query.
        """
        vit = self.vit
        x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        total = images.new_zeros(images.shape[0], x.shape[1] - vit.num_prefix_tokens)
        for block in vit.blocks.children():
            total += _query_attention(block.attn, block.norm1(x), vit)  # type: ignore[arg-type, operator]
            x = block(x)
        cells = total[:, self.positions].sum(-1)
        return cells / cells.sum(1, keepdim=True)

    def _areas(self, m: int, device: torch.device) -> Tensor:
        """Patches that each token stands for, [prefix + K]; a prefix token counts as one."""
        prefix = torch.ones(self.vit.num_prefix_tokens, device=device)
        return torch.cat([prefix, self.pyramid.areas(m, device)])

    def _area_mean(self, x: Tensor, areas: Tensor) -> Tensor:
        """Mean over the image's area: a coarse token counts for the cell^2 patches it stands for."""
        weights = areas[self.vit.num_prefix_tokens :].to(x.dtype)
        return torch.einsum("bnd,n->bd", x[:, self.vit.num_prefix_tokens :], weights / weights.sum())

    def _focused(self, x: Tensor, kept: Tensor | None, focus: Tensor) -> Tensor:
        """Mean of the fine tokens, each cell's share spread evenly over its patches: [B, D]."""
        body, area = x[:, self.vit.num_prefix_tokens :], self.cell**2
        weights = (focus / area).to(x.dtype)
        if kept is None:  # patches lie row by row over the image, not cell by cell
            weights = weights.unflatten(1, self.grid)
            weights = weights.repeat_interleave(self.cell, 1).repeat_interleave(self.cell, 2).flatten(1)
        else:
            weights = weights.repeat_interleave(area, dim=1)
        return torch.einsum("bnd,bn->bd", body[:, : weights.shape[1]], weights)

    def _position_table(self) -> tuple[Tensor, Tensor]:
        """Prefix tokens with their positions [1, prefix, D], and the positions of all patches [1, L, D].

        In private training every row has parameters of its own (``rows.per_row``): [B, ...].
        """
        vit, places = self.vit, self.vit.pos_embed
        assert places is not None  # build_sparse_vit refuses other models
        prefix: list[Tensor] = [t for t in (vit.cls_token, vit.reg_token) if t is not None]
        heads = torch.cat(prefix, dim=1) if prefix else places[:, :0]
        if vit.no_embed_class or not prefix:
            return heads, places
        n = vit.num_prefix_tokens
        return heads + places[:, :n], places[:, n:]


class PatchProjection(nn.Module):
    """A patch embedding's convolution as one matrix product over patches that were cut before.

    It owns no weights: they stay the convolution's, under its name.
    """

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self._convolution = (convolution,)  # in a tuple: no second name for the same weights

    @property
    def convolution(self) -> nn.Conv2d:
        """Whose weights they are."""
        return self._convolution[0]

    def forward(self, patches: Tensor) -> Tensor:
        """Project patches [B, K, C * patch^2] -> [B, K, D]."""
        conv = self.convolution
        return nn.functional.linear(patches, conv.weight.flatten(1), conv.bias)


def build_sparse_vit(config: BackboneConfig, cell: int) -> SparseViT:
    """Build the backbone by timm name, at any size, on one channel; the caller seeds torch.

    Raises:
        ModelError: the name is no plain timm ViT, or the weights do not fit it.
        MissingDataError: ``pretrained`` names a file that is not there, or weights that cannot be fetched.
    """
    options: dict[str, Any] = {} if config.depth is None else {"depth": config.depth}
    try:
        vit = timm.create_model(
            config.name, img_size=config.img_size, patch_size=config.patch_size,
            in_chans=1, num_classes=0, global_pool=config.pool, **options,
        )  # fmt: skip
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ModelError(f"backbone.name={config.name}: timm cannot build it: {error}") from error
    if (
        not isinstance(vit, VisionTransformer)
        or getattr(vit, "pos_embed", None) is None
        or vit.attn_pool is not None
    ):
        raise ModelError(f"backbone.name={config.name}: only plain ViTs with learned positions are supported")
    if config.pretrained:
        _load_pretrained(vit, pretrained_state(config))
    return SparseViT(vit, cell)


def _load_pretrained(vit: VisionTransformer, state: dict[str, Tensor]) -> None:
    """Fit RGB weights of another size to one channel, this patch and image size, this depth."""
    weight = state.get("patch_embed.proj.weight")
    if weight is None or weight.shape[0] != vit.embed_dim:
        found = "no patch embedding" if weight is None else f"width {weight.shape[0]}"
        raise ModelError(f"backbone.pretrained: expected a ViT of width {vit.embed_dim}, found {found}")
    state = sum_over_rgb(_with_norm_of(vit, state), "patch_embed.proj.weight")
    load_fitting(vit, checkpoint_filter_fn(state, vit))


def _with_norm_of(vit: VisionTransformer, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name the last norm as this model does: timm calls it ``fc_norm`` where it pools by the mean."""
    theirs, ours = ("fc_norm.", "norm.") if isinstance(vit.fc_norm, nn.Identity) else ("norm.", "fc_norm.")
    return {ours + k.removeprefix(theirs) if k.startswith(theirs) else k: v for k, v in state.items()}


def _attention_dtype(x: Tensor) -> torch.dtype:
    """The type that queries and keys will have: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _query_attention(attn: nn.Module, x: Tensor, vit: VisionTransformer) -> Tensor:
    """Attention of one query (CLS, or the mean) over the patches: [B, L], averaged over heads."""
    b, n, _ = x.shape
    q, k, _ = attn.qkv(x).reshape(b, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)  # type: ignore[operator]
    q, k = attn.q_norm(q), attn.k_norm(k)  # type: ignore[operator]
    query = q[:, :, :1] if vit.global_pool == "token" else q.mean(2, keepdim=True)
    weights = (query * attn.scale @ k.transpose(-2, -1)).float().softmax(-1)
    return weights[:, :, 0, vit.num_prefix_tokens :].mean(1)
