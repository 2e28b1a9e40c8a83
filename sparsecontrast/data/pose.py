"""How a patient stood before the detector: the map between body frame and film, drawn per image."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sparsecontrast.data.anatomy import Array, Box, Window
from sparsecontrast.data.scanner import draw_scanner

_SPARE = 0.012
"""Image widths by which the patient's irregularity may shift a point, and a pixel."""


@dataclass(frozen=True)
class Pose:
    """How a patient stood: shift in image widths, scale, turn in radians, and the collimator's borders."""

    view: Literal["PA", "AP"]
    magnify: float
    medial: float
    shift: tuple[float, float]
    scale: float
    turn: float
    borders: tuple[float, float, float, float]
    marker: tuple[float, float]
    exposure: float

    def to_body(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Map points in image widths from the upper left corner to the body frame."""
        cos, sin = np.float32(np.cos(self.turn) / self.scale), np.float32(np.sin(self.turn) / self.scale)
        dx, dy = x - np.float32(0.5 + self.shift[0]), y - np.float32(0.5 + self.shift[1])
        return cos * dx + sin * dy, cos * dy - sin * dx + np.float32(0.5)

    def to_image(self, u: Array, v: Array) -> tuple[Array, Array]:
        """Map points of the body frame to image widths from the upper left corner."""
        cos, sin = np.float32(np.cos(self.turn) * self.scale), np.float32(np.sin(self.turn) * self.scale)
        x, y = cos * u - sin * (v - np.float32(0.5)), sin * u + cos * (v - np.float32(0.5))
        return x + np.float32(0.5 + self.shift[0]), y + np.float32(0.5 + self.shift[1])


def draw_pose(seed: int, site: int, patient: int, image: int) -> Pose:
    """Draw how the patient stood for one film at one hospital."""
    rng = np.random.Generator(np.random.PCG64([seed, site, patient, image, 1]))
    scanner = draw_scanner(seed, site)
    is_ap = rng.random() < scanner.ap_share
    left, top, right, bottom = (scanner.border * rng.uniform(0, 1, 4)).tolist()
    return Pose(
        view="AP" if is_ap else "PA",
        magnify=scanner.ap_magnify if is_ap else 1.0,
        medial=scanner.ap_scapula if is_ap else 0.0,
        shift=(rng.normal(0, 0.010), rng.normal(0, 0.010)),
        scale=rng.uniform(0.93, 1.02),
        turn=rng.normal(0, 0.020),
        borders=(left, top, right, bottom),
        marker=(
            rng.uniform(0.03, 0.09) + top,
            rng.uniform(0.03, 0.08) + (right if scanner.marker == "L" else left),
        ),
        exposure=rng.normal(0, 0.12),
    )


def pixel_window(
    box: Box, pose: Pose, size: int, within: Window = (slice(0, None), slice(0, None))
) -> Window:
    """Rows and columns, counted from those of ``within``, of the pixels that a box may touch."""
    left, top, right, bottom = box
    if left >= right:
        return slice(0, 0), slice(0, 0)
    cos, sin = pose.scale * math.cos(pose.turn), pose.scale * math.sin(pose.turn)
    u, v, wide, tall = (left + right) / 2, (top + bottom) / 2 - 0.5, (right - left) / 2, (bottom - top) / 2
    middles = (cos * u - sin * v + 0.5 + pose.shift[0], sin * u + cos * v + 0.5 + pose.shift[1])
    reaches = (cos * wide + abs(sin) * tall + _SPARE, cos * tall + abs(sin) * wide + _SPARE)
    spans = [
        slice(max(0, int(size * (middle - reach)) - start), max(0, int(size * (middle + reach)) + 1 - start))
        for middle, reach, start in zip(middles, reaches, (within[1].start, within[0].start), strict=True)
    ]
    return spans[1], spans[0]
