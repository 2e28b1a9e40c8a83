"""A linear simulator of point scatterers, for experiments and tests: no attenuation, no directivity.

The echo of a scatterer is a Gaussian pulse at the time of its path, demodulated at ``fc``. It is exact for
what it models, so a beamformer can be held to it; ``pymust_echoes.py`` gives more realistic echoes.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from sparsecontrast.ultrasound.acquisition import Geometry

Simulator = Callable[[NDArray, NDArray, Geometry, int], NDArray[np.complex64]]
"""Points, amplitudes, geometry and samples of a record to channel data, as ``echoes``."""

BANDWIDTH = 0.6  # of fc, full width at half of the maximum amplitude
SMALL = Geometry(
    fc=5e6, fs=10e6, pitch=0.3e-3, nel=16, tx=(0, 5, 10, 15), c=1540.0,
    x_extent=(-2.4e-3, 2.4e-3), z_extent=(6e-3, 12e-3),
)  # fmt: skip


def echoes(points: NDArray, amplitudes: NDArray, geometry: Geometry, samples: int) -> NDArray[np.complex64]:
    """Give the IQ channel data of point scatterers.

    Args:
        points: [N, 2] positions x, z in metres.
        amplitudes: [N] real or complex.
        geometry: of the array.
        samples: of a record.

    Returns:
        complex64 [M, nel, samples]; linear in the amplitudes.
    """
    time = np.arange(samples) / geometry.fs
    # a Gaussian spectrum of this full width at half maximum has a pulse of this standard deviation
    width = np.sqrt(2 * np.log(2)) / (np.pi * BANDWIDTH * geometry.fc)
    data = np.zeros((len(geometry.tx), geometry.nel, samples), np.complex64)
    for (x, z), amplitude in zip(np.atleast_2d(points), np.atleast_1d(amplitudes), strict=True):
        delay = np.hypot(geometry.elements - x, z) / geometry.c
        path = delay[list(geometry.tx)][:, None] + delay[None]
        pulse = np.exp(-(((time - path[..., None]) / width) ** 2) / 2)
        data += (amplitude * pulse * np.exp(-2j * np.pi * geometry.fc * path)[..., None]).astype(np.complex64)
    return data


def inclusion_phantom(
    geometry: Geometry,
    contrast_db: float,
    generator: np.random.Generator,
    count: int = 1500,
    simulator: Simulator | None = None,
) -> tuple[NDArray[np.complex64], Geometry]:
    """Draw scatterers around and in a round inclusion in the middle of the field.

    Args:
        geometry: of the array and field.
        contrast_db: of the inclusion against the background; -inf for a cyst without echoes.
        generator: of positions and amplitudes.
        count: of scatterers; about ten a resolution cell give fully developed speckle.
        simulator: of their echoes; ``echoes`` by default, or ``pymust_echoes``.

    Returns:
        Channel data without noise, and the geometry with the inclusion in it.
    """
    (x0, x1), (z0, z1) = geometry.x_extent, geometry.z_extent
    inclusion = ((x0 + x1) / 2, (z0 + z1) / 2, min(x1 - x0, z1 - z0) / 4)
    points = generator.uniform((x0, z0), (x1, z1), (count, 2))
    amplitudes = generator.standard_normal(count)
    inside = np.hypot(points[:, 0] - inclusion[0], points[:, 1] - inclusion[1]) < inclusion[2]
    amplitudes[inside] *= 10 ** (contrast_db / 20)
    samples = int(np.ceil(1.3 * 2 * np.hypot(z1, x1 - x0) / geometry.c * geometry.fs))
    return (simulator or echoes)(points, amplitudes, geometry, samples), replace(
        geometry, inclusion=inclusion
    )


def add_noise(channels: NDArray, snr_db: float, generator: np.random.Generator) -> NDArray[np.complex64]:
    """Add white circular noise to channel data, ``snr_db`` below their own mean power."""
    power = float((np.abs(channels) ** 2).mean()) * 10 ** (-snr_db / 10)
    noise = generator.standard_normal((*channels.shape, 2)) * np.sqrt(power / 2)
    return (channels + noise[..., 0] + 1j * noise[..., 1]).astype(np.complex64)
