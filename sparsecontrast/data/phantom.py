"""Procedural chest radiographs with known lesions: the embedded data, and the truth of many tests.

A patient is a number; so is the site where a film is taken. Anatomy and lesions depend on the
patient (whose home hospital, ``patient // PATIENTS_PER_HOSPITAL``, has its own mix of diseases), the
scanner and the habits of positioning on the site. So the same patient can be filmed elsewhere:
the lesions stay, the look changes. Every image depends on (seed, site, patient, image) alone.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from sparsecontrast.data.anatomy import (
    Anatomy,
    Array,
    Chest,
    Window,
    airway,
    airway_box,
    body,
    breasts,
    breasts_box,
    chest,
    draw_anatomy,
    gastric_box,
    gastric_bubble,
    points,
    thorax_box,
)
from sparsecontrast.data.lesions import (
    KINDS,
    Lesion,
    added,
    clear,
    draw_lesions,
    lesion_box,
    visible_points,
)
from sparsecontrast.data.pose import Pose, draw_pose, pixel_window
from sparsecontrast.data.scanner import collimate, draw_scanner, expose, stamp
from sparsecontrast.data.skeleton import (
    clavicles,
    clavicles_box,
    humeri,
    humeri_boxes,
    ribs,
    scapulae,
    scapulae_box,
    spine,
    spine_box,
)
from sparsecontrast.data.vessels import vessels
from sparsecontrast.errors import ConfigError, DataError
from sparsecontrast.settings import PhantomConfig

if TYPE_CHECKING:
    import pandas as pd

NOMINAL_SIZE = 512
"""Pixels of a side that the boxes of an index refer to."""
PATIENTS_PER_HOSPITAL = 100_000
_PATH = re.compile(r"phantom:(\d+):(\d+):(\d+):(\d+)")


@dataclass(frozen=True)
class Findings:
    """What is known of an image without its pixels.

    Attributes:
        boxes: ``{"label", "x", "y", "w", "h"}`` in pixels; x, y is the upper left corner.
        labels: 1 or 0 for every kind of lesion.
        view: of the X-ray beam.
    """

    boxes: list[dict]
    labels: dict[str, int]
    view: Literal["PA", "AP"]


@dataclass(frozen=True)
class Phantom(Findings):
    """One radiograph, float32 [S, S] in [0, 1], bone bright, and its findings."""

    image: Array


def render(seed: int, site: int, patient: int, image: int, size: int, without: Sequence[str] = ()) -> Phantom:
    """Make one radiograph; bit for bit the same for the same arguments.

    Args:
        seed: of the whole collection.
        site: the hospital that takes the film: its scanner, its share of AP films.
        patient: anatomy and lesions.
        image: number of the film; another positioning, another noise.
        size: pixels of a side.
        without: kinds of lesions to leave out of pixels, boxes and labels; all else stays.
    """
    anatomy, lesions = _patient(seed, patient)
    lesions = tuple(lesion for lesion in lesions if lesion.kind not in without)
    scanner = draw_scanner(seed, site)
    pose = draw_pose(seed, site, patient, image)
    rng = np.random.Generator(np.random.PCG64([seed, site, patient, image, 2]))
    attenuation = _attenuation(anatomy, lesions, pose, rng, size)
    shown = expose(attenuation, scanner, rng, offset=0.8 * (anatomy.depth - 3.4) + pose.exposure)
    stamp(shown, scanner, scanner.marker + (" AP" if pose.view == "AP" else ""), pose.marker)
    collimate(shown, scanner, pose.borders)
    findings = _findings(anatomy, lesions, pose, size)
    return Phantom(findings.boxes, findings.labels, findings.view, shown)


def describe(seed: int, site: int, patient: int, image: int, size: int = NOMINAL_SIZE) -> Findings:
    """Return boxes (in pixels of ``size``), labels and view of ``render``, without rendering."""
    anatomy, lesions = _patient(seed, patient)
    return _findings(anatomy, lesions, draw_pose(seed, site, patient, image), size)


def phantom_path(seed: int, site: int, patient: int, image: int) -> str:
    """Name an image as an index does; ``parse_path`` reads it back."""
    return f"phantom:{seed}:{site}:{patient}:{image}"


def parse_path(path: str) -> dict[str, int]:
    """Read ``phantom:<seed>:<site>:<patient>:<image>`` into the arguments of ``render``.

    Raises:
        DataError: the path is none of this kind.
    """
    match = _PATH.fullmatch(path)
    if match is None:
        raise DataError(f"{path!r}: not phantom:<seed>:<site>:<patient>:<image> with whole numbers")
    return dict(zip(("seed", "site", "patient", "image"), map(int, match.groups()), strict=True))


@lru_cache(maxsize=64)
def prevalence(seed: int, hospital: int) -> dict[str, float]:
    """Return how often each lesion occurs among the patients of a hospital: its label skew."""
    rng = np.random.Generator(np.random.PCG64([seed, hospital, 0xD15E]))
    shares = 0.20 * np.exp(rng.normal(0, 0.75, len(KINDS)))
    return dict(zip(KINDS, np.clip(shares, 0.03, 0.6).tolist(), strict=True))


@lru_cache(maxsize=64)
def _patient(seed: int, patient: int) -> tuple[Anatomy, tuple[Lesion, ...]]:
    rng = np.random.Generator(np.random.PCG64([seed, patient, 0xA7A7]))
    anatomy = draw_anatomy(rng)
    return anatomy, draw_lesions(rng, anatomy, prevalence(seed, patient // PATIENTS_PER_HOSPITAL))


@lru_cache(maxsize=4)
def _grid(size: int) -> tuple[Array, Array]:
    """Pixel centres in image widths, [S, S] each, read-only."""
    centres = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    y, x = np.meshgrid(centres, centres, indexing="ij")
    x.flags.writeable = y.flags.writeable = False
    # Freed once, a large untouched block teaches glibc to keep what the many arrays of a film give back:
    # a thousand page faults fewer a film.
    np.empty(24 << 20, np.uint8)
    return x, y


def _attenuation(
    anatomy: Anatomy, lesions: tuple[Lesion, ...], pose: Pose, rng: np.random.Generator, size: int
) -> Array:
    """Sum everything the beam meets, [S, S]."""
    at = points(anatomy, *pose.to_body(*_grid(size)))
    total = body(anatomy, at)
    thorax = pixel_window(thorax_box(anatomy), pose, size)
    here = chest(anatomy, at.part(thorax), total[thorax], pose.magnify, _ctr(lesions))
    total += _texture(rng, size, 10, 0.015) * total
    inner = total[thorax]
    inner += _texture(rng, size, 60, 0.035, thorax) * here.air
    inner += _lungs(anatomy, lesions, here, pose, size, thorax)
    inner += ribs(anatomy, here)
    terms = [
        (clavicles_box(anatomy), partial(clavicles, lift=0.014 if pose.view == "AP" else 0.0)),
        (scapulae_box(anatomy), partial(scapulae, medial=pose.medial)),
        *((box, humeri) for box in humeri_boxes(anatomy)),
        (spine_box(anatomy), spine),
        (airway_box(anatomy), airway),
        (breasts_box(anatomy), breasts),
        (gastric_box(anatomy), gastric_bubble),
    ]
    for box, term in terms:
        inside = pixel_window(box, pose, size)
        total[inside] += term(anatomy, at.part(inside))
    return np.maximum(total, 0, out=total)


def _lungs(
    anatomy: Anatomy, lesions: tuple[Lesion, ...], here: Chest, pose: Pose, size: int, thorax: Window
) -> Array:
    """Sum what air takes away and vessels and lesions add, in the window ``thorax`` of the film."""
    top, left = np.float32(thorax[0].start), np.float32(thorax[1].start)

    def to_pixels(u: Array, v: Array) -> tuple[Array, Array]:
        x, y = pose.to_image(u, v)
        return x * np.float32(size) - left, y * np.float32(size) - top

    branches = vessels(anatomy, here, to_pixels, size)
    total = -here.air
    for lesion in lesions:
        inside = pixel_window(lesion_box(lesion, anatomy), pose, size, within=thorax)
        patch = here.part(inside)
        total[inside] += added(lesion, anatomy, patch)
        left_over = clear(lesion, anatomy, patch)
        if left_over is not None:
            branches[inside] *= left_over
    total += branches
    return total


@lru_cache(maxsize=4)
def _interpolation(size: int, knots: int) -> Array:
    """Matrix [size, knots] that stretches samples smoothly (raised cosine between neighbours)."""
    place = np.linspace(0, knots - 1, size)[:, None] - np.arange(knots)[None]
    return (0.5 + 0.5 * np.cos(np.pi * np.clip(place, -1, 1))).astype(np.float32)


def _texture(
    rng: np.random.Generator,
    size: int,
    knots: int,
    strength: float,
    window: Window = (slice(None), slice(None)),
) -> Array:
    """Mottle: smooth noise of a standard deviation near ``strength``, in a window of the film."""
    stretch = _interpolation(size, knots)
    noise = np.float32(strength) * rng.standard_normal((knots, knots), dtype=np.float32)
    return stretch[window[0]] @ noise @ stretch[window[1]].T


def _ctr(lesions: tuple[Lesion, ...]) -> float | None:
    return next((lesion.extent for lesion in lesions if lesion.kind == "cardiomegaly"), None)


def phantom_index(
    config: PhantomConfig,
    salt: str = "sparsecontrast",
    val_fraction: float = 0.15,
    test_fraction: float = 0.15,
) -> "pd.DataFrame":
    """List a collection in the schema of an index, without rendering.

    Boxes are in pixels of ``NOMINAL_SIZE``. Each patient has 1 to ``images_per_patient`` films; who
    a patient is and how many films there are of him does not change when the collection grows.

    Raises:
        ConfigError: a count below 1 or too large, a negative seed, fractions that leave nothing for train.
    """
    import pandas as pd

    from sparsecontrast.data.splits import assign_splits

    _check(config)
    rows = [
        _row(config.seed, site, site * PATIENTS_PER_HOSPITAL + number, image)
        for site in range(config.sites)
        for number in range(config.patients_per_site)
        for image in range(_films(config, site * PATIENTS_PER_HOSPITAL + number))
    ]
    frame = pd.DataFrame(rows)
    frame["split"] = assign_splits(frame["patient_id"].tolist(), salt, val_fraction, test_fraction)
    return frame


def _check(config: PhantomConfig) -> None:
    for name in ("sites", "patients_per_site", "images_per_patient"):
        if not 1 <= getattr(config, name) <= PATIENTS_PER_HOSPITAL:
            raise ConfigError(
                f"data.phantom.{name}={getattr(config, name)}: must be in 1..{PATIENTS_PER_HOSPITAL}"
            )
    if config.seed < 0:
        raise ConfigError(f"data.phantom.seed={config.seed}: must not be negative")


def _films(config: PhantomConfig, patient: int) -> int:
    """How many films there are of a patient, 1 to ``config.images_per_patient``."""
    rng = np.random.Generator(np.random.PCG64([config.seed, patient, 0xF117]))
    return min(config.images_per_patient, 1 + int(rng.random() * config.images_per_patient))


def _row(seed: int, site: int, patient: int, image: int) -> dict:
    findings = describe(seed, site, patient, image)
    name = f"phantom-{seed}-{patient:07d}"
    return {
        "image_id": f"{name}-{image}",
        "path": phantom_path(seed, site, patient, image),
        "patient_id": name,
        "study_id": f"{name}-{image}",
        "site": f"hospital_{site:02d}",
        "view": findings.view,
        "split": "",
        "height": NOMINAL_SIZE,
        "width": NOMINAL_SIZE,
        **{f"label_{kind}": float(present) for kind, present in findings.labels.items()},
        "boxes": json.dumps(findings.boxes),
    }


def contact_sheet(
    seed: int = 0, sites: int = 10, patients: int = 3, size: int = 192, boxes: bool = False
) -> NDArray[np.uint8]:
    """Show a collection at a glance: a column a hospital, a row a patient.

    Args:
        seed: of the collection.
        sites: hospitals, from the first.
        patients: of each hospital, from the first.
        size: pixels of a side of one film.
        boxes: whether to outline lesions and name them.

    Returns:
        uint8 [patients x size, sites x size, 3].
    """
    from PIL import Image, ImageDraw

    sheet = Image.new("RGB", (sites * size, patients * size))
    for site in range(sites):
        for number in range(patients):
            film = render(seed, site, site * PATIENTS_PER_HOSPITAL + number, 0, size)
            picture = Image.fromarray(np.rint(film.image * 255).astype(np.uint8)).convert("RGB")
            pen = ImageDraw.Draw(picture)
            for box in film.boxes if boxes else []:
                left, top = box["x"], box["y"]
                pen.rectangle((left, top, left + box["w"], top + box["h"]), outline=(255, 214, 10))
                pen.text((left + 2, max(0, top - 11)), box["label"], fill=(255, 214, 10))
            sheet.paste(picture, (site * size, number * size))
    return np.asarray(sheet)


def _findings(anatomy: Anatomy, lesions: tuple[Lesion, ...], pose: Pose, size: int) -> Findings:
    left, top, right, bottom = pose.borders
    field = np.array([left, top, 1 - right, 1 - bottom])
    boxes = []
    for lesion in lesions:
        points = visible_points(lesion, anatomy, pose.magnify, _ctr(lesions))
        x, y = pose.to_image(points[:, 0], points[:, 1])
        x0, x1 = np.clip([x.min(), x.max()], field[0], field[2]).astype(float) * size
        y0, y1 = np.clip([y.min(), y.max()], field[1], field[3]).astype(float) * size
        box = {"x": x0, "y": y0, "w": x1 - x0, "h": y1 - y0}
        boxes.append({"label": lesion.kind, **{k: round(float(n), 2) for k, n in box.items()}})
    present = {lesion.kind for lesion in lesions}
    return Findings(boxes, {kind: int(kind in present) for kind in KINDS}, pose.view)
