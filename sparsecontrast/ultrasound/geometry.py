"""A linear array and the field that it looks at, checked where it is made."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsecontrast.errors import DataError

BOUNDS = {  # what no ultrasound array lies outside of; a value beyond is in another unit, or torn
    "fc": (1e5, 1e8, "hertz"),
    "fs": (1e5, 1e9, "hertz"),
    "pitch": (1e-6, 1e-2, "metres"),
    "c": (300.0, 7000.0, "metres a second"),
}
ELEMENTS = 4096
FAR = 1.0  # metres: no field reaches further


@dataclass(frozen=True)
class Geometry:
    """A linear array and the field that it looks at; metres, hertz, metres a second.

    Attributes:
        fc: centre frequency, to which the IQ data were demodulated.
        fs: sampling frequency of the IQ data; the first sample is at the moment of transmission.
        pitch: distance of neighbouring elements; the array is centred at x = 0.
        nel: elements, all of which receive.
        tx: elements that transmit, one a transmission.
        c: speed of sound.
        x_extent: lateral edges of the field.
        z_extent: axial edges of the field.
        inclusion: (x, z, radius) of a known round inclusion, for metrics.

    Raises:
        DataError: a value that is not finite, or that no array has.
    """

    fc: float
    fs: float
    pitch: float
    nel: int
    tx: tuple[int, ...]
    c: float
    x_extent: tuple[float, float]
    z_extent: tuple[float, float]
    inclusion: tuple[float, float, float] | None = None

    def __post_init__(self):
        for name, (low, high, unit) in BOUNDS.items():
            value = getattr(self, name)
            if not low <= value <= high:  # not a number is not within either
                raise DataError(f"geometry: {name}={value:g} is not within {low:g} to {high:g} {unit}")
        if not 2 <= self.nel <= ELEMENTS or not self.tx:
            raise DataError(f"geometry: nel={self.nel} must be 2 to {ELEMENTS}, and tx must not be empty")
        if not all(0 <= element < self.nel for element in self.tx):
            raise DataError(f"geometry: tx={list(self.tx)} names elements outside of 0..{self.nel - 1}")
        edges = (*self.x_extent, *self.z_extent, *(self.inclusion or ()))
        if not all(math.isfinite(value) and abs(value) <= FAR for value in edges):
            raise DataError(
                f"geometry: x_extent={self.x_extent}, z_extent={self.z_extent}, inclusion={self.inclusion} "
                f"must be numbers within {FAR:g} metre"
            )
        if self.x_extent[0] >= self.x_extent[1] or not 0 <= self.z_extent[0] < self.z_extent[1]:
            raise DataError("geometry: x_extent and z_extent must each grow, z from 0 on")
        if self.inclusion is not None and self.inclusion[2] <= 0:
            raise DataError(f"geometry: the inclusion's radius {self.inclusion[2]:g} must be above 0")

    @property
    def elements(self) -> NDArray[np.float64]:
        """Lateral positions of the elements [nel], metres."""
        return np.asarray((np.arange(self.nel) - (self.nel - 1) / 2) * self.pitch, np.float64)
