"""SparseAttnNet: classify a cell from the few pixels that a coarse look asks for (arXiv 2505.07661).

    A      = sigmoid(conv(image))                                    the coarse map, one value a word
    S      = top-k of A, plus noise that spreads it                  about 15 % of the pixels
    words  = (x, y, values) of S, embedded                           [B, k, D]
    p, a   = multi-head attention with CLS over the words            class, and CLS's attention to each word
    L      = CE(p, y) + beta * KL(stopgrad(a) || softmax(A at S))    the map learns what the reader looked at

The paper gives the coarse map, the top-k pixels as words, the distillation and that k follows the
convergence of the loss. Ours: micro-patches as words (``patch`` 1 is the paper's single pixel; attention is
quadratic in k); the dither of ``models.words`` and an exploration quota, without which the distillation only
ever supervises what is already selected; the rule of k (``word_budget``). The softmax and the top-k take the
map before its sigmoid, which changes no order. No layer knows a statistic of the batch, so row i's loss
depends on row i alone. CE gives the map no gradient and KL gives the reader none.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsecontrast.errors import MethodError
from sparsecontrast.methods.method import SHARED
from sparsecontrast.models import tokens, words
from sparsecontrast.models.reader import WordReader

GREEN = 1  # the channel in which a Romanowsky-stained nucleus is darkest


@dataclass(frozen=True)
class SparseAttnConfig:
    """The method; ``configs/method/sparse_attn_net.yaml`` explains every field."""

    name: Literal["sparse_attn_net"]
    selection: Literal["learned", "random", "threshold"]
    share: float
    share_floor: float
    patch: int
    explore: float
    dither: float
    distill_weight: float
    k_tolerance: float
    k_every: int
    k_factor: float
    k_smoothing: float
    width: int
    depth: int
    heads: int
    mlp_ratio: int
    coarse_width: int
    place_bands: int
    border: Literal["replicate", "zeros"] = "zeros"  # of runs that were trained before there was a choice


class Labelled(NamedTuple):
    """Images [B, 3, S, S], normalised; their classes [B]; and the randomness of this step."""

    images: Tensor
    labels: Tensor
    generator: torch.Generator


class Verdict(NamedTuple):
    """What the network says, and what it looked at.

    Attributes:
        logits: [B, C].
        kept: indices of the words that were read [B, k], ascending.
        attention: of CLS to each of them [B, k], rows sum to 1.
        coarse: the map before its sigmoid, one value a word [B, L].
    """

    logits: Tensor
    kept: Tensor
    attention: Tensor
    coarse: Tensor


class CoarseMap(nn.Module):
    """The cheap look at the whole picture: [B, 3, S, S] -> one value a word [B, L].

    Args:
        patch: side of a word.
        width: channels of the convolutions.
        border: what lies around a map: its own edge (a flat picture has a flat map), or zeros.
    """

    def __init__(self, patch: int, width: int, border: Literal["replicate", "zeros"]):
        super().__init__()
        self.shrink = nn.Conv2d(3, width, patch, stride=patch)
        self.around = nn.Conv2d(width, width, 3, padding=1, padding_mode=border)
        self.out = nn.Conv2d(width, 1, 3, padding=1, padding_mode=border)

    def forward(self, images: Tensor) -> Tensor:
        """Return the map before its sigmoid, row by row."""
        x = F.gelu(self.shrink(images))
        return self.out(F.gelu(self.around(x))).flatten(1)


class SparseAttnNet(nn.Module):
    """The classifier.

    Args:
        config: the method's configuration.
        classes: C, at least 2.
        image_size: S, a multiple of ``config.patch``.
        class_weights: of the cross-entropy [C]; None weighs all alike.
        label_smoothing: in [0, 1).

    Attributes:
        k: words that are read of each picture now, in 1..``ceiling``.
        ceiling: the most words that ``config.share`` of the pixels allows.
        floor: the fewest that k may shrink to.

    Raises:
        MethodError: the picture does not divide into words, or the share holds not one.
    """

    per_sample = True
    class_weights: Tensor
    where: Tensor
    noise: Tensor

    def __init__(
        self, config: SparseAttnConfig, classes: int, image_size: int,
        class_weights: Tensor | None = None, label_smoothing: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.config, self.label_smoothing = config, label_smoothing
        self.grid = _grid(image_size, config)
        total = self.grid[0] * self.grid[1]
        self.ceiling = int(config.share * total + 1e-9)
        self.floor = max(1, min(self.ceiling, int(config.share_floor * total + 1e-9)))
        if self.ceiling < 1:
            raise MethodError(f"method.share={config.share}: holds no word of {total}; raise it")
        self.k = self.ceiling
        size = 3 * config.patch**2 + 4 * config.place_bands
        self.saliency = CoarseMap(config.patch, config.coarse_width, config.border)
        self.backbone = WordReader(size, classes, config.width, config.depth, config.heads, config.mlp_ratio)
        weights = torch.ones(classes) if class_weights is None else class_weights
        self.register_buffer("class_weights", weights, persistent=False)
        where = words.waves(words.places(self.grid), config.place_bands)
        self.register_buffer("where", where, persistent=False)
        self.register_buffer("noise", words.fixed_dither(self.grid), persistent=False)
        self._last: dict[str, Tensor] = {}

    def forward(self, batch: Labelled) -> Tensor:
        """Return the loss of each row [B], of row i alone."""
        seen = self.look(batch.images, batch.generator)
        entropy = F.cross_entropy(
            seen.logits.float(), batch.labels, self.class_weights,
            reduction="none", label_smoothing=self.label_smoothing,
        )  # fmt: skip
        distilled = distillation(seen.attention, seen.coarse.gather(1, seen.kept))
        self._last = {"cross_entropy": entropy.detach().mean(), "distillation": distilled.detach().mean()}
        return entropy + self.config.distill_weight * distilled

    def look(self, images: Tensor, generator: torch.Generator | None = None) -> Verdict:
        """Classify images [B, 3, S, S]; ``generator`` is of training, None reads the same words each time."""
        coarse = self.saliency(images)
        kept = self._choose(images, coarse.detach(), generator)
        logits, attention = self.backbone(self.words(images, kept))
        return Verdict(logits, kept, attention, coarse)

    def logits(self, images: Tensor) -> Tensor:
        """Classify images [B, 3, S, S], the same way each time: [B, C]."""
        return self.look(images).logits

    def words(self, images: Tensor, kept: Tensor) -> Tensor:
        """Read words ``kept`` [B, k] of the images, no other pixel: values and place [B, k, word size]."""
        values = tokens.kept_patches(images, self.config.patch, 1, kept)
        return torch.cat([values, self.where[kept].to(values.dtype)], dim=-1)

    def pixel_share(self) -> float:
        """Share of a picture's pixels that the words hold."""
        return self.k / (self.grid[0] * self.grid[1])

    def shared_parameters(self) -> list[str]:
        """Names in ``state_dict()`` that may leave a site: all are of the reader or of the coarse map."""
        return [name for name in self.state_dict() if name.startswith(SHARED)]

    def reset_local(self) -> None:
        """Start the site's local parts anew: there are none."""

    def metrics(self) -> dict[str, float]:
        """Scalars of the last step."""
        return {name: value.item() for name, value in self._last.items()}

    def _choose(self, images: Tensor, coarse: Tensor, generator: torch.Generator | None) -> Tensor:
        """Indices of the words to read [B, k]; random and threshold are there to compare with."""
        selection = self.config.selection
        if selection == "random":
            generator = generator or torch.Generator().manual_seed(0)  # inference must be repeatable
            return tokens.top_k(torch.rand(coarse.shape, generator=generator).to(images.device), self.k)
        if selection == "threshold":
            dark = -tokens.shrink(images[:, GREEN : GREEN + 1].float(), self.config.patch).flatten(1)
            return tokens.top_k(dark, self.k)
        return words.choose(
            coarse.float(), self.k, self.config.dither, self.config.explore, self.noise, generator
        )


def distillation(attention: Tensor, coarse: Tensor) -> Tensor:
    """KL(attention || softmax(coarse)) of each row [B], over the same words [B, k]; none to attention."""
    target = attention.detach().float()
    log_map = coarse.float().log_softmax(dim=1)
    return (torch.xlogy(target, target) - target * log_map).sum(dim=1)


def _grid(image_size: int, config: SparseAttnConfig) -> tuple[int, int]:
    side, rest = divmod(image_size, config.patch)
    if rest or side == 0:
        raise MethodError(
            f"image_size={image_size}: must be a multiple of method.patch={config.patch}, the side of a word"
        )
    return side, side
