"""Delay and sum: channel data of a synthetic aperture -> one complex image a transmission.

Jensen et al., "Synthetic aperture ultrasound imaging", 2006: pixel p of transmission m is the mean over
elements r of the echo at the time |p - tx_m| / c + |p - rx_r| / c. Images are at baseband: their phase is
that of the RF echo less the carrier of the depth, exp(4 pi i fc z / c).
"""

import numpy as np
from numpy.typing import NDArray

from sparsecontrast.errors import DataError
from sparsecontrast.ultrasound.acquisition import Acquisition
from sparsecontrast.ultrasound.geometry import Geometry

UPSAMPLE = 4  # by Fourier, before linear interpolation: the noise power then hardly depends on the delay
AXIAL, LATERAL = 0.25, 0.4  # pixel in wavelengths
DELAYS = 2**28  # elements x pixels, 8 bytes each: more is a field in another unit, or too large for one image


def grid(geometry: Geometry) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Give the axes x [W] and z [H], metres, of a grid that is fine enough for the wavelength."""
    wavelength = geometry.c / geometry.fc
    x = np.arange(*geometry.x_extent, LATERAL * wavelength)
    z = np.arange(*geometry.z_extent, AXIAL * wavelength)
    return x, z


def delay_and_sum(
    channels: NDArray, geometry: Geometry, x: NDArray, z: NDArray, halves: bool = False
) -> NDArray[np.complex64]:
    """Beamform each transmission.

    Args:
        channels: complex [M, nel, T], demodulated at ``fc``.
        geometry: of the array.
        x: [W] lateral pixel positions, metres.
        z: [H] depths, metres.
        halves: give the left and the right half of the receivers apart, as 2 M apertures.

    Returns:
        complex64 [M, H, W], or [2 M, H, W] ordered left, right, left, ...; echoes after the record are 0.

    Raises:
        DataError: the channels do not fit the geometry, or the field has too many pixels.
    """
    if channels.ndim != 3 or channels.shape[:2] != (len(geometry.tx), geometry.nel):
        raise DataError(
            f"channel data of shape {channels.shape}: the geometry has {len(geometry.tx)} transmissions and "
            f"{geometry.nel} elements"
        )
    if geometry.nel * len(x) * len(z) > DELAYS:
        raise DataError(
            f"a field of {len(z)} x {len(x)} pixels for {geometry.nel} elements is too large; make x_extent "
            "and z_extent smaller, and check that they are in metres and fc in hertz"
        )
    fine = _upsample(channels.astype(np.complex64), UPSAMPLE)
    delay = np.sqrt((x[None, None] - geometry.elements[:, None, None]) ** 2 + z[None, :, None] ** 2)
    delay /= geometry.c
    carrier = 2 * z[None, :, None][0] / geometry.c
    parts = np.array_split(np.arange(geometry.nel), 2) if halves else [np.arange(geometry.nel)]
    images = np.zeros((len(geometry.tx), len(parts), len(z), len(x)), np.complex64)
    for shot, element in enumerate(geometry.tx):
        for number, receivers in enumerate(parts):
            for receiver in receivers:
                time = delay[element] + delay[receiver]
                echo = _at(fine[shot, receiver], time * (geometry.fs * UPSAMPLE))
                images[shot, number] += echo * np.exp(2j * np.pi * geometry.fc * (time - carrier))
            images[shot, number] /= len(receivers)
    return images.reshape(-1, len(z), len(x))


def sub_apertures(
    acquisition: Acquisition,
) -> tuple[NDArray, NDArray[np.float64] | None, NDArray[np.float64] | None]:
    """Give the sub-aperture images of an acquisition, beamformed if need be, and their axes x, z (m)."""
    if acquisition.images is not None:
        return acquisition.images, acquisition.x, acquisition.z
    if acquisition.channels is None or acquisition.geometry is None:
        raise DataError("the acquisition holds neither images nor channel data with their geometry")
    x, z = grid(acquisition.geometry)
    return delay_and_sum(acquisition.channels, acquisition.geometry, x, z), x, z


def _upsample(channels: NDArray[np.complex64], times: int) -> NDArray[np.complex64]:
    """Resample along the last axis by zero-padding the spectrum: [..., T] -> [..., T * times]."""
    length = channels.shape[-1]
    spectrum = np.fft.fft(channels, axis=-1)
    padded = np.zeros((*channels.shape[:-1], length * times), spectrum.dtype)
    upper = (length + 1) // 2
    padded[..., :upper] = spectrum[..., :upper]
    padded[..., padded.shape[-1] - (length - upper) :] = spectrum[..., upper:]
    return (np.fft.ifft(padded, axis=-1) * times).astype(np.complex64)


def _at(signal: NDArray[np.complex64], position: NDArray[np.float64]) -> NDArray[np.complex64]:
    """Interpolate linearly at fractional sample positions; 0 outside of the record."""
    inside = (position >= 0) & (position < len(signal) - 1)
    left = np.where(inside, position, 0).astype(np.int64)
    share = np.where(inside, position - left, 0).astype(np.float32)
    return np.where(inside, signal[left] * (1 - share) + signal[left + 1] * share, 0).astype(np.complex64)
