"""Does burnt-in text draw the choice of cells? Letters are stamped into films, and the choice is made anew.

The mask of ``models/saliency.py`` puts the text that it finds last, so what it finds is never kept; what it
misses it cannot tell of. This probe asks no mask: how much more often is a cell kept once a letter stands in
it? Its answer is a sum over films and tells nothing of one patient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

GREYS = (0.6, 0.7, 0.8, 0.9, 1.0)  # of full scale
HEIGHTS = (0.05, 0.1)  # of the film's side; a letter is never higher than a cell
FILMS = 32  # a letter in each of four corners, one at a time: 128 choices a grey and height
BAND = (0.1, 0.3)  # of the film's side: how far from its two nearest edges a letter stands
LETTERS = ("#....#....#....#....#....#....#####", "####.#...##...#####.#.#..#..#.#...#")  # L, R: 7 rows of 5

Choose = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Spots:
    """Where letters stand, one a film: F films.

    Attributes:
        centres: row and column, in shares of the film's side, [F, 2].
        letters: which of ``LETTERS``, [F].
    """

    centres: np.ndarray
    letters: np.ndarray

    def cells(self, grid: tuple[int, int]) -> np.ndarray:
        """Number of the cell in which each letter stands, [F]."""
        rows, columns = (self.centres * grid).astype(int).T
        return rows * grid[1] + columns


def marker_pull(
    choose: Choose, images: np.ndarray, grid: tuple[int, int], generator: Generator
) -> dict[str, Any]:
    """Measure how much more often a cell is kept once a letter stands in it.

    Args:
        choose: uint8 images [N, S, S] -> kept cells, boolean [N, cells].
        images: films that nothing was trained on, uint8 [N, S, S]; the first ``FILMS`` are used.
        grid: (rows, columns) of cells.
        generator: draws where letters stand, and which.

    Returns:
        ``stamps``: for each grey and height ``kept``, the share of the cells with a letter that are kept;
        ``marker_base``, the share of the same cells kept without one; ``marker_pull``, how far the highest
        ``kept`` lies above it, and its ``marker_grey``; ``marker_films``.
    """
    films = images[:FILMS]
    plain = choose(films)
    corners = [draw_spots(len(films), corner, generator) for corner in range(4)]
    every = np.arange(len(films))
    base = float(np.mean([plain[every, spots.cells(grid)] for spots in corners]))
    stamps = []
    for grey in GREYS:
        for height in HEIGHTS:
            hits = [choose(stamp(films, s, grid, grey, height))[every, s.cells(grid)] for s in corners]
            stamps.append({"grey": grey, "height": height, "kept": float(np.mean(hits))})
    worst = max(stamps, key=lambda one: one["kept"])
    return {
        "marker_pull": worst["kept"] - base, "marker_grey": worst["grey"], "marker_base": base,
        "marker_films": len(films), "stamps": stamps,
    }  # fmt: skip


def draw_spots(count: int, corner: int, generator: Generator) -> Spots:
    """Draw where a letter stands near one of the four corners of each of ``count`` films."""
    low, high = BAND
    centres = low + (high - low) * torch.rand(count, 2, generator=generator, dtype=torch.float64).numpy()
    letters = torch.randint(len(LETTERS), (count,), generator=generator).numpy()
    return Spots(np.abs(centres - np.array(divmod(corner, 2))), letters)


def stamp(images: np.ndarray, spots: Spots, grid: tuple[int, int], grey: float, height: float) -> np.ndarray:
    """Return copies of films, uint8 [F, S, S], each with one letter that lies wholly within its cell."""
    side, stamped = images.shape[1], images.copy()
    ends = [np.linspace(0, side, cells + 1).round().astype(int) for cells in grid]
    tall = max(1, min(round(height * side), *(int(np.diff(e).min()) for e in ends)))
    ink = [_letter(rows, tall).numpy() for rows in LETTERS]
    for film, cell, centre, which in zip(
        stamped, spots.cells(grid), spots.centres * side, spots.letters, strict=True
    ):
        alpha = ink[which]
        corner = (centre - np.array(alpha.shape) / 2).round().astype(int)
        place = divmod(int(cell), grid[1])
        top, left = (
            int(np.clip(at, e[i], e[i + 1] - n))
            for at, e, i, n in zip(corner, ends, place, alpha.shape, strict=True)
        )
        part = film[top : top + alpha.shape[0], left : left + alpha.shape[1]]
        part[:] = np.rint(part * (1 - alpha) + 255 * grey * alpha)
    return stamped


def _letter(dots: str, tall: int) -> Tensor:
    """How much ink each pixel of a letter holds, in [0, 1]: [tall, 5 / 7 tall]."""
    ink = torch.tensor([float(dot == "#") for dot in dots]).reshape(1, 1, 7, 5)
    size = (tall, max(1, round(tall * 5 / 7)))
    return F.interpolate(ink, size, mode="bilinear", antialias=True)[0, 0].clamp(0, 1)
