"""Scanner physics of a hospital: from attenuation to the picture on its screens.

The beam is weakened as exp(-attenuation), veiled by scatter, blurred, counted (photon and
electronic noise), and shown as the logarithm of the counts through the hospital's window and gamma.
``apply_scanner`` takes a finished radiograph through the same physics.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

Array = np.ndarray  # float32

REFERENCE_SIZE = 224
"""Side in pixels at which ``Scanner.photons`` counts per pixel."""
_SHOWN_RANGE = 4.0
"""Attenuation between black and white of a finished radiograph, for ``apply_scanner``."""


@dataclass(frozen=True)
class Scanner:
    """One hospital's way of making a film.

    Attributes:
        low: attenuation shown black.
        high: attenuation of a middle-sized trunk shown light grey; the display saturates above it.
        gamma: exponent of the display curve; above 1 darkens the lungs.
        photons: counts per pixel without a patient, at 224 px.
        electronic: standard deviation of the detector's own noise, in counts.
        blur: standard deviation of the detector's blur, in image widths.
        sharpen: strength of the vendor's edge enhancement.
        scatter: scattered radiation over the unattenuated beam.
        border: widest collimation border, in image widths; 0 for none.
        border_shade: grey of what lies outside the collimated field, in [0, 1].
        marker: text of the burnt-in side marker.
        marker_height: in image widths.
        marker_shade: grey of the marker.
        ap_share: probability that a film is AP.
        ap_magnify: width of the heart in AP over PA.
        ap_scapula: how far AP shoulder blades lie over the lungs, in image widths.
    """

    low: float
    high: float
    gamma: float
    photons: float
    electronic: float
    blur: float
    sharpen: float
    scatter: float
    border: float
    border_shade: float
    marker: Literal["L", "R"]
    marker_height: float
    marker_shade: float
    ap_share: float
    ap_magnify: float
    ap_scapula: float


@lru_cache(maxsize=256)
def draw_scanner(seed: int, site: int) -> Scanner:
    """Draw the scanner of a hospital; the same two numbers give the same scanner."""
    rng = np.random.Generator(np.random.PCG64([seed, site, 0x5CA9]))
    low = rng.uniform(0.10, 0.50)
    return Scanner(
        low=low,
        high=low + rng.uniform(2.7, 3.4),
        gamma=float(np.exp(rng.uniform(-0.2, 0.35))),
        photons=float(np.exp(rng.uniform(np.log(8e3), np.log(3e5)))),
        electronic=rng.uniform(1.0, 6.0),
        blur=rng.uniform(0.0008, 0.0040),
        sharpen=max(0.0, rng.uniform(-0.5, 0.9)),
        scatter=float(np.exp(rng.uniform(np.log(0.006), np.log(0.03)))),
        border=max(0.0, rng.uniform(-0.03, 0.045)),
        border_shade=0.0 if rng.random() < 0.75 else rng.uniform(0.85, 1.0),
        marker="L" if rng.random() < 0.6 else "R",
        marker_height=rng.uniform(0.035, 0.065),
        marker_shade=rng.uniform(0.75, 1.0),
        ap_share=float(rng.beta(0.7, 1.3)),
        ap_magnify=rng.uniform(1.08, 1.16),
        ap_scapula=rng.uniform(0.035, 0.075),
    )


def expose(attenuation: Array, scanner: Scanner, rng: np.random.Generator, offset: float = 0.0) -> Array:
    """Take attenuation through detector and display.

    Args:
        attenuation: float32 [H, W], >= 0.
        scanner: whose detector and display.
        rng: draws the noise; the number of draws depends on the shape alone.
        offset: attenuation added to the white end of the window, for bodies thicker than most.

    Returns:
        float32 [H, W] in [0, 1], bone bright.
    """
    longest = max(attenuation.shape)
    beam = smooth(np.exp(-attenuation) + np.float32(scanner.scatter), scanner.blur * longest)
    photons = np.float32(scanner.photons * (REFERENCE_SIZE / longest) ** 2)
    counts = photons * beam
    # One normal draw carries both noises: their variances add. Poisson is taken as normal, which
    # holds as long as some ten photons arrive; scatter alone brings that many.
    counts += np.sqrt(counts + np.float32(scanner.electronic**2)) * rng.standard_normal(
        beam.shape, dtype=np.float32
    )
    shown = np.log(photons) - np.log(np.maximum(counts, np.float32(0.5)))
    if scanner.sharpen > 0:
        shown += np.float32(scanner.sharpen) * (shown - smooth(shown, 0.006 * longest))
    width = scanner.high + offset - scanner.low
    shown = np.clip((shown - np.float32(scanner.low)) * np.float32(1 / width), 0, np.float32(1.4))
    shown -= np.float32(0.204) * shown * shown  # the shoulder of a film: 1.4 comes to white gently
    return np.minimum(shown, 1) ** np.float32(scanner.gamma)


def smooth(image: Array, sigma: float) -> Array:
    """Blur float32 [H, W] with a Gaussian of ``sigma`` pixels; edges are repeated."""
    reach = int(np.ceil(2.5 * sigma))
    if sigma < 0.2:
        return image
    weights = np.exp(-0.5 * (np.arange(reach + 1) / sigma) ** 2)
    weights = (weights / (weights[0] + 2 * weights[1:].sum())).astype(np.float32)
    for axis in (0, 1):
        length = image.shape[axis]
        padding = [(0, 0), (0, 0)]
        padding[axis] = (reach, reach)
        wide = np.pad(image, padding, mode="edge")
        parts = [wide[i : i + length] if axis == 0 else wide[:, i : i + length] for i in range(2 * reach + 1)]
        image = weights[0] * parts[reach]
        for step in range(1, reach + 1):
            image += weights[step] * (parts[reach - step] + parts[reach + step])
    return image


def apply_scanner(image: Array, scanner: int, seed: int) -> Array:
    """Show a finished radiograph as if another hospital's scanner had made it.

    Its greys are read as attenuation on a range of 4 and exposed anew: gain, gamma, blur, scatter and
    noise change; collimation and markers are left as they are on the film.

    Args:
        image: float32 [H, W] in [0, 1], bone bright.
        scanner: number of the hospital, >= 0.
        seed: of this image's noise; another image should bring another.

    Returns:
        float32 [H, W] in [0, 1].
    """
    hospital = draw_scanner(0, scanner)
    rng = np.random.Generator(np.random.PCG64([seed, scanner, 0xE4B0]))
    attenuation = image.astype(np.float32) * np.float32(_SHOWN_RANGE) + np.float32(hospital.low)
    return expose(attenuation, hospital, rng)


_GLYPHS = {
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "R": "11110 10001 10001 11110 10100 10010 10001",
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "P": "11110 10001 10001 11110 10000 10000 10000",
    " ": "00000 00000 00000 00000 00000 00000 00000",
}


def lettering(text: str, height: int) -> Array:
    """Draw text from 5 x 7 glyphs: float32 [height, W] of 0 and 1. Letters: A, L, P, R, space."""
    glyphs = [np.array([list(map(int, row)) for row in _GLYPHS[letter].split()]) for letter in text]
    small = np.concatenate([np.pad(glyph, ((0, 0), (0, 1))) for glyph in glyphs], axis=1)
    rows = np.arange(height) * 7 // height
    columns = np.arange(height * small.shape[1] // 7) * 7 // height
    return small[rows][:, columns].astype(np.float32)


def stamp(image: Array, scanner: Scanner, text: str, where: tuple[float, float]) -> None:
    """Burn the marker into the picture, in place.

    Args:
        image: float32 [S, S].
        scanner: whose marker.
        text: what it says.
        where: distance of its top and of its outer edge from the film's, in image widths. An L stands on the
            right of the picture, an R on the left, as the patient faces the reader.
    """
    size = len(image)
    letters = lettering(text, max(5, round(scanner.marker_height * size)))
    height, width = letters.shape
    top, outer = (round(distance * size) for distance in where)
    left = size - outer - width if scanner.marker == "L" else outer
    patch = image[top : top + height, left : left + width]
    np.maximum(
        patch, letters[: patch.shape[0], : patch.shape[1]] * np.float32(scanner.marker_shade), out=patch
    )


def collimate(image: Array, scanner: Scanner, borders: tuple[float, float, float, float]) -> None:
    """Blank what lies outside the field, in place; borders left, top, right, bottom in image widths."""
    size = len(image)
    left, top, right, bottom = (round(border * size) for border in borders)
    shade = np.float32(scanner.border_shade)
    image[:top], image[size - bottom :] = shade, shade
    image[:, :left], image[:, size - right :] = shade, shade
