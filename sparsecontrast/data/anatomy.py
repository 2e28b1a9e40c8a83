"""A procedural chest as a sum of attenuations: what the beam meets on its way to the detector.

Every organ is a soft shape whose line integral along the beam has a closed form (chords of ellipses,
shells, tubes), so an image is a sum of terms and bone is bright for the reason it is bright on film.

Body frame: ``u`` to the right of the image from the midline (the patient's left is u > 0), ``v``
downwards, both in image widths; a patient at rest fills u in [-0.5, 0.5], v in [0, 1].
Attenuation is mu times centimetres, without unit; a trunk is about 3.4 at its middle.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np

Array = np.ndarray
"""float32 throughout; the stubs of NumPy do not follow a float32 past a Python float."""
Box = tuple[float, float, float, float]
"""Left, top, right, bottom in the body frame."""
Window = tuple[slice, slice]
"""Rows and columns of a pixel grid."""

SPINE_HALF = 0.036
APEX_AXIS = 0.125
"""Distance of a lung's apex from the midline."""
LUNG_AIR = 0.76
"""Share of the tissue along the beam that a lung replaces by air where the chest is deepest."""
_ROWS = 1024
"""Resolution of the outline tables over v in [-0.25, 1.25]."""


@dataclass(frozen=True)
class Anatomy:
    """One patient. Lengths in image widths; ``*_right`` is the patient's right, u < 0."""

    lung_half: float
    apex: float
    dome_right: float
    dome_left: float
    sulcus: float
    trunk_half: float
    shoulder: float
    depth: float
    ctr: float
    heart_tilt: float
    knob: float
    rib_first: float
    rib_pitch: float
    rib_drop: float
    rib_half: float
    bone: float
    hilum: float
    breast: float
    gastric: float
    unrest: int
    """Seed of everything irregular: vessels, texture, the bends of the frame."""


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """Draw a patient; ranges are those of upright adults on a film of 35 to 43 cm."""
    lung_half = rng.uniform(0.325, 0.375)
    apex = rng.uniform(0.095, 0.145)
    dome = rng.uniform(0.69, 0.77)
    habitus = rng.beta(2.0, 3.0)
    return Anatomy(
        lung_half=lung_half,
        apex=apex,
        dome_right=dome,
        dome_left=dome + rng.uniform(0.0, 0.035),
        sulcus=rng.uniform(0.06, 0.11),
        trunk_half=lung_half + 0.055 + 0.11 * habitus,
        shoulder=apex - rng.uniform(0.080, 0.115),
        depth=3.0 + 0.9 * habitus,
        ctr=rng.uniform(0.40, 0.49),
        heart_tilt=rng.uniform(0.55, 0.85),
        knob=rng.uniform(0.055, 0.078),
        rib_first=rng.uniform(0.10, 0.125),
        rib_pitch=rng.uniform(0.066, 0.074),
        rib_drop=rng.uniform(0.15, 0.20),
        rib_half=rng.uniform(0.0105, 0.0135),
        bone=rng.uniform(0.75, 1.15),
        hilum=rng.uniform(0.40, 0.45),
        breast=max(0.0, rng.uniform(-0.5, 0.7)),
        gastric=max(0.0, rng.uniform(-0.3, 0.7)),
        unrest=int(rng.integers(2**31)),
    )


def ramp(x: Array, width: float) -> Array:
    """Rise from 0 to 1 linearly while x goes from -width/2 to width/2."""
    rising = x * np.float32(1 / width)
    rising += np.float32(0.5)
    return np.clip(rising, 0, 1, out=rising)


@dataclass(frozen=True)
class Points:
    """Points of the body frame after the patient's irregularity, of any shape; ``across`` = abs(u)."""

    u: Array
    v: Array
    across: Array

    def part(self, window: Window) -> Self:
        """Return a window of two-dimensional points, without copying."""
        return type(self)(**{name: array[window] for name, array in vars(self).items()})


@dataclass(frozen=True)
class Chest(Points):
    """Points with what the organs of the chest lean on; all arrays have one shape.

    ``wall`` is the distance of the rib cage from the midline at v, ``lung`` in [0, 1] the depth of a
    lung along the beam, ``air`` >= 0 the attenuation that air takes away from the body's tissue.
    """

    wall: Array
    lung: Array
    air: Array


def points(anatomy: Anatomy, u: Array, v: Array) -> Points:
    """Bend the frame by under one percent of the width: nobody is symmetric."""
    phase = np.random.Generator(np.random.PCG64(anatomy.unrest)).uniform(0, 6.3, 4).astype(np.float32)
    du = np.sin(v * np.float32(7.0) + u * 5 + phase[0]) + np.sin(v * np.float32(17.0) - u * 9 + phase[1])
    dv = np.sin(u * np.float32(8.0) + v * 4 + phase[2]) + np.sin(u * np.float32(19.0) - v * 7 + phase[3])
    u, v = u + np.float32(0.0022) * du, v + np.float32(0.0040) * dv
    return Points(u, v, np.abs(u))


def chest(
    anatomy: Anatomy, at: Points, tissue: Array, magnify: float = 1.0, ctr: float | None = None
) -> Chest:
    """Evaluate lungs and mediastinum.

    Args:
        anatomy: the patient.
        at: where.
        tissue: ``body`` at the same points.
        magnify: 1 for PA; above 1 for AP, where the heart lies far from the detector.
        ctr: heart width over chest width instead of the patient's own (0.40-0.49 healthy).
    """
    wall, medial = lung_edges(anatomy, at.v)
    chord = np.sqrt(np.maximum(1 - (at.across / wall) ** 2, 0))
    lung = chord * ramp(at.across - medial, 0.02) * ramp(diaphragm(anatomy, at) - at.v, 0.008)
    room = 1 - mediastinum(anatomy, at, (ctr or anatomy.ctr) * magnify)
    return Chest(at.u, at.v, at.across, wall, lung, np.float32(LUNG_AIR) * tissue * lung * room)


def thorax_box(anatomy: Anatomy) -> Box:
    """Return a box around lungs and ribs in the body frame."""
    wide = anatomy.lung_half + 0.03
    return -wide, anatomy.apex - 0.06, wide, anatomy.dome_left + 0.20


def lung_edges(anatomy: Anatomy, v: Array) -> tuple[Array, Array]:
    """Return the distances of a lung's outer and inner edge from the midline at heights v."""
    rows = np.clip((v + np.float32(0.25)) * np.float32(_ROWS / 1.5), 0, _ROWS - 1).astype(np.int32)
    outer, inner = _outlines(anatomy)
    return outer[rows], inner[rows]


@lru_cache(maxsize=8)
def _outlines(anatomy: Anatomy) -> tuple[Array, Array]:
    v = np.linspace(-0.25, 1.25, _ROWS)
    fall = np.clip((v - anatomy.apex) / 0.62, 0, 1)
    rise = 1 - (1 - fall) ** 2.6
    outer = APEX_AXIS + (anatomy.lung_half - APEX_AXIS) * rise**0.52
    near = np.clip((v - anatomy.apex) / 0.09, 0, 1)
    inner = APEX_AXIS - (APEX_AXIS - 0.042) * np.sqrt(1 - (1 - near) ** 2)
    outer = np.where(v < anatomy.apex, 1e-3, outer)
    return outer.astype(np.float32), inner.astype(np.float32)


def diaphragm(anatomy: Anatomy, at: Points) -> Array:
    """Return v of the diaphragm: a dome that falls to the costophrenic angle at the wall."""
    top = np.float32(anatomy.dome_right) + np.float32(anatomy.dome_left - anatomy.dome_right) * (at.u > 0)
    far = at.across - np.float32(0.15)
    lateral = np.maximum(far, 0) * np.float32(1 / (anatomy.lung_half - 0.15))
    medial = np.minimum(far, 0) * np.float32(1 / 0.15)
    return top + np.float32(anatomy.sulcus) * lateral * lateral * lateral + np.float32(0.03) * medial * medial


def body(anatomy: Anatomy, at: Points) -> Array:
    """Return trunk, neck, shoulders and belly as if solid."""
    across, v = at.across, at.v
    beyond = across - np.float32(0.105)
    skin = (
        np.float32(anatomy.shoulder)
        + np.float32(0.20) * np.maximum(beyond, 0)
        + np.float32(1.3) * np.minimum(beyond, 0)
    )
    depth = v - skin
    trunk = np.maximum(1 - (across * np.float32(1 / anatomy.trunk_half)) ** 2, 0)
    belly = np.float32(0.12) * ramp(v - np.float32(anatomy.dome_right + 0.02), 0.3) * (trunk > 0)
    trunk *= np.clip(depth * np.float32(1 / 0.20), 0, 1)
    arm = np.maximum(1 - (depth * np.float32(1 / 0.165) - 1) ** 2, 0) * ramp(across - np.float32(0.30), 0.35)
    neck = np.maximum(1 - (across * np.float32(1 / 0.13)) ** 2, 0) * ramp(np.float32(0.20) - v, 0.3)
    trunk += np.float32(0.55) * arm
    trunk += np.float32(0.30) * neck
    return np.float32(anatomy.depth) * (np.sqrt(trunk) + belly)


def airway(anatomy: Anatomy, at: Points) -> Array:
    """Return the trachea: air, so negative; it bends a little to the patient's right."""
    bend = at.u + np.float32(0.012) * ramp(at.v - np.float32(0.22), 0.2)
    tube = np.sqrt(np.maximum(1 - (bend * np.float32(1 / 0.0165)) ** 2, 0))
    return np.float32(-0.75) * tube * ramp(np.float32(anatomy.hilum - 0.08) - at.v, 0.05)


def airway_box(anatomy: Anatomy) -> Box:
    """Return a box around the trachea in the body frame."""
    return -0.04, -0.2, 0.04, anatomy.hilum - 0.04


def breasts(anatomy: Anatomy, at: Points) -> Array:
    """Return two soft discs with a sharper lower fold."""
    ring = ((at.across - np.float32(0.20)) * np.float32(1 / 0.15)) ** 2
    ring += ((at.v - np.float32(0.66)) * np.float32(1 / 0.17)) ** 2
    return np.float32(0.8 * anatomy.breast) * np.sqrt(np.maximum(1 - ring, 0))


def breasts_box(anatomy: Anatomy) -> Box:
    """Return a box around both breasts in the body frame; empty where they leave no shadow."""
    return (-0.36, 0.48, 0.36, 0.84) if anatomy.breast > 0 else (0.0, 0.0, 0.0, 0.0)


def gastric_bubble(anatomy: Anatomy, at: Points) -> Array:
    """Return the air of the stomach below the left dome."""
    ring = ((at.u - np.float32(0.15)) * np.float32(1 / 0.07)) ** 2
    ring += ((at.v - np.float32(anatomy.dome_left + 0.055)) * np.float32(1 / 0.033)) ** 2
    return np.float32(-1.1 * anatomy.gastric) * np.sqrt(np.maximum(1 - ring, 0))


def gastric_box(anatomy: Anatomy) -> Box:
    """Return a box around the bubble in the body frame; empty where there is none."""
    v = anatomy.dome_left + 0.055
    return (0.07, v - 0.045, 0.23, v + 0.045) if anatomy.gastric > 0 else (0.0, 0.0, 0.0, 0.0)


def mediastinum(anatomy: Anatomy, at: Points, ctr: float) -> Array:
    """Return the share of the lung's depth that heart and great vessels fill, in [0, 1]."""
    u, v = at.u, at.v
    taper = np.float32(0.050) + np.float32(0.022) * ramp(v - np.float32(anatomy.hilum - 0.02), 0.30)
    filled = (at.across / taper) ** 2
    ellipses = (  # centre u, v and half-axes: aortic arch, pulmonary trunk, superior vena cava
        (0.028, anatomy.hilum - 0.105, anatomy.knob - 0.018, (anatomy.knob - 0.018) / 0.85),
        (0.034, anatomy.hilum + 0.020, 0.050, 0.110),
        (-0.028, anatomy.hilum - 0.030, 0.038, 0.200),
    )
    for u0, v0, wide, tall in ellipses:
        ring = ((u - np.float32(u0)) * np.float32(1 / wide)) ** 2
        ring += ((v - np.float32(v0)) * np.float32(1 / tall)) ** 2
        np.minimum(filled, ring, out=filled)
    vessels = np.float32(0.92) * np.sqrt(np.maximum(1 - filled, 0))
    return np.minimum(np.maximum(vessels, np.float32(1.15) * heart(anatomy, at, ctr)), np.float32(0.97))


def heart(anatomy: Anatomy, at: Points, ctr: float) -> Array:
    """Return the depth of the heart along the beam, in [0, 1]: left ventricle and right atrium."""
    width = ctr * anatomy.lung_half * 2
    base = anatomy.dome_left + 0.05
    cos, sin = np.cos(anatomy.heart_tilt), np.sin(anatomy.heart_tilt)
    du, dv = at.u - np.float32(0.145 * width), at.v - np.float32(base - 0.50 * width)
    ring = (du * np.float32(cos / (0.60 * width)) + dv * np.float32(sin / (0.60 * width))) ** 2
    ring += (dv * np.float32(cos / (0.41 * width)) - du * np.float32(sin / (0.41 * width))) ** 2
    atrium = ((at.u + np.float32(0.12 * width)) * np.float32(1 / (0.25 * width))) ** 2
    atrium += ((at.v - np.float32(base - 0.42 * width)) * np.float32(1 / (0.42 * width))) ** 2
    return np.sqrt(np.maximum(1 - np.minimum(ring, atrium), 0))
