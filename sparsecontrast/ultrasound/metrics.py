"""Image quality of ultrasound: contrast, speckle, resolution, fidelity. Amplitude images in, floats out."""

import numpy as np
from numpy.typing import NDArray

from sparsecontrast.errors import EvaluationError

BINS = 100
DARK = 1e-6  # of the largest amplitude: below it two pixels are equally black
INNER, OUTER, FAR = 0.85, 1.15, 1.8  # of the inclusion's radius: margins at its edge, end of the background


def regions(
    x: NDArray, z: NDArray, inclusion: tuple[float, float, float]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Give masks [H, W] of the inside of an inclusion and of the ring of background around it.

    Raises:
        EvaluationError: fewer than 20 pixels in one of them.
    """
    distance = np.hypot(x[None] - inclusion[0], z[:, None] - inclusion[1]) / inclusion[2]
    inside, outside = distance < INNER, (distance > OUTER) & (distance < FAR)
    if min(inside.sum(), outside.sum()) < 20:
        raise EvaluationError("the inclusion, or the ring around it, has fewer than 20 pixels in the image")
    return inside, outside


def cnr(a: NDArray, b: NDArray) -> float:
    """Contrast-to-noise ratio |mean a - mean b| / sqrt(var a + var b) of amplitudes."""
    spread = float(np.sqrt(a.var() + b.var()))
    return float(abs(a.mean() - b.mean())) / spread if spread else float("inf")


def gcnr(a: NDArray, b: NDArray, bins: int = BINS) -> float:
    """Generalized contrast-to-noise ratio: 1 - overlap of the two histograms, from 0 to 1.

    Rodriguez-Molares et al., "The generalized contrast-to-noise ratio", 2020, eq. 9. Bins are equally wide
    in the logarithm of the amplitude, from the smallest to the largest of both.
    """
    both = np.concatenate([a.ravel(), b.ravel()])
    floor = DARK * both.max() if both.max() > 0 else 1.0
    a, b = (np.log(np.maximum(v.ravel(), floor)) for v in (a, b))
    low, high = min(a.min(), b.min()), max(a.max(), b.max())
    if high - low < 1e-9:
        return 0.0
    edges = np.linspace(low, high, bins + 1)
    shares = [np.histogram(v, edges)[0] / v.size for v in (a, b)]
    return float(1 - np.minimum(*shares).sum())


def speckle_snr(a: NDArray) -> float:
    """Mean over standard deviation of the amplitudes of a region; 1.91 in fully developed speckle."""
    return float(a.mean() / a.std()) if a.std() else float("inf")


def snr_db(image: NDArray, reference: NDArray) -> float:
    """Power of a reference over the power of the error, in dB; complex or amplitude images alike."""
    error = float((np.abs(image - reference) ** 2).mean())
    power = float((np.abs(reference) ** 2).mean())
    return float(10 * np.log10(power / error)) if error else float("inf")


def bias_db(image: NDArray, reference: NDArray) -> float:
    """Mean power of a region against that of the reference, in dB; 0 is none."""
    return float(10 * np.log10((np.abs(image) ** 2).mean() / (np.abs(reference) ** 2).mean()))


def fwhm(profile: NDArray, step: float = 1.0) -> float:
    """Full width at half maximum (-6 dB) of the highest peak of an amplitude profile, in units of ``step``.

    The flanks are interpolated linearly; nan where a flank never falls to half.
    """
    peak = int(profile.argmax())
    half = profile[peak] / 2
    left = peak
    while left >= 0 and profile[left] > half:
        left -= 1
    right = peak
    while right < len(profile) and profile[right] > half:
        right += 1
    if left < 0 or right == len(profile):
        return float("nan")
    start = left + (half - profile[left]) / (profile[left + 1] - profile[left])
    end = right - (half - profile[right]) / (profile[right - 1] - profile[right])
    return float((end - start) * step)


def point_fwhm(
    image: NDArray, x: NDArray, z: NDArray, points: NDArray, reach: int = 14
) -> tuple[float, float]:
    """Median lateral and axial FWHM of known points, metres; profiles through the maximum near each."""
    lateral, axial = [], []
    for px, pz in points:
        i, j = int(np.abs(z - pz).argmin()), int(np.abs(x - px).argmin())
        i0, j0 = max(i - 3, 0), max(j - 3, 0)
        near = image[i0 : i + 4, j0 : j + 4]
        di, dj = np.unravel_index(near.argmax(), near.shape)
        i, j = i0 + int(di), j0 + int(dj)
        lateral.append(fwhm(image[i, max(j - reach, 0) : j + reach + 1], x[1] - x[0]))
        axial.append(fwhm(image[max(i - reach, 0) : i + reach + 1, j], z[1] - z[0]))
    known = [np.array(v)[np.isfinite(v)] for v in (lateral, axial)]
    return tuple(float(np.median(v)) if len(v) else float("nan") for v in known)  # type: ignore[return-value]
