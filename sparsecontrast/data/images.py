"""Read one radiograph, DICOM, PNG or JPEG, into float32 [H, W] in [0, 1] with bone bright.

The only place that meets pydicom. What a DICOM file shows is decided as in PS3.3 and PS3.4 N.2:

    stored values --modality LUT--> values --VOI LUT or window--> [0, 1] --MONOCHROME1--> inverted

A VOI LUT goes before a window; of several, the first. A file with neither is stretched from its own
smallest to its own largest value: no percentiles, which would clip what a small bright device hides.
"""

import contextlib
import logging
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsecontrast.data.filters import normal_view
from sparsecontrast.data.photos import luminance, photo_size, read_photo
from sparsecontrast.errors import ImageReadError

if TYPE_CHECKING:
    from pydicom import Dataset

HEADER_TAGS = (
    "PatientID", "StudyInstanceUID", "Modality", "BodyPartExamined", "SeriesDescription", "StudyDescription",
    "ViewPosition", "ViewCodeSequence", "Rows", "Columns", "SpecificCharacterSet",
)  # fmt: skip

# One decoder for one codec: a baseline JPEG gives the same pixels inside a DICOM file and bare.
PLUGINS = {"JPEG Baseline (Process 1)": "pillow"}

# pydicom's log quotes the values of tags, and with them patients.
logging.getLogger("pydicom").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Header:
    """What the index may know of a file before its pixels; text is "" where the file is silent."""

    height: int
    width: int
    patient: str = ""
    study: str = ""
    modality: str = ""
    body_part: str = ""
    description: str = ""
    view: str = ""


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Decode one file as its header says it is to be shown.

    PNG: 8 bit divides by 255, 16 bit by 65535. JPEG: 8 bit, or 9 to 16 bit divided by its own full
    range. Colour becomes luminance (ITU-R 601), alpha is dropped, EXIF orientation is honoured.

    Returns:
        float32 [H, W] in [0, 1].

    Raises:
        ImageReadError: an unreadable file, more than one frame, or the same value everywhere; the
            message is the reason alone, free of paths and of tag values.
    """
    with _reasons(path):
        image = _show(*decode_dicom(path)) if _kind(path) == "DICOM" else read_photo(path)
        if image.ndim != 2 or 0 in image.shape:
            raise ImageReadError(f"not a single image: array of shape {image.shape}")
        if not np.isfinite(image).all():
            raise ImageReadError("values that are not finite")
        if image.min() == image.max():
            raise ImageReadError("constant: every pixel has the same value")
    return np.clip(image, 0.0, 1.0).astype(np.float32)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read size, and for DICOM the few tags of ``HEADER_TAGS``, without decoding pixels.

    Height and width are those of what ``read_image`` returns.

    Raises:
        ImageReadError: not an image, or a DICOM file without size or pixels.
    """
    with _reasons(path):
        return _dicom_header(path) if _kind(path) == "DICOM" else Header(*photo_size(path))


def decode_dicom(path: str | os.PathLike[str]) -> tuple["Dataset", np.ndarray]:
    """Decode the stored values of one DICOM file, before any look-up table.

    Returns:
        The data set, and its pixels: [H, W], or [H, W, 3] for colour, dtype as stored, unused bits cleared.

    Raises:
        ImageReadError: no or damaged pixels, no transfer syntax, several frames.
    """
    from pydicom import dcmread

    with _reasons(path):
        dataset = dcmread(path)
        if "TransferSyntaxUID" not in dataset.file_meta:
            raise ImageReadError("no transfer syntax: nothing says how the pixels are encoded")
        if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            raise ImageReadError("no pixel data: the file never had any, or is cut short")
        if _number(dataset.get("NumberOfFrames") or 1, "NumberOfFrames") > 1:
            raise ImageReadError("several frames: one radiograph a file is expected")
        stored, told = _pixels(dataset), (dataset.Rows, dataset.Columns)
        if stored.shape[:2] != told:  # too many bytes are taken for more frames, and those for rows
            raise ImageReadError(f"pixels of shape {stored.shape}, the header says {told[0]} x {told[1]}")
        return dataset, stored


def _pixels(dataset: "Dataset") -> np.ndarray:
    from pydicom.pixels.utils import pixel_array

    syntax = dataset.file_meta.TransferSyntaxUID.name
    plugin = PLUGINS.get(syntax, "")
    try:
        try:
            return pixel_array(dataset, decoding_plugin=plugin)
        except Exception:
            if not plugin:
                raise
            return pixel_array(dataset)
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # decoders raise anything, those in Rust what is no Exception
        detail = " ".join(str(error).split())
        raise ImageReadError(f"pixels cannot be decoded ({syntax}): {detail[:200]}") from error


def _show(dataset: "Dataset", stored: np.ndarray) -> np.ndarray:
    """Apply the grey-scale pipeline of a data set to its stored values."""
    kind = str(dataset.get("PhotometricInterpretation", ""))
    if stored.ndim == 3:
        if kind == "PALETTE COLOR" or stored.shape[-1] != 3:
            raise ImageReadError("several samples a pixel that are not red, green, blue")
        return luminance(stored) / np.float32(2 ** int(dataset.BitsStored) - 1)
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise ImageReadError("photometric interpretation is neither MONOCHROME1, MONOCHROME2 nor colour")
    padding = _padding(dataset, stored)
    values = _modality(dataset, stored)
    seen = stored[~padding]
    if seen.size == 0 or seen.min() == seen.max():
        raise ImageReadError("constant: every pixel has the same value")
    shown = _voi(dataset, values, values[~padding])
    if kind == "MONOCHROME1":
        shown = 1.0 - shown
    shown[padding] = 0.0  # what the detector never saw is background, whatever its number
    return shown


def _padding(dataset: "Dataset", stored: np.ndarray) -> np.ndarray:
    """Mark pixels that pad the image to a rectangle (PS3.3 C.7.5.1.1.2), on stored values."""
    first = dataset.get("PixelPaddingValue")
    if first is None:
        return np.zeros(stored.shape, dtype=bool)
    last = dataset.get("PixelPaddingRangeLimit")
    low, high = sorted((int(first), int(first if last is None else last)))
    return (stored >= low) & (stored <= high)


def _modality(dataset: "Dataset", stored: np.ndarray) -> np.ndarray:
    """Turn stored values into modality values (PS3.3 C.11.1): a look-up table, or slope and intercept."""
    if dataset.get("ModalityLUTSequence"):
        return _look_up(dataset, dataset.ModalityLUTSequence[0], stored)[0]
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    # float32 holds every 16-bit number, and half the memory of a 5 megapixel detector
    values = stored.astype(np.float32 if stored.dtype.itemsize <= 2 else np.float64)
    if slope is not None and intercept is not None:
        values = values * _number(slope, "RescaleSlope") + _number(intercept, "RescaleIntercept")
    return values


def _voi(dataset: "Dataset", values: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Map modality values to [0, 1] (PS3.3 C.11.2); ``seen`` are those that are not padding."""
    if dataset.get("VOILUTSequence"):
        table, top = _look_up(dataset, dataset.VOILUTSequence[0], np.rint(values))
        return table / top
    center, width = _first(dataset.get("WindowCenter")), _first(dataset.get("WindowWidth"))
    if center is None or width is None or width <= 0:
        low, high = float(seen.min()), float(seen.max())
        return np.clip((values - low) / max(high - low, 1e-30), 0.0, 1.0)
    return window(values, center, width, str(dataset.get("VOILUTFunction") or "LINEAR"))


def window(values: np.ndarray, center: float, width: float, function: str = "LINEAR") -> np.ndarray:
    """Apply a window, PS3.3 C.11.2.1.2 (LINEAR) and C.11.2.1.3 (SIGMOID, LINEAR_EXACT).

    Args:
        values: modality values, any shape.
        center: in modality units.
        width: in modality units, positive; LINEAR maps a width of at most 1 to a step.
        function: LINEAR | LINEAR_EXACT | SIGMOID.

    Returns:
        Floats in [0, 1], the shape of ``values``.

    Raises:
        ImageReadError: another function.
    """
    function = function.strip().upper()
    if function == "SIGMOID":  # 1 / (1 + exp(-4 t)), written so that it cannot overflow
        return 0.5 * (1.0 + np.tanh(2.0 * (values - center) / width))
    if function not in ("LINEAR", "LINEAR_EXACT"):
        raise ImageReadError("VOI LUT function is none of LINEAR, LINEAR_EXACT, SIGMOID")
    if function == "LINEAR":
        center, width = center - 0.5, width - 1.0
    if width <= 0:
        return (values > center).astype(np.float32)
    return np.clip((values - center) / width + 0.5, 0.0, 1.0)


def _look_up(dataset: "Dataset", item: "Dataset", values: np.ndarray) -> tuple[np.ndarray, float]:
    """Apply one LUT item (PS3.3 C.11.1.1.1): float32 outputs, and the largest value an output may have."""
    entries, first, bits = (int(v) for v in item.LUTDescriptor)
    entries = entries or 2**16
    data = item.LUTData
    if isinstance(data, bytes):  # OW: words, or bytes where that is what fits
        order = "<" if dataset.file_meta.TransferSyntaxUID.is_little_endian else ">"
        data = np.frombuffer(data, dtype=f"{order}u2" if len(data) >= 2 * entries else "u1")
    table = np.atleast_1d(np.asarray(data)).astype(np.float32)[:entries]
    if len(table) < entries:
        raise ImageReadError(f"look-up table holds {len(table)} of its {entries} entries")
    at = np.clip(values.astype(np.int64) - first, 0, entries - 1)
    return table[at], max(float(2**bits - 1), float(table.max()))


def _first(value: Any) -> float | None:
    """Return the first of a tag's numbers, None where there is none."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = value[0] if len(value) else None
    return None if value is None or value == "" else _number(value, "window")


def _number(value: Any, tag: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ImageReadError(f"{tag} is not a number") from None
    if not np.isfinite(number):
        raise ImageReadError(f"{tag} is not finite")
    return number


def _dicom_header(path: str | os.PathLike[str]) -> Header:
    from pydicom import dcmread

    with open(path, "rb") as file:
        dataset = dcmread(file, stop_before_pixels=True, specific_tags=list(HEADER_TAGS))
        ended = file.tell() >= os.fstat(file.fileno()).st_size

    def text(name: str) -> str:
        return str(dataset.get(name) or "").strip()

    height, width = (int(_number(dataset.get(name) or 0, name)) for name in ("Rows", "Columns"))
    if height <= 0 or width <= 0:
        raise ImageReadError("no image size: Rows and Columns are missing")
    if ended:
        raise ImageReadError("no pixel data: the file never had any, or is cut short")
    views = dataset.get("ViewCodeSequence") or []
    coded = str(views[0].get("CodeMeaning") or "") if len(views) else ""
    return Header(
        height, width, text("PatientID"), text("StudyInstanceUID"), text("Modality"),
        text("BodyPartExamined"), f"{text('SeriesDescription')} {text('StudyDescription')}".strip(),
        normal_view(text("ViewPosition")) or normal_view(coded),
    )  # fmt: skip


def _kind(path: str | os.PathLike[str]) -> str:
    """Tell DICOM, PNG and JPEG by their first bytes: names lie."""
    with open(path, "rb") as file:
        start = file.read(132)
    if not start:
        raise ImageReadError("empty file")
    kinds = ((b"DICM", start[128:]), (b"\x89PNG\r\n\x1a\n", start), (b"\xff\xd8\xff", start))
    for name, (magic, there) in zip(("DICOM", "PNG", "JPEG"), kinds, strict=True):
        if there.startswith(magic):
            return name
    raise ImageReadError("neither DICOM (no DICM marker), PNG nor JPEG")


@contextlib.contextmanager
def _reasons(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever a decoder raises into an ``ImageReadError`` that quotes no tag value and no path."""
    try:
        with _QUIET:
            yield
    except ImageReadError:
        raise
    except FileNotFoundError:
        raise ImageReadError("no such file") from None
    except OSError as error:
        name = os.fspath(path)  # quoted, some names look otherwise
        detail = error.strerror or str(error).replace(repr(name), "the file").replace(name, "the file")
        raise ImageReadError(f"cannot be read: {detail}") from error
    except Exception as error:  # a parser's message may quote a tag: only its kind is told
        raise ImageReadError(f"damaged file ({type(error).__name__})") from error


class _Quiet:
    """Silence third-party warnings about odd files, from any number of threads at once.

    ``warnings.catch_warnings`` restores a global; nested across threads it would restore the wrong
    one. The first to enter saves, the last to leave restores.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.RLock(), 0
        self._saved: contextlib.ExitStack | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._saved = contextlib.ExitStack()
                self._saved.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore", UserWarning)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._saved is not None:
                self._saved.close()


_QUIET = _Quiet()
