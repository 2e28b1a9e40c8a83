"""Small acquisitions whose echoes, noise and anatomy are known."""

import numpy as np
from scipy.ndimage import gaussian_filter


def field(rng, shape, smooth=1.2):
    raw = rng.standard_normal((2, *shape))
    out = gaussian_filter(raw[0], smooth) + 1j * gaussian_filter(raw[1], smooth)
    return out / np.sqrt((np.abs(out) ** 2).mean())


def disc(shape=(64, 64), radius=14):
    z, x = np.mgrid[: shape[0], : shape[1]]
    return np.hypot(z - shape[0] / 2, x - shape[1] / 2) < radius


def acquisition(seed=0, count=6, sigma=0.5, contrast=0.05, shape=(64, 64)):
    """Give apertures [M, H, W] with and without noise, around a dark disc.

    Aperture m sums fields m .. m + count - 1, so that the covariance falls linearly with the distance, as of
    echoes; ``sigma`` is the noise of one aperture beside echoes of 1, ``contrast`` the amplitude in the disc.
    """
    rng = np.random.default_rng(seed)
    fields = [field(rng, shape) for _ in range(2 * count)]
    echoes = np.stack([sum(fields[m : m + count]) for m in range(count)]) / np.sqrt(count)
    echoes = echoes * np.where(disc(shape), contrast, 1.0)
    noise = np.stack([field(rng, shape, 0.6) for _ in range(count)]) * sigma
    return (echoes + noise).astype(np.complex64), echoes.astype(np.complex64)
