"""A decoder that fills in what a masked autoencoder's encoder was not shown (He et al., arXiv 2111.06377).

Every patch, visible or not, becomes ``split x split`` tokens: a visible one by a linear map of its encoder
token, a hidden one as the mask tokens, one for each part of a patch. All get a fixed position (sine and
cosine, no weights: fewer numbers for a private site to drown in noise), pass a few narrow blocks, and the
hidden ones are mapped to pixels.

A decoder that is asked for some of the hidden patches at a time (``asked``) has one token for each visible
patch, ``split x split`` for each that is asked for, and none for the others, so what it costs need not grow
with the resolution. Ours; Fu et al. (arXiv 2401.14391) leave hidden patches out too, by cross-attention.

The tokens of a patch lie together, patch after patch: whatever gathers neighbours along the row of tokens,
as Nystrom landmarks do, then gathers neighbours in the image. How blocks attend is a choice, for it decides
the cost: ``softmax`` grows with the square of the tokens, the others in proportion (``linear_attention.py``).
"""

import torch
from torch import Tensor, nn

from sparsecontrast.models import tokens
from sparsecontrast.models.linear_attention import build_attention

MLP_RATIO = 4
WAVELENGTH = 10_000.0  # the longest, of the positions (Vaswani et al., arXiv 1706.03762, section 3.5)


class MaskedDecoder(nn.Module):
    """Reconstruct the hidden patches of an image from the tokens of the visible ones.

    Args:
        width: D of the encoder's tokens.
        grid: patches of an image (rows, columns).
        split: each patch becomes ``split x split`` tokens.
        pixels: that a token stands for.
        dim: width of the decoder, a multiple of 4 and of ``heads``.
        depth: blocks.
        heads: of the attention.
        attention: a name that ``build_attention`` knows.
        landmarks: of the linear attentions.
        asked: (visible patches, hidden patches asked for at a time); None: all patches take part.
    """

    def __init__(
        self, width: int, grid: tuple[int, int], split: int, pixels: int, dim: int, depth: int, heads: int,
        attention: str, landmarks: int, asked: tuple[int, int] | None = None,
    ):  # fmt: skip
        super().__init__()
        self.split, self.patches = split, grid[0] * grid[1]
        self.asked = None if asked is None else asked[1]
        count = self.patches * split**2 if asked is None else asked[0] + asked[1] * split**2
        self.embed = nn.Linear(width, dim * (split**2 if asked is None else 1))
        self.mask_token = nn.Parameter(torch.zeros(1, split**2, dim))
        self.places: Tensor
        self.register_buffer("places", sine_places(grid, split, dim)[None], persistent=False)
        self.middles: Tensor
        middles = sine_places(grid, 1, dim, split)[None] if asked is not None else torch.zeros(0)
        self.register_buffer("middles", middles, persistent=False)
        told = (attention, dim, heads, count, landmarks)
        blocks = (DecoderBlock(dim, build_attention(*told, seed=i)) for i in range(depth))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, pixels)
        self._start()

    def forward(self, seen: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Predict the hidden patches.

        Args:
            seen: tokens of the visible patches [B, K, D].
            visible: their numbers [B, K].
            hidden: numbers of the patches to predict [B, M]; where a part is asked for at a time, M is at
                least that many, and all are predicted, part by part.

        Returns:
            [B, M * split^2, pixels], patch by patch.
        """
        if self.asked is None:
            return self._among_all(seen, visible, hidden)
        count, size = hidden.shape[1], self.asked
        starts = [min(start, count - size) for start in range(0, count, size)]  # the last part may overlap
        parts = [self._some(seen, visible, hidden[:, at : at + size]) for at in starts]
        news = [part[:, (start - at) * self.split**2 :] for part, at, start
                in zip(parts, starts, range(0, count, size), strict=True)]  # fmt: skip
        return news[0] if len(news) == 1 else torch.cat(news, 1)

    def _some(self, seen: Tensor, visible: Tensor, asked: Tensor) -> Tensor:
        """Predict exactly ``self.asked`` patches, with no token of another hidden one."""
        width, parts = self.places.shape[-1], self.split**2
        known = self.embed(seen) + self.middles[0][visible]
        # in private training every row has mask tokens of its own
        empty = self.mask_token[:, None].to(known.dtype) + self.places.view(self.patches, parts, width)[asked]
        x = self.blocks(torch.cat([known, empty.flatten(1, 2)], 1))
        return self.head(self.norm(x[:, visible.shape[1] :]))

    def _among_all(self, seen: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        b, k = visible.shape
        parts = self.embed(seen).unflatten(2, (self.split**2, -1))
        # in private training every row has mask tokens of its own: [B, split^2, dim]
        empty = self.mask_token[:, None].to(parts.dtype).expand(b, self.patches, -1, -1)
        whole = empty.scatter(1, visible[:, :, None, None].expand_as(parts), parts)
        x = self.blocks(whole.flatten(1, 2) + self.places)
        asked = tokens.gather(x.unflatten(1, (self.patches, -1)), hidden).flatten(1, 2)
        return self.head(self.norm(asked))

    @torch.no_grad()
    def _start(self) -> None:
        """Initialise as the authors of the masked autoencoder do, but for the attention's own layers."""
        nn.init.normal_(self.mask_token, std=0.02)
        for name, layer in self.named_modules():
            if type(layer) is nn.Linear and ".attn." not in f".{name}.":
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)


class DecoderBlock(nn.Module):
    """A block of a transformer that norms first; how it attends is given."""

    def __init__(self, dim: int, attention: nn.Module):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(dim), attention, nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, MLP_RATIO * dim), nn.GELU(), nn.Linear(MLP_RATIO * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, N, dim] to [B, N, dim]."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def sine_places(grid: tuple[int, int], split: int, dim: int, unit: int = 1) -> Tensor:
    """Positions of all tokens [patches * split^2, dim], patch by patch.

    A quarter of the numbers each: sine and cosine of the row, sine and cosine of the column. ``unit`` is a
    token's side; a wider one stands at its middle.
    """
    rows, columns = grid[0] * split, grid[1] * split
    order = tokens.cell_positions((rows, columns), split).flatten()
    frequencies = WAVELENGTH ** -(torch.arange(dim // 4) / (dim // 4))
    middles = [unit * place + (unit - 1) / 2 for place in (order // columns, order % columns)]
    angles = [place[:, None] * frequencies for place in middles]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
