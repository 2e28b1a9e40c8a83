"""Vessels that branch from the hila into the lungs, drawn as soft dots along their lines."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from sparsecontrast.data.anatomy import Anatomy, Array, Chest

_LENGTHS = (0.085, 0.062, 0.046, 0.034)
_DENSITY = 58.0
"""Attenuation of a vessel per image width of its calibre."""
_CALIBRES = (0.0062, 0.0044, 0.0032, 0.0024)


class Dots(NamedTuple):
    """Centres in the body frame, radii in image widths, attenuation per dot spacing; each [n]."""

    u: Array
    v: Array
    radius: Array
    weight: Array


@lru_cache(maxsize=4)  # films of one patient follow each other
def vessel_tree(anatomy: Anatomy, spacing: float) -> Dots:
    """Grow both trees of a patient: nine stems a side in a fan, each forking at every level.

    The same patient has the same trees at any spacing.

    Args:
        anatomy: the patient.
        spacing: distance between dots along a vessel, in image widths.
    """
    rng = np.random.Generator(np.random.PCG64(anatomy.unrest + 1))
    side = np.repeat([-1.0, 1.0], 9)
    heading = np.tile(np.linspace(-1.25, 1.35, 9), 2) + rng.normal(0, 0.10, 18)
    u = rng.uniform(0.062, 0.082, 18)
    v = anatomy.hilum + 0.035 * np.sin(heading) + 0.002 - 0.010 * side
    parts = []
    for level_length, level_calibre in zip(_LENGTHS, _CALIBRES, strict=True):
        n = len(u)
        length = level_length * rng.uniform(0.7, 1.35, n) * (1 + 0.5 * np.clip(np.sin(heading), 0, 1))
        bend, width, fork = rng.normal(0, 0.35, n), rng.uniform(0.75, 1.25, n), rng.uniform(0.22, 0.55, n)
        steps = int(np.ceil(level_length * 1.2 / spacing))
        angle = heading[:, None] + bend[:, None] * ((np.arange(steps) + 0.5) / steps)
        stride = (length / steps)[:, None]
        du, dv = np.cumsum(np.cos(angle), axis=1) * stride, np.cumsum(np.sin(angle), axis=1) * stride
        calibre = np.broadcast_to((level_calibre * width)[:, None], du.shape)
        across, down = u[:, None] + du, v[:, None] + dv
        parts.append(
            [a.ravel() for a in (side[:, None] * across, down, calibre, calibre * (stride / spacing))]
        )
        heading = np.concatenate([angle[:, -1] + fork, angle[:, -1] - fork * 0.8])
        u, v, side = np.tile(across[:, -1], 2), np.tile(down[:, -1], 2), np.tile(side, 2)
    return Dots(*(np.concatenate(column).astype(np.float32) for column in zip(*parts, strict=True)))


def vessels(
    anatomy: Anatomy, here: Chest, to_pixels: Callable[[Array, Array], tuple[Array, Array]], width: int
) -> Array:
    """Return both trees and hila as attenuation, seen only against air.

    Args:
        anatomy: the patient.
        here: points [H, W] of a window of the pixel grid.
        to_pixels: maps u, v of the body frame to x, y in pixels of the window.
        width: of the whole image, in pixels.
    """
    spacing = 1.7  # pixels; dots of radius 0.75 and more flow into a line
    dots = vessel_tree(anatomy, spacing / width)
    radius = np.float32(0.5 * width) * dots.radius
    # A line of dots should peak at _DENSITY x calibre; its section is sqrt(2 pi) x radius x peak.
    weight = dots.weight * radius * np.float32(spacing * 2.5 * _DENSITY)
    x, y = to_pixels(dots.u, dots.v)
    trees = splat(x, y, np.maximum(radius, np.float32(0.75)), weight, here.u.shape)
    return (trees + _hila(anatomy, here)) * np.minimum(here.air * np.float32(0.8), 1)


def _hila(anatomy: Anatomy, here: Chest) -> Array:
    """Return the two knots of vessels from which the trees grow; the left one lies higher."""
    height = np.float32(anatomy.hilum + 0.012) - np.float32(0.022) * (here.u > 0)
    ring = ((here.across - np.float32(0.075)) * np.float32(1 / 0.042)) ** 2
    ring += ((here.v - height) * np.float32(1 / 0.07)) ** 2
    return np.float32(0.45) * np.maximum(1 - ring, 0)


def splat(x: Array, y: Array, radius: Array, weight: Array, shape: tuple[int, ...]) -> Array:
    """Sum soft round dots into an image.

    Args:
        x: centres [n] in pixels, pixel i covering [i, i+1).
        y: centres [n] in pixels.
        radius: Gaussian radii [n] in pixels.
        weight: integral [n] of each dot, in value x pixel^2.
        shape: (H, W) of the image.

    Returns:
        float32 [H, W]; dots that would cross the border are left out.
    """
    reach = int(np.ceil(2 * float(radius.max(initial=0.5))))
    inside = (x >= reach) & (x < shape[1] - reach) & (y >= reach) & (y < shape[0] - reach)
    x, y, radius, weight = x[inside], y[inside], radius[inside], weight[inside]
    column, row = x.astype(np.intp), y.astype(np.intp)
    offset = np.arange(-reach, reach + 1)
    from_centre = offset.astype(np.float32) + np.float32(0.5)
    fall = np.float32(-0.5) / radius**2
    wide = np.exp((from_centre - (x - column).astype(np.float32)[:, None]) ** 2 * fall[:, None])
    tall = np.exp((from_centre - (y - row).astype(np.float32)[:, None]) ** 2 * fall[:, None])
    tall *= (weight * fall * np.float32(-1 / np.pi))[:, None]
    corner = row * shape[1] + column
    where = corner[:, None, None] + (offset * shape[1])[:, None] + offset
    flat = np.bincount(
        where.ravel(), (tall[:, :, None] * wide[:, None, :]).ravel(), minlength=shape[0] * shape[1]
    )
    return flat.reshape(shape).astype(np.float32)
