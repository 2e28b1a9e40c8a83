"""What A2A is compared with: other ways from sub-aperture images [M, H, W] to one amplitude image [H, W].

``scikit-image`` (non-local means) and ``bm3d`` are taken where they are installed; the table says where not.
"""

import importlib.util
import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from sparsecontrast.methods.a2a import SCALES, A2AConfig, power_features
from sparsecontrast.models.twin_pyramid import build_twin_pyramid

Denoiser = Callable[[NDArray], NDArray]
RANGE_DB = 70.0  # of the log-image that BM3D and non-local means see
LOG_SPECKLE_DB = 5.57  # standard deviation of fully developed speckle in a log-image
STRENGTHS = (0.25, 0.5, 0.75, 1.0)  # of the speckle's own deviation


def compound(images: NDArray) -> NDArray:
    """Average coherently: what every scanner does."""
    return np.abs(images.mean(0))


def coherence_factor(images: NDArray) -> NDArray:
    """Weight the compound by its coherence factor |sum|^2 / (M sum | |^2), Mallart and Fink 1994."""
    mean = images.mean(0)
    return np.abs(mean) * np.abs(mean) ** 2 / np.maximum((np.abs(images) ** 2).mean(0), 1e-30)


def noise2noise(images: NDArray, config: A2AConfig) -> NDArray:
    """Foretell the log-power of one half of the apertures from the other (Lehtinen et al. 2018), L2.

    The network, its inputs, its steps and its optimiser are A2A's; halves are the even and the odd
    apertures, which see the anatomy under the same angles. The output is the mean of both directions.
    """
    generator = torch.Generator().manual_seed(config.seed)
    net = build_twin_pyramid(1 + len(SCALES), config.anatomy, config.noise, generator)
    unit = float(np.abs(images.mean(0)).std())
    pair = np.stack([np.abs(images[0::2].mean(0)), np.abs(images[1::2].mean(0))]) / unit
    power = torch.from_numpy((pair**2).astype(np.float32))
    params = [p for n, p in net.named_parameters() if not n.startswith(("noise", "mix"))]
    optimiser = torch.optim.Adam(params, config.lr)
    for step in range(config.steps):
        for group in optimiser.param_groups:
            group["lr"] = config.lr * min(
                (step + 1) / 10, 0.5 + 0.5 * math.cos(math.pi * step / config.steps)
            )
        start = int(torch.randint(max(power.shape[1] - config.crop, 0) + 1, (), generator=generator))
        seen = power[:, start : start + config.crop]
        features, base = power_features(seen)
        target = torch.log(seen.flip(0) + 1e-4 * seen.mean())
        loss = ((base + net.decode(net.anatomy(features)) - target) ** 2).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        features, base = power_features(power)
        return np.exp(0.5 * (base + net.decode(net.anatomy(features))).mean(0).double().numpy()) * unit


def smoother(name: str, strength: float) -> Denoiser:
    """Give ``nlm`` or ``bm3d`` over the log-image of the compound.

    Args:
        name: ``nlm`` or ``bm3d``.
        strength: standard deviation that it is told, as a share of that of speckle.
    """

    def run(images: NDArray) -> NDArray:
        level = 20 * np.log10(np.maximum(compound(images), 1e-30))
        top = float(level.max())
        unit = np.clip((level - top) / RANGE_DB + 1, 0, 1)
        sigma = strength * LOG_SPECKLE_DB / RANGE_DB
        smooth = _nlm(unit, sigma) if name == "nlm" else _bm3d(unit, sigma)
        return 10 ** (((smooth - 1) * RANGE_DB + top) / 20)

    return run


def has(name: str) -> bool:
    """Say whether the package behind ``nlm`` or ``bm3d`` is installed."""
    return importlib.util.find_spec({"nlm": "skimage", "bm3d": "bm3d"}[name]) is not None


def _nlm(image: NDArray, sigma: float) -> NDArray:
    from skimage.restoration import denoise_nl_means  # pyright: ignore[reportMissingImports]

    return denoise_nl_means(image, patch_size=5, patch_distance=9, h=0.8 * sigma, sigma=sigma, fast_mode=True)


def _bm3d(image: NDArray, sigma: float) -> NDArray:
    import bm3d  # pyright: ignore[reportMissingImports]

    return bm3d.bm3d(image, sigma)
