"""Words of a picture: micro-patches that are read, each with the place it came from; pure functions.

``tokens`` cuts and chooses; here is what is particular to words: their places, and a *dither* that
spreads a choice. The highest scores of a smooth map lie side by side and would tell one thing k times.
Noise that is added before the top-k draws words without replacement, each in proportion to exp(score)
(Gumbel-top-k: Kool et al., arXiv 1903.06059, equation 2), so a map becomes a halftone of itself. Training
draws the noise; inference takes a fixed field, so that one picture always gives the same words.
"""

import math

import torch
from torch import Tensor

from sparsecontrast.models import tokens

R2 = (0.7548776662466927, 0.5698402909980532)  # 1/g and 1/g^2 of the plastic number g


def places(grid: tuple[int, int]) -> Tensor:
    """Centres (x, y) of the words of a grid (rows, columns), row by row: [L, 2] in (-1, 1)."""
    rows, columns = grid
    y = (torch.arange(rows) + 0.5) / rows * 2 - 1
    x = (torch.arange(columns) + 0.5) / columns * 2 - 1
    return torch.stack([x.repeat(rows), y.repeat_interleave(columns)], dim=1)


def waves(where: Tensor, bands: int) -> Tensor:
    """Sines and cosines of places [..., 2] at ``bands`` octaves, half a wave a picture first: [..., 4 bands].

    Tancik et al., arXiv 2006.10739, section 6 ("positional encoding").
    """
    octaves = math.pi / 2 * 2.0 ** torch.arange(bands, device=where.device)
    phase = (where[..., None] * octaves).flatten(-2)
    return torch.cat([phase.sin(), phase.cos()], dim=-1)


def fixed_dither(grid: tuple[int, int]) -> Tensor:
    """Gumbel noise [L] that is the same for every picture, and even: neighbours differ much.

    The uniform field is the additive recurrence R2 over rows and columns (M. Roberts, "The unreasonable
    effectiveness of quasirandom sequences", 2018).
    """
    rows, columns = grid
    steps = torch.arange(rows, dtype=torch.float64)[:, None] * R2[0]
    steps = steps + torch.arange(columns, dtype=torch.float64) * R2[1]
    return gumbel(((steps + 0.5) % 1.0).flatten().float())


def gumbel(uniform: Tensor) -> Tensor:
    """Turn uniform noise in [0, 1] into Gumbel noise of the same shape, finite at both ends."""
    tiny = 1e-6
    return -torch.log(-torch.log(uniform.clamp(tiny, 1 - tiny)))


def choose(
    scores: Tensor, k: int, dither: float, explore: float, noise: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Choose k of L words.

    Args:
        scores: [B, L], higher is more wanted.
        k: how many, in 1..L.
        dither: scale of the noise on the scores; 0 is a plain top-k.
        explore: share of the k drawn uniformly, among the words not chosen yet; in [0, 1).
        noise: fixed field [L] of ``fixed_dither``, used where there is no generator.
        generator: of training, where noise and exploration are drawn; None at inference, without exploration.

    Returns:
        Indices [B, k], ascending, without repeats.
    """
    if generator is None:
        return tokens.top_k(scores + dither * noise, k)
    drawn = gumbel(torch.rand(scores.shape, generator=generator)).to(scores.device)
    return tokens.explore_top_k(scores + dither * drawn, k, explore, generator)
