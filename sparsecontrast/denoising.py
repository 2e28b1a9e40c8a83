"""``sparsecontrast denoise``: one acquisition -> ``denoised.npz .png``, ``metrics.json``, ``report.html``.

Nothing is read but the file, nothing leaves the machine, and no weights are kept: A2A trains on the
acquisition itself.
"""

import base64
import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecontrast.charts import Line, line_chart
from sparsecontrast.config import compose_method
from sparsecontrast.durable import write_bytes
from sparsecontrast.errors import EvaluationError
from sparsecontrast.methods.a2a import A2AConfig, denoise
from sparsecontrast.scan_figure import TALL, Bar, picture_width, scan_figure
from sparsecontrast.structure import build
from sparsecontrast.ultrasound.acquisition import Acquisition, Geometry, read_acquisition
from sparsecontrast.ultrasound.beamform import sub_apertures
from sparsecontrast.ultrasound.denoised import Denoised, in_unit
from sparsecontrast.ultrasound.looks import to_safe_range
from sparsecontrast.ultrasound.metrics import bias_db, cnr, gcnr, regions, speckle_snr
from sparsecontrast.ultrasound.us_dicom import write_us_dicom

TEMPLATE = "denoise_report.html.j2"
SHOWN_DB = 55.0  # dynamic range of pictures
BARE_SHARE = 0.97  # of the power of single apertures: with as much noise there is nothing to be seen
NOISE_DB = 30.0  # dynamic range of the noise map, below its own maximum
NOISE_TOLD = (
    "what the apertures do not share, in the unit of the compound: noise, but also side lobes and "
    "decorrelated echoes, so no measurement of the noise alone"
)


@dataclass(frozen=True)
class _Field:
    """Where pixels lie: axes in millimetres, or in pixels where no geometry is known."""

    x: NDArray
    z: NDArray
    unit: str


def denoise_file(
    path: str | Path, out: Path, overrides: Sequence[str] = (),
    tell: Callable[[int, int], None] | None = None, dicom: bool = False, like: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Denoise the acquisition of a file and write what came of it.

    Args:
        path: as ``read_acquisition`` takes it.
        out: folder for the four files; made if need be.
        overrides: of ``configs/method/a2a.yaml``, such as ``method.steps=100 seed=1``.
        tell: progress, as ``denoise`` calls it.
        dicom: write ``denoised.dcm`` as well.
        like: a DICOM file of the study that it belongs to; see ``write_us_dicom``.

    Returns:
        What stands in ``metrics.json``.

    Raises:
        DataError, MissingDataError: the file is not an acquisition.
        ConfigError: an unknown or impossible setting.
        MethodError: the training came to nothing finite.
        StorageError: a file cannot be written.
    """
    config: A2AConfig = build(A2AConfig, compose_method("a2a", overrides), "method.")
    acquisition = read_acquisition(path)
    images, x, z = sub_apertures(acquisition)
    images, unit = to_safe_range(images)  # pictures and ratios are the same in any unit
    start = time.perf_counter()
    found = denoise(images, config, tell)
    seconds = time.perf_counter() - start
    field = _field(found, x, z)
    metrics: dict[str, Any] = {
        "apertures": len(images), "height_px": found.image.shape[0], "width_px": found.image.shape[1],
        "steps": found.steps, "weights_of_step": found.kept_step, "seconds": round(seconds, 2),
        "seed": config.seed, "noise_level": found.noise_level * unit, "noise_level_is": NOISE_TOLD,
        "only_noise": only_noise(found, images),
        "regions": region_metrics(found, acquisition.geometry, x, z),
    }  # fmt: skip
    write_bytes(out / "denoised.npz", _archive(in_unit(found, unit), x, z))
    picture = _picture(found.image, _top(found))
    write_bytes(out / "denoised.png", _png(picture))
    if dicom:
        write_us_dicom(out / "denoised.dcm", picture, x, z, like)
    write_bytes(out / "metrics.json", (json.dumps(metrics, indent=1) + "\n").encode())
    write_bytes(
        out / "report.html",
        _page(Path(path).name, found, field, metrics, acquisition, config).encode(errors="backslashreplace"),
    )
    return metrics


def only_noise(found: Denoised, images: NDArray) -> bool:
    """Say whether the apertures share so little that there may be no echo in them at all."""
    single = float((np.abs(images) ** 2).mean())
    return found.noise_level**2 * len(images) > BARE_SHARE * single


def region_metrics(
    found: Denoised, geometry: Geometry | None, x: NDArray | None, z: NDArray | None
) -> list[dict[str, Any]]:
    """Measure the images before and after, where an inclusion is known; an empty list where none is."""
    if geometry is None or geometry.inclusion is None or x is None or z is None:
        return []
    try:
        inside, outside = regions(x, z, geometry.inclusion)
    except EvaluationError:
        return []
    rows = []
    images = {"compound": np.abs(found.compound), "A2A": found.image, "A2A anatomy": found.anatomy,
              "A2A coherent": np.abs(found.coherent)}  # fmt: skip
    for name, image in images.items():
        a, b = image[inside], image[outside]
        rows.append({
            "image": name, "gcnr": gcnr(a, b), "cnr": cnr(a, b), "speckle_snr": speckle_snr(b),
            "contrast_db": bias_db(a, b),
        })  # fmt: skip
    return rows


def _field(found: Denoised, x: NDArray | None, z: NDArray | None) -> _Field:
    height, width = found.image.shape
    if x is None or z is None:
        return _Field(np.arange(width), np.arange(height), "pixels")
    return _Field(1e3 * np.asarray(x), 1e3 * np.asarray(z), "mm")


def _archive(found: Denoised, x: NDArray | None, z: NDArray | None) -> bytes:
    arrays = {
        "image": found.image.astype(np.float32), "anatomy": found.anatomy.astype(np.float32),
        "coherent": found.coherent, "noise": found.noise.astype(np.float32), "compound": found.compound,
    }  # fmt: skip
    if x is not None and z is not None:
        arrays |= {"x": np.asarray(x), "z": np.asarray(z)}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _top(found: Denoised) -> float:
    """White in every picture: a bright echo of the compound, but well above its noise."""
    return max(float(np.percentile(np.abs(found.compound), 99.5)), 10 * found.noise_level)


def _picture(image: NDArray, top: float) -> NDArray[np.uint8]:
    level = 20 * np.log10(np.maximum(image, 1e-30) / top)
    return (np.clip(level / SHOWN_DB + 1, 0, 1) * 255).round().astype(np.uint8)


def _noise_picture(noise: NDArray, top: float) -> tuple[NDArray[np.uint8], Bar]:
    """Give the noise map in dB of the other pictures' white, and the scale of its greys."""
    level = 20 * np.log10(np.maximum(noise, 1e-30) / top)
    white = float(level.max())
    shown = np.clip((level - white) / NOISE_DB + 1, 0, 1)
    return (255 * shown).round().astype(np.uint8), Bar(white - NOISE_DB, white, "dB")


def _png(picture: NDArray[np.uint8], size: tuple[int, int] | None = None) -> bytes:
    from PIL import Image

    drawn = Image.fromarray(picture)
    if size is not None:
        drawn = drawn.resize(size, Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    drawn.save(buffer, "PNG")
    return buffer.getvalue()


def _page(
    name: str, found: Denoised, field: _Field, metrics: dict[str, Any], acquisition: Acquisition,
    config: A2AConfig,
) -> str:  # fmt: skip
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    x, z = ([float(axis[0]), float(axis[-1])] for axis in (field.x, field.z))
    size = round(picture_width(x, z)), round(TALL)
    top = _top(found)
    noise, scale = _noise_picture(found.noise, top)
    level = Bar(-SHOWN_DB, 0.0, "dB")
    shown = [
        ("before: compound", _picture(np.abs(found.compound), top), level),
        ("after: A2A", _picture(found.image, top), level), ("anatomy", _picture(found.anatomy, top), level),
        ("coherent", _picture(np.abs(found.coherent), top), level),
        ("noise map: what the apertures do not share", noise, scale),
    ]  # fmt: skip
    pictures = [
        (told, scan_figure(_uri(_png(picture, size)), x, z, field.unit, told, bar))
        for told, picture, bar in shown
    ]
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    ).get_template(TEMPLATE)  # fmt: skip
    return page.render(
        name=name, metrics=metrics, config=config, field=field, decibels=SHOWN_DB,
        pictures=pictures,
        profiles=_profiles(found, field, acquisition.geometry),
        training=_training(found),
    )  # fmt: skip


def _profiles(found: Denoised, field: _Field, geometry: Geometry | None) -> list[tuple[str, Any]]:
    """Draw the rows and the columns through the inclusion, or through the middle."""
    i, j = (n // 2 for n in found.image.shape)
    if geometry is not None and geometry.inclusion is not None and field.unit == "mm":
        i = int(np.abs(field.z - 1e3 * geometry.inclusion[1]).argmin())
        j = int(np.abs(field.x - 1e3 * geometry.inclusion[0]).argmin())
    top, drawn = _top(found), []
    images = (("compound", np.abs(found.compound), "thin"), ("A2A", found.image, "main"),
              ("anatomy", found.anatomy, "dashed"))  # fmt: skip
    for title, axis, cut, where in (
        ("lateral profile", field.x, (i, slice(None)), field.z[i]),
        ("axial profile", field.z, (slice(None), j), field.x[j]),
    ):
        lines = [
            Line(name, list(axis), _decibels(image[cut], top), kind, 1 if kind == "dashed" else 0)
            for name, image, kind in images
        ]
        chart = line_chart(lines, title, field.unit, "dB")
        drawn.append((f"{title} at {where:.3g} {field.unit}; thin: the compound", chart))
    return drawn


def _decibels(amplitude: NDArray, top: float) -> list[float]:
    return [float(v) for v in 20 * np.log10(np.maximum(amplitude, 1e-30) / top)]


def _training(found: Denoised) -> Any:
    steps = [step for step, _, _ in found.history]
    lines = [Line("loss of the swap", steps, [loss for _, loss, _ in found.history])]
    if np.isfinite([held for _, _, held in found.history]).any():
        lines.append(Line("held-out aperture", steps, [held for _, _, held in found.history], "dashed", 1))
    return line_chart(lines, "training", "step", "-2 log likelihood")


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
