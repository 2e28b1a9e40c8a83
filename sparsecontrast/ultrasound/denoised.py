"""What denoising one acquisition gives: images, the noise that was found, and how the training went."""

from dataclasses import dataclass, replace

from sparsecontrast.ultrasound.looks import Complex, Real

IMAGES = ("image", "anatomy", "coherent", "noise", "compound")


@dataclass(frozen=True)
class Denoised:
    """What ``denoise`` gives; amplitudes are in the unit of the compound, all images [H, W].

    Attributes:
        image: amplitude to look at, anatomy^(1 - speckle) |coherent|^speckle.
        anatomy: amplitude without speckle and noise; never below the floor.
        coherent: complex; the compound after a Wiener filter with the anatomy as prior. Keeps speckle.
        noise: what the apertures do not share, as a standard deviation in the compound, local: noise, side
            lobes and decorrelated echoes alike (``noise_map``).
        compound: complex; the mean of the apertures.
        noise_level: the same where the image is quietest (``noise_power``); above the true noise where side
            lobes and decorrelation reach into quiet places too.
        floor: amplitude below which nothing is shown.
        steps: trained; fewer than asked for where the held-out aperture said so.
        history: (step, loss, likelihood of the held-out aperture or nan), one a check.
        kept_step: the step whose weights made the images; ``steps`` where no aperture was held out.
    """

    image: Real
    anatomy: Real
    coherent: Complex
    noise: Real
    compound: Complex
    noise_level: float
    floor: float
    steps: int
    history: tuple[tuple[int, float, float], ...]
    kept_step: int


def in_unit(found: Denoised, unit: float) -> Denoised:
    """Give what was found of images that were divided by ``unit``, in their own unit."""
    if unit == 1:
        return found
    names = (*IMAGES, "noise_level", "floor")
    return replace(found, **{name: getattr(found, name) * unit for name in names})
