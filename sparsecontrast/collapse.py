"""Has the selection collapsed? Five numbers over held-out images, and when they are an alarm.

A selector that has stopped to look keeps the same cells whatever the image shows, clings to the
border of the film, or keeps burnt-in text; every loss may look healthy meanwhile. The numbers are
sums over images: none of them tells anything of one patient. Of text they see what the mask finds;
what it misses is measured by ``stamps.py``, and its alarm is here.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

FORETOLD_ALARM = 0.9
"""A choice that follows one map for all images is 1, whatever their borders. Trained scorers measured .42
to .66 on grids of 4 x 4 and 7 x 7 (``benchmarks.localisation``), one of a dozen steps, which knows little
beyond the centre prior, .84, perturbed top-k where it missed nine in ten small lesions .92. Sameness
itself raises no alarm: different borders make a fixed map look varied, down to .8."""
BORDER_ALARM = 1.25
"""A choice by chance is 1; trained scorers measured .07 to .7 with the centre prior and 1 without it, local
energy 1.6, attention distilled from a teacher of few steps 2.0, nothing but rim on a grid of 7 x 7."""
EXCLUDED_ALARM = 0.02
"""The mask puts black border and text last, so a whole choice has none: above rounding it is not at work."""
MARKER_ALARM = 0.2
"""The default scorer on cells of 7 x 7, three seeds, phantoms and real films: .00 to .14 with the mask, .18
to .48 with one that knew nearly white text alone, .52 to .87 without any; a map that no image changes 0."""
FEW_IMAGES = 8
"""N independent choices have a sameness of 1 / N already: below eight images nothing is said."""


def collapse(
    kept: np.ndarray, scores: np.ndarray, excluded: np.ndarray, grid: tuple[int, int]
) -> dict[str, float]:
    """Measure how a selection over N images is spread.

    With p_c the share of the images that keep cell c, n cells and m of them kept,

        sameness = (sum_c p_c^2 / m - m / n) / (1 - m / n):

    the overlap of two images drawn with replacement, 0 at that of independent uniform choices (1 / N
    more for N images, each of which may meet itself), 1 where all images keep the same cells.

    Args:
        kept: boolean [N, cells], m true in every row, 0 < m < cells.
        scores: what chose them, [N, cells]; at excluded cells they are not read.
        excluded: boolean [N, cells]: collimation border and burnt-in text.
        grid: (rows, columns) of cells.

    Returns:
        ``sameness``; ``foretold``, see below; ``border_share``, the share of the kept cells in the outer
        ring of the grid over that ring's share of the cells; ``excluded_share``, the share of the kept
        cells that are excluded although another cell was left to keep; ``entropy`` of the kept cells'
        places in [0, 1], 1 where every cell is kept equally often.
    """
    count, cells = kept.shape
    m = int(kept[0].sum())
    often = kept.mean(0)
    even = m / cells
    ring = np.ones(grid, dtype=bool)
    ring[1:-1, 1:-1] = False
    # an image that is black but for a few cells cannot do otherwise
    forced = np.maximum(m - (~excluded).sum(1), 0)
    places = often[often > 0] / m
    return {
        "sameness": float((np.square(often).sum() / m - even) / (1 - even)),
        "foretold": _foretold(kept, scores, excluded, m),
        "border_share": float(often[ring.ravel()].sum() / m / ring.mean()),
        "excluded_share": float(((kept & excluded).sum(1) - forced).sum() / (count * m)),
        "entropy": float(-(places * np.log(places)).sum() / np.log(cells)),
    }


def alarms(measured: Mapping[str, Any]) -> list[str]:
    """Name what is wrong: foretold, border_share, excluded_share, marker_pull; nothing where all is well.

    Args:
        measured: what ``collapse`` returns, and what ``stamps.marker_pull`` does where it was asked.
    """
    bounds = {
        "foretold": FORETOLD_ALARM,
        "border_share": BORDER_ALARM,
        "excluded_share": EXCLUDED_ALARM,
        "marker_pull": MARKER_ALARM,
    }
    return [name for name, bound in bounds.items() if name in measured and measured[name] > bound]


def _foretold(kept: np.ndarray, scores: np.ndarray, excluded: np.ndarray, m: int) -> float:
    """Share of an image's choice that the mean map of the OTHER images foretells: 0 by chance, 1 all.

    Each image is given the cells that it may keep, so that its borders do not count as a choice.
    """
    usable = ~excluded
    free, others = usable.sum(1), np.maximum(usable.sum(0) - usable, 1)
    read = np.where(usable, scores, 0).astype(np.float64)
    # rounded, because equal cells of one map must stay equal: both sides then take the lower number
    guess = np.where(usable, np.round((read.sum(0) - read) / others, 5), -np.inf)
    best = np.argsort(-guess, axis=1, kind="stable")[:, :m]
    hits = np.take_along_axis(kept, best, axis=1).mean(1)
    asked = free > m  # elsewhere there is nothing to choose
    if not asked.any():
        return 0.0
    chance = (m / free[asked]).mean()
    return float((hits[asked].mean() - chance) / (1 - chance))
