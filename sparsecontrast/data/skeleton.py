"""The bones of a procedural chest: ribs, clavicles, scapulae, humeri and spine.

Ribs are not strokes but level sets. A rib is a ring around the chest that falls from back to front;
seen from behind, a point at depth ``chord`` belongs to the ring whose height there is v, so one
formula over all pixels draws all posterior arcs, and the same with the sign turned all anterior ones.
"""

import numpy as np

from sparsecontrast.data.anatomy import SPINE_HALF, Anatomy, Array, Box, Chest, Points, ramp

RIBS = 11


def ribs(anatomy: Anatomy, here: Chest) -> Array:
    """Return posterior and anterior arcs; the cortex makes their borders brighter."""
    radius = here.wall + np.float32(0.014)
    depth = np.sqrt(np.maximum(1 - (here.across / radius) ** 2, 0))
    half_drop = np.float32(0.5 * anatomy.rib_drop)
    steep = half_drop * here.across / (here.wall * here.wall * np.maximum(depth, np.float32(0.12)))
    middle = here.v - half_drop
    back = middle + half_drop * depth - np.float32(0.05) * here.across
    front = middle - half_drop * depth - np.float32(0.20) * (here.wall - here.across)
    posterior = _arcs(anatomy, back, steep, 1.0) * ramp(here.across - np.float32(SPINE_HALF), 0.02)
    # Below the dome the belly hides what scatter leaves of a rib.
    posterior *= 1 - np.float32(0.7) * ramp(here.v - np.float32(anatomy.dome_right + 0.02), 0.12)
    posterior *= ramp(np.float32(anatomy.dome_left + 0.15) - here.v, 0.10)
    anterior = _arcs(anatomy, front, steep + np.float32(0.2), 1.15) * ramp(
        here.across - np.float32(0.13), 0.10
    )
    anterior *= ramp(np.float32(0.74) - here.v, 0.12)
    posterior += np.float32(0.5) * anterior
    tangent = np.float32(0.31 * anatomy.bone) * (np.float32(1.5) - np.float32(0.5) * depth)
    return posterior * tangent * ramp(radius - here.across, 0.006)


def _arcs(anatomy: Anatomy, height: Array, slope: Array, thick: float) -> Array:
    """Return the profile of the rings at ``height``, the v where each leaves the spine."""
    order = (height - np.float32(anatomy.rib_first)) * np.float32(1 / anatomy.rib_pitch)
    nearest = np.rint(order)
    np.clip(nearest, 0, RIBS - 1, out=nearest)
    distance = np.abs(order - nearest) * np.float32(anatomy.rib_pitch) / np.sqrt(1 + slope * slope)
    density = np.float32(0.85) + np.float32(0.2) * np.sin(
        nearest * np.float32(2.4) + np.float32(anatomy.unrest % 7)
    )
    return density * _tube(distance, anatomy.rib_half * thick, 0.5)


def _tube(distance: Array, half: float, cortex: float) -> Array:
    """Return the profile of a hollow bone of half-width ``half`` at a distance from its axis."""
    rim = np.maximum(1 - np.abs(distance - np.float32(0.8 * half)) * np.float32(1 / 0.005), 0)
    rim *= np.float32(cortex)
    rim += np.float32(0.62) * ramp(np.float32(half) - distance, 0.006)
    return rim


def clavicles(anatomy: Anatomy, at: Points, lift: float) -> Array:
    """Return both clavicles, S-shaped; ``lift`` raises them, as in AP films."""
    x = at.across
    line = np.float32(anatomy.apex + 0.062 - lift) - np.float32(0.14) * x + np.float32(0.018) * np.sin(x * 15)
    head = np.float32(0.006) * ramp(np.float32(0.07) - x, 0.06)  # the sternal end is thicker
    reach = ramp(x - np.float32(0.035), 0.012) * ramp(np.float32(0.37) - x, 0.03)
    return np.float32(0.6 * anatomy.bone) * _tube(np.abs(at.v - line) - head, 0.0125, 0.35) * reach


def clavicles_box(anatomy: Anatomy) -> Box:
    """Return a box around both clavicles in the body frame."""
    return -0.40, anatomy.apex - 0.06, 0.40, anatomy.apex + 0.11


def scapulae(anatomy: Anatomy, at: Points, medial: float) -> Array:
    """Return both shoulder blades; ``medial`` is how far they lie over the lungs (AP)."""
    x, v = at.across, at.v - np.float32(anatomy.shoulder)
    inner = x - np.float32(anatomy.lung_half - 0.015 - medial + 0.16 * 0.36) + np.float32(0.16) * v
    outer = np.float32(0.5252) - x - np.float32(0.42) * v
    edge = np.minimum(np.minimum(inner, outer), np.minimum(v - np.float32(0.11), np.float32(0.40) - v))
    blade = ramp(edge, 0.008)
    border = np.maximum(1 - np.abs(edge - np.float32(0.006)) * np.float32(1 / 0.008), 0)
    ridge = np.abs(v - np.float32(0.245) + np.float32(0.25) * x)
    ridge = np.maximum(1 - ridge * np.float32(1 / 0.010), 0) * blade
    return np.float32(0.13 * anatomy.bone) * (blade + border + np.float32(1.2) * ridge)


def scapulae_box(anatomy: Anatomy) -> Box:
    """Return a box around both shoulder blades in the body frame."""
    return -0.56, anatomy.shoulder + 0.09, 0.56, anatomy.shoulder + 0.42


def humeri(anatomy: Anatomy, at: Points) -> Array:
    """Return the heads of both humeri and the start of their shafts."""
    x, v = at.across, at.v - np.float32(anatomy.shoulder)
    head = 1 - ((x - np.float32(0.455)) ** 2 + (v - np.float32(0.155)) ** 2) * np.float32(1 / 0.042**2)
    shaft = (x - np.float32(0.4302) - np.float32(0.28) * v) * np.float32(1 / 0.026)
    shaft = np.sqrt(np.maximum(1 - shaft * shaft, 0)) * ramp(v - np.float32(0.17), 0.02)
    return np.float32(0.9 * anatomy.bone) * np.maximum(np.sqrt(np.maximum(head, 0)), np.float32(0.8) * shaft)


def humeri_boxes(anatomy: Anatomy) -> tuple[Box, Box]:
    """Return a box around each humerus in the body frame."""
    top, bottom = anatomy.shoulder + 0.10, anatomy.shoulder + 0.50
    return (-0.62, top, -0.40, bottom), (0.40, top, 0.62, bottom)


def spine(anatomy: Anatomy, at: Points) -> Array:
    """Return vertebral bodies, discs and pedicles, seen faintly through the mediastinum."""
    x = at.across
    inside = ramp(np.float32(SPINE_HALF) - x, 0.022)
    beat = np.cos((at.v - np.float32(anatomy.rib_first)) * np.float32(2 * np.pi / (0.86 * anatomy.rib_pitch)))
    edge = np.maximum(1 - np.abs(x - np.float32(0.031)) * np.float32(1 / 0.006), 0)
    pedicle = np.maximum(1 - np.abs(x - np.float32(0.022)) * np.float32(1 / 0.007), 0)
    process = np.maximum(1 - x * np.float32(1 / 0.006), 0)
    profile = np.float32(0.12) + np.float32(0.08) * np.clip(beat * np.float32(2.5) + np.float32(1.2), -1, 1)
    profile += np.float32(0.10) * edge
    profile += np.maximum(beat, 0) * (np.float32(0.22) * pedicle + np.float32(0.18) * process)
    return np.float32(anatomy.bone) * inside * profile


def spine_box(anatomy: Anatomy) -> Box:
    """Return a box around the spine in the body frame, from edge to edge of the film."""
    return -0.05, -0.2, 0.05, 1.2
