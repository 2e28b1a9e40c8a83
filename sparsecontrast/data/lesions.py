"""Lesions of procedural chests: six kinds, where they may lie, and what they add to the beam.

A lesion is a few numbers. ``added`` turns it into attenuation at any points of the body frame, so
the same function draws it on the pixel grid and, on a coarse grid, tells where it can be seen:
boxes need no image.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sparsecontrast.data.anatomy import (
    APEX_AXIS,
    Anatomy,
    Array,
    Box,
    Chest,
    Points,
    body,
    chest,
    heart,
    lung_edges,
    mediastinum,
    points,
    ramp,
)

KINDS = ("nodule", "mass", "consolidation", "effusion", "pneumothorax", "cardiomegaly")
VISIBLE = 0.12
"""A point belongs to a lesion's box where it adds more than this share of its strongest point."""
_PROBES = 64
_TRIES = 64


@dataclass(frozen=True)
class Lesion:
    """One lesion in the body frame.

    Attributes:
        kind: one of ``KINDS``.
        side: -1 for u < 0 (the patient's right), +1 for u > 0.
        u: centre of focal lesions; unused otherwise.
        v: centre of focal lesions; the fluid level of an effusion.
        extent: radius of focal lesions, retraction of the lung in a pneumothorax, heart width over
            chest width in cardiomegaly, height of an effusion's meniscus.
        contrast: attenuation added at the centre of nodules and masses; the share of air that is
            replaced in consolidations and effusions; darkening of a pneumothorax.
        shape: seed of lobulation and texture.
    """

    kind: str
    side: float
    u: float
    v: float
    extent: float
    contrast: float
    shape: int


def draw_lesions(
    rng: np.random.Generator, anatomy: Anatomy, prevalence: Mapping[str, float]
) -> tuple[Lesion, ...]:
    """Draw what a patient has; each kind is present with its own probability.

    Args:
        rng: the patient's generator.
        anatomy: the patient.
        prevalence: probability of every kind of ``KINDS``, in [0, 1].
    """
    present = {kind: rng.random() < prevalence[kind] for kind in KINDS}
    pleura = float(rng.choice([-1.0, 1.0]))
    lesions: list[Lesion] = []
    if present["effusion"]:
        lesions.append(_effusion(rng, anatomy, -pleura))
    if present["pneumothorax"]:
        shape = int(rng.integers(2**31))
        retraction, contrast = rng.uniform(0.03, 0.11), rng.uniform(0.5, 1.2)
        lesions.append(Lesion("pneumothorax", pleura, 0, 0, retraction, contrast, shape))
    if present["cardiomegaly"]:
        lesions.append(Lesion("cardiomegaly", 1.0, 0, 0, rng.uniform(0.55, 0.65), 1.0, 0))
    counts = {"nodule": int(rng.choice([1, 1, 1, 2, 3])), "mass": 1, "consolidation": 1}
    kinds = [kind for kind, count in counts.items() if present[kind] for _ in range(count)]
    return tuple([*(_focal(rng, anatomy, kind, lesions) for kind in kinds), *lesions])


# radius in image widths, contrast: both drawn log-uniformly, from subtle to obvious.
_FOCAL = {
    "nodule": ((0.015, 0.034), (0.22, 0.95)),
    "mass": ((0.045, 0.095), (0.45, 1.40)),
    "consolidation": ((0.055, 0.120), (0.25, 0.90)),
}


def _focal(rng: np.random.Generator, anatomy: Anatomy, kind: str, others: list[Lesion]) -> Lesion:
    """Place a lesion in aerated lung: where no heart, wall, fluid or collapse hides it, if it can be."""
    radii, contrasts = _FOCAL[kind]
    radius, contrast = (float(np.exp(rng.uniform(*np.log(span)))) for span in (radii, contrasts))
    side = rng.choice([-1.0, 1.0], _TRIES)
    v = rng.uniform(anatomy.apex + 0.4 * radius + 0.03, anatomy.dome_right - 0.3 * radius - 0.01, _TRIES)
    wall, inner = lung_edges(anatomy, v)
    across = inner + rng.uniform(0.15, 0.95, _TRIES) * (wall - inner)
    ctr = max([anatomy.ctr, *(1.1 * lesion.extent for lesion in others if lesion.kind == "cardiomegaly")])
    near = np.maximum(across - 0.5 * radius, 0)
    open_lung = mediastinum(anatomy, Points(side * near, v, near), ctr) < 0.05
    for lesion in others:
        if lesion.kind == "pneumothorax":
            open_lung &= side != lesion.side
        if lesion.kind == "effusion":
            open_lung &= (side != lesion.side) | (v + radius < lesion.v - lesion.extent)
    best = int(np.argmax(open_lung & (wall - across > 0.8 * radius)))
    shape = int(rng.integers(2**31))
    return Lesion(
        kind, float(side[best]), float((side * across)[best]), float(v[best]), radius, contrast, shape
    )


def _effusion(rng: np.random.Generator, anatomy: Anatomy, side: float) -> Lesion:
    """From a blunted costophrenic angle to fluid that covers half of a lung."""
    dome = anatomy.dome_left if side > 0 else anatomy.dome_right
    level = dome + 0.01 - rng.beta(1.0, 1.6) * 0.26
    return Lesion("effusion", side, 0, level, rng.uniform(0.05, 0.09), rng.uniform(0.65, 1.0), 0)


def lesion_box(lesion: Lesion, anatomy: Anatomy) -> Box:
    """Return a box in the body frame outside of which the lesion adds nothing."""
    far = anatomy.lung_half + 0.03
    if lesion.kind in ("nodule", "mass", "consolidation"):
        reach = lesion.extent * (1.75 if lesion.kind == "consolidation" else 1.5) + 0.01
        return lesion.u - reach, lesion.v - reach, lesion.u + reach, lesion.v + reach
    bottom = max(anatomy.dome_left, anatomy.dome_right) + anatomy.sulcus + 0.02
    if lesion.kind == "cardiomegaly":
        width = 2 * anatomy.lung_half * lesion.extent * 1.25
        return -0.6 * width, bottom - 1.25 * width - anatomy.sulcus, 0.85 * width, bottom
    top = anatomy.apex - 0.02 if lesion.kind == "pneumothorax" else lesion.v - lesion.extent - 0.05
    return (0.0, top, far, bottom) if lesion.side > 0 else (-far, top, 0.0, bottom)


def added(lesion: Lesion, anatomy: Anatomy, here: Chest) -> Array:
    """Return the attenuation that a lesion adds (negative where it is air), at given points.

    An enlarged heart adds nothing here: it is part of ``chest(..., ctr=lesion.extent)``.
    """
    if lesion.kind in ("nodule", "mass"):
        return np.float32(lesion.contrast) * _ball(lesion, here)
    if lesion.kind == "consolidation":
        return np.float32(lesion.contrast) * _patches(lesion, here) * here.air
    if lesion.kind == "effusion":
        return np.float32(lesion.contrast) * _fluid(lesion, here) * here.air
    if lesion.kind == "pneumothorax":
        gap, line = collapse(lesion, anatomy, here)
        return np.float32(0.22) * line * (here.lung > 0) - np.float32(0.16 * lesion.contrast) * gap * here.air
    return np.zeros_like(here.u)


def _ball(lesion: Lesion, here: Points) -> Array:
    """Return the chord of a lobulated ball, softened at the rim; 1 at the centre."""
    rng = np.random.Generator(np.random.PCG64(lesion.shape))
    du, dv = here.u - np.float32(lesion.u), here.v - np.float32(lesion.v)
    angle = np.arctan2(dv, du)
    rough = 0.05 if lesion.kind == "nodule" else 0.10
    radius = np.float32(1)
    for lobes in (2, 3, 5):
        radius = radius + np.float32(rough * rng.uniform(0.3, 1)) * np.cos(
            lobes * angle + np.float32(rng.uniform(0, 6.3))
        )
    square = (du * du + dv * dv) * np.float32(1 / lesion.extent**2) / (radius * radius)
    return np.clip(1 - square, 0, 1) ** np.float32(0.65)


def _patches(lesion: Lesion, here: Chest) -> Array:
    """Return a fluffy, mottled cloud in [0, 1] of overlapping patches around the centre."""
    rng = np.random.Generator(np.random.PCG64(lesion.shape))
    cloud, mottle = np.zeros_like(here.u), np.full_like(here.u, 0.9)
    for _ in range(6):
        angle, far = rng.uniform(0, 6.3), lesion.extent * np.sqrt(rng.uniform(0, 0.7))
        u, v = lesion.u + far * np.cos(angle), lesion.v + far * np.sin(angle)
        radius = lesion.extent * rng.uniform(0.45, 0.8)
        square = ((here.u - np.float32(u)) ** 2 + (here.v - np.float32(v)) ** 2) * np.float32(1 / radius**2)
        cloud += np.float32(rng.uniform(0.35, 0.8)) * np.clip(1 - square, 0, 1) ** 2
        turn, wave = rng.uniform(0, 6.3), np.float32(rng.uniform(12, 30) / lesion.extent)
        along = here.u * np.float32(np.cos(turn)) + here.v * np.float32(np.sin(turn))
        mottle += np.float32(0.05) * np.sin(wave * along)
    return np.minimum(cloud, 1) * mottle


def _fluid(lesion: Lesion, here: Chest) -> Array:
    """Return fluid that climbs the wall: a meniscus, opaque below and lateral of its line."""
    lateral = np.clip((here.across - 0.08) / np.maximum(here.wall - np.float32(0.08), 0.02), 0, 1)
    level = np.float32(lesion.v) - np.float32(lesion.extent) * lateral * lateral * lateral
    return ramp(here.v - level, 0.035) * (here.u * lesion.side > 0)


def collapse(lesion: Lesion, anatomy: Anatomy, here: Chest) -> tuple[Array, Array]:
    """Return where a pneumothorax has only air (0 to 1), and the thin line of the visceral pleura."""
    fall = np.clip((here.v - np.float32(anatomy.apex)) * np.float32(1 / 0.60), 0, 1)
    # A small one stays near the apex; a large one reaches the diaphragm.
    retraction = np.float32(lesion.extent) * np.maximum(1 - np.float32(1.3 - 6 * lesion.extent) * fall, 0)
    sunk, _ = lung_edges(anatomy, here.v - np.float32(0.9 * lesion.extent))
    edge = np.where(sunk < APEX_AXIS, 0, sunk - retraction)
    outside = here.across - edge
    own = (here.u * lesion.side > 0) * np.clip(retraction * 100, 0, 1)
    line = np.clip(1 - np.abs(outside) * np.float32(1 / 0.006), 0, 1)
    return ramp(outside, 0.006) * own, line * own


def clear(lesion: Lesion, anatomy: Anatomy, here: Chest) -> Array | None:
    """Return what share of the lung's vessels a lesion leaves visible; None where it leaves all."""
    if lesion.kind == "pneumothorax":
        return 1 - collapse(lesion, anatomy, here)[0]
    if lesion.kind == "effusion":
        return 1 - np.float32(lesion.contrast) * _fluid(lesion, here)
    return None


def visible_points(lesion: Lesion, anatomy: Anatomy, magnify: float, ctr: float | None) -> Array:
    """Return the points [n, 2] (u, v) of a coarse grid where a lesion can be seen; never empty."""
    left, top, right, bottom = lesion_box(lesion, anatomy)
    half = 0.5 / _PROBES
    steps = np.linspace(half, 1 - half, _PROBES, dtype=np.float32)
    u, v = np.meshgrid(left + (right - left) * steps, top + (bottom - top) * steps)
    at = points(anatomy, u, v)
    if lesion.kind in ("nodule", "mass"):
        strength = _ball(lesion, at)
    elif lesion.kind == "cardiomegaly":
        here = chest(anatomy, at, body(anatomy, at), magnify, ctr)
        strength = heart(anatomy, at, lesion.extent * magnify) * (here.lung > 0)
    else:
        strength = np.abs(added(lesion, anatomy, chest(anatomy, at, body(anatomy, at), magnify, ctr)))
    seen = strength > VISIBLE * strength.max()
    cell = np.array([right - left, bottom - top], np.float32) * half
    found = (
        np.stack([u[seen], v[seen]], axis=1) if seen.any() else np.array([[lesion.u, lesion.v]], np.float32)
    )
    return np.concatenate([found - cell, found + cell])
