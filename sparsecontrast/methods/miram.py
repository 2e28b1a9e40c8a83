"""MIRAM (arXiv 2503.07157): a masked autoencoder that reconstructs at two resolutions.

From the paper: a ViT encoder sees the visible patches only; a standard attention decoder reconstructs the
image at low resolution, a decoder of linear cost (Linformer, Performer or Nystromformer) at high resolution.
Whoever fills in fine detail needs features that hold it, which a small lesion is. Ours, for the paper is
silent: which pixels each decoder is held to, the narrow decoders and their fixed positions
(``models/masked_decoder.py``), and that all of it keeps images apart.

With L patches of p x p pixels, of which a random set M is hidden, and an upsampling factor u:

    z      = encoder(visible patches)                     absent patches are absent, not masked
    low    : L tokens,     each the p/u x p/u pixels of its patch in the image shrunk by u
    high   : L u^2 tokens, each the p/u x p/u pixels of its part of the patch in the image itself
    L_i    = mean over M of |low - target|^2 + lambda mean over M of |high - target|^2        (per image)

The second decoder costs several times the rest where it fills in every hidden patch. To learn from,
``method.high_share`` of them are enough, drawn anew for each image and step (ours,
``models/masked_decoder.py``): the mean over the drawn ones is an unbiased estimate of that over M. At 1 it is
the paper's.

Targets are standardised patch by patch (``method.normalise``; He et al., arXiv 2111.06377, section 4.1). With
lambda = 0 the second decoder is not there, and with u = 1 beside that it is a plain masked autoencoder.

Row i's loss depends on row i alone, so ``per_sample`` is true and patient-level DP-SGD may clip. One view of
each image is taken, and only its pixels move (``transforms.mae_view``): an image counts once. The backbone
alone leaves a site; decoders and mask tokens stay, as projection heads do.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsecontrast import losses
from sparsecontrast.errors import MethodError
from sparsecontrast.methods.method import Batch, Choice, Views
from sparsecontrast.models import tokens
from sparsecontrast.models.masked_decoder import MaskedDecoder
from sparsecontrast.models.sparse_cnn import SparseCNN
from sparsecontrast.models.sparse_vit import SparseViT
from sparsecontrast.settings import MiramConfig

SHARED = "backbone."  # nothing looks, so there is no scorer beside it
FLAT = 1e-6  # added to the variance of a patch: one of a single grey value has the target 0


class Filled(NamedTuple):
    """What the decoders say of hidden patches, and what there is, in the same form.

    Attributes:
        low: [B, M, q^2], q = patch / upsample, and its target.
        high: [B, M * upsample^2, q^2], patch by patch, and its target; None without that decoder.
    """

    low: tuple[Tensor, Tensor]
    high: tuple[Tensor, Tensor] | None


class Miram(nn.Module):
    """Multi-scale masked reconstruction with one backbone.

    Args:
        config: the method's configuration.
        backbone: the encoder; a ViT.

    Raises:
        MethodError: a CNN, a BatchNorm, or an embedding that the loss would not train.
    """

    per_sample = True
    views: Views = "one"

    def __init__(self, config: MiramConfig, backbone: SparseViT | SparseCNN):
        super().__init__()
        self.config, self.backbone = config, _checked(backbone)
        self.visible = round((1 - config.mask_ratio) * self.num_patches)
        self.low_decoder = self._decoder(1, "softmax")
        asked = None if config.high_share == 1 else (self.visible, self._asked)
        self.high_decoder = (
            self._decoder(config.upsample, config.attention, asked) if config.high_weight > 0 else None
        )
        self._last: dict[str, Tensor] = {}

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss of each row [B], of the first view of row i alone."""
        images, c = batch.first, self.config
        visible = draw_visible(images, self.num_patches, self.visible, batch.generator)
        hidden = tokens.complement(visible, self.num_patches)
        filled = self.fill(images, visible, self._drawn(hidden, batch.generator))
        self._last = {}
        # bf16 autocast would round squared errors to three digits
        with torch.autocast(images.device.type, enabled=False):
            loss = losses.reconstruction(*filled.low)
            self._last["low_resolution"] = loss.detach().mean()
            if filled.high is not None:
                high = losses.reconstruction(*filled.high)
                self._last["high_resolution"] = high.detach().mean()
                loss = loss + c.high_weight * high
        return loss

    def fill(self, images: Tensor, visible: Tensor, high: Tensor | None = None) -> Filled:
        """Fill in what is hidden of images [B, 1, H, W] where patches ``visible`` [B, K] are seen.

        Args:
            images: standardised.
            visible: numbers of the patches, rising along a row.
            high: hidden patches [B, M'] to fill in at high resolution; all without it.
        """
        factor, backbone = self.config.upsample, self.backbone
        hidden = tokens.complement(visible, self.num_patches)
        seen = backbone.visible(images, visible)[:, backbone.vit.num_prefix_tokens :]
        side = self.patch_size // factor
        low = tokens.kept_patches(tokens.shrink(images, factor), side, 1, hidden)
        told = (self.low_decoder(seen, visible, hidden), self._target(low))
        if self.high_decoder is None:
            return Filled(told, None)
        asked = hidden if high is None else high
        pixels = tokens.kept_patches(images, side, factor, asked)
        return Filled(told, (self.high_decoder(seen, visible, asked), self._target(pixels)))

    def start_round(self, round_number: int, rounds: int) -> None:
        """Nothing changes from round to round."""

    def after_step(self) -> None:
        """Nothing follows the weights."""

    def reset_local(self) -> None:
        """Leave the decoders as they are: they have no shared part to start from."""

    def shared_parameters(self) -> list[str]:
        """Names of the backbone's tensors; both decoders stay at the site."""
        return [name for name in self.state_dict() if name.startswith(SHARED)]

    def metrics(self) -> dict[str, float]:
        """Scalars of the last step: share of the patches computed, error at each resolution."""
        return {
            "keep": self.visible / self.num_patches,
            **{name: float(value) for name, value in self._last.items()},
        }

    @property
    def num_patches(self) -> int:
        """Patches L of an image."""
        rows, columns = self.backbone.vit.patch_embed.grid_size
        return rows * columns

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.backbone.vit.patch_embed.patch_size[0]

    @property
    def embed_dim(self) -> int:
        """Width of an embedding."""
        return self.backbone.embed_dim

    @property
    def cell_size(self) -> int:
        """Side of a cell in pixels."""
        return self.backbone.img_size // self.backbone.grid[0]

    @torch.no_grad()
    def encode(self, images: Tensor, keep: str | float = "dense") -> Tensor:
        """Embed images [B, 1, H, W] -> [B, D]: the mean over all patches.

        Raises:
            MethodError: ``keep`` is anything but dense.
        """
        return self.backbone(images, *self.choose(images, keep))

    def choose(self, images: Tensor, keep: str | float = "dense") -> Choice:
        """Choose everything: the only thing that a method without a scorer can choose.

        Raises:
            MethodError: ``keep`` is anything but dense.
        """
        if keep not in ("dense", 1.0):
            raise MethodError(f"keep={keep}: method=miram chooses no regions of an image; ask for dense")
        return Choice(None, None)

    def _decoder(self, split: int, attention: str, asked: tuple[int, int] | None = None) -> MaskedDecoder:
        c = self.config
        return MaskedDecoder(
            self.backbone.embed_dim, self.backbone.vit.patch_embed.grid_size, split,
            (self.patch_size // c.upsample) ** 2, c.decoder_dim, c.decoder_depth, c.decoder_heads, attention,
            c.landmarks, asked,
        )  # fmt: skip

    @property
    def _asked(self) -> int:
        """Hidden patches that the second decoder fills in at a time."""
        return max(1, round(self.config.high_share * (self.num_patches - self.visible)))

    def _drawn(self, hidden: Tensor, generator: torch.Generator) -> Tensor | None:
        """Draw those of ``hidden`` [B, M] that the second decoder is to fill in, uniformly; None: all."""
        if self.high_decoder is None or self.config.high_share == 1:
            return None
        order = draw_visible(hidden, hidden.shape[1], self._asked, generator)
        return hidden.gather(1, order)

    def _target(self, pixels: Tensor) -> Tensor:
        return standardised(pixels) if self.config.normalise else pixels


def draw_visible(images: Tensor, patches: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` of the patches of each image uniformly: [B, count], each row ascending.

    What an image shows plays no part; it says how many there are, and where.
    """
    noise = torch.rand(len(images), patches, generator=generator)
    return tokens.top_k(noise, count).to(images.device)


def standardised(pixels: Tensor) -> Tensor:
    """Give each patch [..., pixels] mean 0 and variance 1."""
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
    return (pixels - mean) * (variance + FLAT).rsqrt()


def _checked(backbone: SparseViT | SparseCNN) -> SparseViT:
    """Refuse a backbone that cannot leave patches out, couples images, or would stay half trained.

    Raises:
        MethodError: says which, and what to set instead.
    """
    norms = [name for name, module in backbone.named_modules() if isinstance(module, _BatchNorm)]
    if norms:
        raise MethodError(f"method=miram: backbone.{norms[0]}: BatchNorm couples images; use LayerNorm")
    if not isinstance(backbone, SparseViT):
        raise MethodError(
            "method=miram: a convolution cannot leave patches out, so a CNN has nothing to reconstruct "
            "from; use backbone=vit_tiny, vit_small or vit_base"
        )
    if backbone.vit.global_pool != "avg":
        raise MethodError(
            f"method=miram: backbone.pool={backbone.vit.global_pool}: the loss reaches the patches' tokens "
            "alone; use avg"
        )
    return backbone
