"""Complex sub-aperture images -> what A2A trains on: baseband images, quadratures, noise floor.

A quadrature of a complex image is its real part after a turn by some phase. Two quadratures that stand
at a right angle carry the same echogenicity, but independent speckle and independent noise, provided that
the image is at baseband (its local mean frequency is 0): Dalsasso et al., "As if by magic: MERLIN", 2021,
for radar, whose speckle is that of ultrasound. So each aperture gives two independent looks.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from sparsecontrast.errors import DataError

Complex = NDArray[np.complex64]
Real = NDArray[np.float64]
WINDOW = (24.0, 12.0)  # pixels, axial and lateral: over which a mean frequency is taken to be one
MIN_SIDE = 16
LEAST, MOST = 1e-30, 1e30  # amplitudes of acquisitions; what is beyond cannot be told in float32
SAFE = 2.0**40  # largest amplitudes from 1 / SAFE to SAFE can be squared and summed in float32
DEAD = 1e-4  # of the other apertures' largest amplitude: below it, one has not recorded
QUIET, QUIET_WINDOW = 0.1, 8.0  # share of the pixels, and pixels over which power is averaged
BARE = 0.9  # of the power that apertures do not share, beyond which there may be noise alone,
EVEN = 0.7  # if the quiet places have this share of the mean power (two far apertures share no echo either)


def as_apertures(images: NDArray) -> Complex:
    """Check sub-aperture images and make them complex.

    Args:
        images: [M, H, W] with M >= 2; complex, or real RF with depth along H, whose analytic signal is taken.

    Returns:
        complex64 [M, H, W].

    Raises:
        DataError: as in ``check_images``, or images that add up to zero.
    """
    images = check_images(images)
    if images.dtype.kind != "c":
        from scipy.signal import hilbert

        images = np.asarray(hilbert(images.astype(np.float64), axis=1))
    if not np.abs(images.mean(0)).any():
        raise DataError("the sub-aperture images add up to zero: there is nothing to denoise")
    return images.astype(np.complex64)


def check_images(images: NDArray) -> NDArray:
    """Refuse what is not a set of sub-aperture images.

    Raises:
        DataError: another shape or type, fewer than two apertures, values that are not finite or too large
            or small for float32, an aperture that recorded nothing, or images without a phase.
    """
    images = np.asarray(images)
    if images.ndim != 3 or images.shape[0] < 2 or min(images.shape[1:]) < MIN_SIDE:
        raise DataError(
            f"sub-aperture images of shape {images.shape}: need [M, H, W] with at least 2 apertures and "
            f"{MIN_SIDE} pixels a side"
        )
    if images.dtype.kind not in "iufc":
        raise DataError(f"sub-aperture images of type {images.dtype}: need complex or real numbers")
    if not np.isfinite(images).all():
        bad = [m for m, image in enumerate(images) if not np.isfinite(image).all()]
        raise DataError(f"aperture {bad[0]} holds values that are not finite; leave it out or repair it")
    peaks = _peaks(images)
    if peaks.any() and not LEAST <= peaks.max() <= MOST:
        raise DataError(
            f"sub-aperture images reach {peaks.max():.1e}; scale them to within {LEAST:g} to {MOST:g}"
        )
    dead = np.flatnonzero(peaks < DEAD * np.median(peaks))
    if len(dead):
        raise DataError(f"aperture {dead[0]} is empty beside the others (it recorded nothing); leave it out")
    _check_phase(images)
    return images


def to_safe_range(images: NDArray) -> tuple[NDArray, float]:
    """Divide sub-aperture images by a power of two, if float32 could not hold their squares.

    Args:
        images: [M, H, W] as ``check_images`` takes them.

    Returns:
        The images, the same ones where no need was, and the power of two: 1 then.

    Raises:
        DataError: as in ``check_images``.
    """
    images = check_images(images)
    peak = float(_peaks(images).max())
    if not peak or 1 / SAFE <= peak <= SAFE:
        return images, 1.0
    unit = 2.0 ** round(math.log2(peak))
    return images.astype(np.complex128 if images.dtype.kind == "c" else np.float64) / unit, unit


def _peaks(images: NDArray) -> Real:
    """Give the largest amplitude of each aperture [M]."""
    if images.dtype.kind != "c":
        images = images.astype(np.float64)  # the least integer has no absolute value of its own type
    return np.abs(images).max((1, 2)).astype(np.float64)


def _check_phase(images: NDArray) -> None:
    """Refuse pictures: envelopes and log-images have lost the phase, from which all is learned."""
    if images.dtype.kind == "c":
        if not images.any() or np.imag(images).any():
            return
        raise DataError("complex images whose imaginary part is 0 everywhere; store RF as real numbers")
    if images.any() and (images.min() >= 0 or images.max() <= 0):
        raise DataError(
            "the images never change their sign: these are envelopes or log-images, not RF; A2A needs RF or "
            "complex images, as they are before the envelope is taken"
        )


def to_baseband(apertures: Complex) -> Complex:
    """Turn each pixel's phase, the same in all apertures, so that the local mean frequency becomes 0.

    The frequency is the phase between neighbours, averaged over a window; magnitudes do not change.
    """
    compound = apertures.mean(0).astype(np.complex128)
    phase = np.zeros(compound.shape)
    for axis in (0, 1, 0, 1):
        turned = np.moveaxis(compound * np.exp(-1j * phase), axis, 0)
        product = turned[1:] * turned[:-1].conj()
        product /= np.sqrt(np.abs(product)) + np.finfo(float).tiny ** 0.25  # a bright echo has no veto
        window = WINDOW if axis == 0 else WINDOW[::-1]
        step = np.angle(gaussian_filter(product.real, window) + 1j * gaussian_filter(product.imag, window))
        whole = np.concatenate([np.zeros_like(step[:1]), np.cumsum(step, 0)])
        phase += np.moveaxis(whole, 0, axis)
    return (apertures * np.exp(-1j * phase)).astype(np.complex64)


def noise_power(apertures: Complex) -> float:
    """Estimate the noise power in one aperture: what no other aperture shares, where it is quiet.

    By the van Cittert-Zernike theorem the covariance of echoes falls linearly with the distance of
    apertures, r(k) = r(0) (1 - k / N), while noise adds to r(0) alone: the nugget r(0) - (2 r(1) - r(2)).
    Side lobes differ between apertures too, in proportion to the echoes; so the nugget is taken where the
    image is quietest, unless it is evenly loud and next to nothing is shared anywhere. Apertures must stand
    in the order of their positions. Two apertures know no r(2): then r(0) - r(1).

    Side lobes and decorrelated echoes that reach into the quiet places count as noise, so it is too high.

    Returns:
        mean |not shared|^2 of one aperture, at least 0, and at most the mean power.
    """
    everywhere, power = _nugget(apertures), float((np.abs(apertures) ** 2).mean())
    local = gaussian_filter((np.abs(apertures) ** 2).mean(0).astype(np.float64), QUIET_WINDOW)
    quiet = np.quantile(local, QUIET)
    if everywhere > BARE * power and quiet > EVEN * power:
        return everywhere  # noise alone: quiet places are mere chance
    return min(everywhere, _nugget(apertures[:, local <= quiet]))


def _nugget(apertures: Complex) -> float:
    lags = covariance_lags(apertures)
    shared = 2 * lags[1] - lags[2] if len(lags) > 2 else lags[1]
    return float(lags[0] - np.clip(shared, max(lags[1], 0.0), lags[0]))


def covariance_lags(apertures: Complex, most: int = 3) -> list[float]:
    """Give Re mean(x_m conj x_(m + k)) for k = 0, 1, ... below ``most`` and M."""
    count = len(apertures)
    return [
        float(np.mean([np.vdot(apertures[m], apertures[m + k]).real for m in range(count - k)])
        / apertures[0].size)
        for k in range(min(most, count))
    ]  # fmt: skip


def noise_map(apertures: Complex, window: float = 10.0) -> Real:
    """Map what apertures do not share, noise and side lobes: its standard deviation in the compound.

    The nugget of ``noise_power``, each covariance averaged over a Gaussian window.

    Args:
        apertures: [M, H, W] in the order of their positions.
        window: standard deviation in pixels.

    Returns:
        [H, W] >= 0, in the unit of the images.
    """
    count = len(apertures)
    lags = []
    for k in range(min(3, count)):
        product = (apertures[: count - k] * apertures[k:].conj()).real.mean(0)
        lags.append(gaussian_filter(product.astype(np.float64), window))
    shared = 2 * lags[1] - lags[2] if count > 2 else lags[1]
    return np.sqrt(np.clip(lags[0] - shared, 0.0, lags[0]) / count)
