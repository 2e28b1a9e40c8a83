"""Files of one acquisition: sub-aperture images, or channel data with the geometry that beamforming needs."""

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsecontrast.durable import write_bytes
from sparsecontrast.errors import DataError, MissingDataError
from sparsecontrast.ultrasound.geometry import FAR, Geometry
from sparsecontrast.ultrasound.looks import LEAST, MOST

HDF5 = (".h5", ".hdf5", ".uff")
HDF5_NAMES = ("images", "x", "z", "iq", "scale", "meta")
UFF = (
    "channel_data",
    "beamformed_data",
    "uff.channel_data",
    "b_data",
)  # objects of USTB's files at their root
NEEDED = ("fc", "fs", "pitch", "nel", "tx", "c", "x_extent", "z_extent")


@dataclass(frozen=True)
class Acquisition:
    """What a file holds: ``images`` [M, H, W], or ``channels`` [M, nel, T] with their geometry.

    ``x`` [W] and ``z`` [H] are the axes of ``images`` in metres, where known.
    """

    images: NDArray | None = None
    channels: NDArray | None = None
    geometry: Geometry | None = None
    x: NDArray | None = None
    z: NDArray | None = None


def read_acquisition(path: str | Path) -> Acquisition:
    """Read an acquisition.

    An ``.npz`` holds ``images`` [M, H, W] (complex or RF; optional axes ``x``, ``z`` in metres), or ``iq``
    (complex [M, nel, T], or int16 [M, nel, T, 2] with ``scale``) and ``meta``, JSON with the fields of
    ``Geometry`` and optionally ``cx``, ``cz``, ``r``. HDF5 files (.h5, .hdf5) hold data sets of these names,
    or groups of ``real`` and ``imag`` for complex ones. USTB's UFF is refused by name.

    Raises:
        MissingDataError: no such file.
        DataError: not such a file, or h5py is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingDataError(f"{path}: no such file; give an .npz with images [M, H, W] or iq and meta")
    arrays = _read_hdf5(path) if path.suffix.lower() in HDF5 else _read_npz(path)
    if "images" in arrays:
        shape = np.shape(arrays["images"])
        if len(shape) != 3:
            raise DataError(f"{path}: images have shape {shape}; need [M, H, W]")
        x, z = _axis(path, arrays, "x", shape[2]), _axis(path, arrays, "z", shape[1])
        meta = _meta(path, arrays) if "meta" in arrays else {}
        geometry = _geometry(path, meta) if all(name in meta for name in NEEDED) else None
        return Acquisition(images=arrays["images"], geometry=geometry, x=x, z=z)
    if "iq" in arrays and "meta" in arrays:
        geometry = _geometry(path, _meta(path, arrays))
        channels = _complex(path, arrays)
        if channels.ndim != 3 or channels.shape[:2] != (len(geometry.tx), geometry.nel):
            raise DataError(
                f"{path}: iq has shape {channels.shape}, its geometry has {len(geometry.tx)} transmissions "
                f"and {geometry.nel} elements"
            )
        return Acquisition(channels=channels, geometry=geometry)
    raise DataError(
        f"{path}: holds {sorted(arrays) or 'nothing'}; need images [M, H, W], or iq [M, nel, T] and meta"
    )


def write_channels(path: str | Path, channels: NDArray, geometry: Geometry) -> None:
    """Write channel data [M, nel, T] as an ``.npz`` that ``read_acquisition`` reads.

    Raises:
        StorageError: as in ``write_bytes``.
    """
    meta: dict[str, Any] = asdict(geometry)
    if (inclusion := meta.pop("inclusion")) is not None:
        meta |= dict(zip(("cx", "cz", "r"), inclusion, strict=True))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, iq=channels.astype(np.complex64), meta=json.dumps(meta))
    write_bytes(Path(path), buffer.getvalue())


def _read_npz(path: Path) -> dict[str, NDArray]:
    try:
        with path.open("rb") as raw:  # np.load leaves a torn file open
            file = np.load(raw, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise DataError(f"{path}: one array without a name; save it as np.savez(file, images=...)")
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise DataError(f"{path}: cannot be read as .npz ({error})") from error


def _read_hdf5(path: Path) -> dict[str, NDArray]:
    try:
        import h5py  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DataError(f"{path}: HDF5 and UFF need h5py (pip install h5py); or give an .npz") from error
    try:
        with h5py.File(path, "r") as file:
            if foreign := [name for name in UFF if name in file]:
                raise DataError(
                    f"{path}: is of UFF layout (it holds {foreign[0]}), which is not read; write its channel "
                    "data as iq [M, nel, T] with meta, or beamformed apertures as images [M, H, W]"
                )
            if not any(name in file for name in HDF5_NAMES):
                raise DataError(f"{path}: holds {sorted(file) or 'nothing'}; need images, or iq and meta")
            return {name: _hdf5_array(file[name]) for name in HDF5_NAMES if name in file}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DataError(f"{path}: cannot be read as HDF5 ({error})") from error


def _hdf5_array(found: Any) -> NDArray:
    """Read a data set, or a group of the real and the imaginary part of one."""
    if hasattr(found, "shape"):
        return np.asarray(found[()])
    if set(found) != {"real", "imag"}:
        raise ValueError(f"{found.name} is a group of {sorted(found)}, not an array, nor real and imag")
    real, imag = (np.asarray(found[part][()]) for part in ("real", "imag"))
    if real.shape != imag.shape or real.dtype.kind not in "iuf" or imag.dtype.kind not in "iuf":
        raise ValueError(f"{found.name}: real and imag must be numbers of one shape")
    return real + 1j * imag


def _axis(path: Path, arrays: Mapping[str, NDArray], name: str, size: int) -> NDArray | None:
    axis = arrays.get(name)
    if axis is None:
        return None
    if np.shape(axis) != (size,):
        raise DataError(f"{path}: {name} has shape {np.shape(axis)}, images have {size} such pixels")
    if axis.dtype.kind not in "iuf" or not np.isfinite(axis).all():
        raise DataError(f"{path}: {name} must be finite numbers, in metres")
    steps = np.diff(axis.astype(np.float64))
    if not ((steps > 0).all() or (steps < 0).all()) or np.abs(axis).max() > FAR:
        raise DataError(
            f"{path}: {name} goes from {float(axis[0]):g} to {float(axis[-1]):g}; it must grow or fall from "
            f"pixel to pixel, in metres, within {FAR:g}"
        )
    return axis


def _complex(path: Path, arrays: Mapping[str, NDArray]) -> NDArray[np.complex64]:
    iq = arrays["iq"]
    whole = iq.dtype.kind == "c" and iq.ndim == 3
    if not whole and (iq.dtype.kind not in "iuf" or iq.ndim != 4 or iq.shape[-1] != 2):
        raise DataError(
            f"{path}: iq of shape {iq.shape}, {iq.dtype}: need complex [M, nel, T], or real [M, nel, T, 2]"
        )
    if iq.shape[2] < 2:
        raise DataError(f"{path}: iq has {iq.shape[2]} samples a record; at least 2 are needed")
    scale = _scale(path, arrays)
    finite = np.isfinite(iq)
    if not finite.all():
        shot, element = np.argwhere(~finite)[0][:2]
        raise DataError(f"{path}: iq is not finite in transmission {shot}, element {element}; repair it")
    peak = float(np.abs(iq if whole else iq.astype(np.float64)).max()) * (1.0 if whole else scale)
    if peak and not LEAST <= peak <= MOST:
        raise DataError(f"{path}: iq reaches {peak:.1e}; scale it to within {LEAST:g} to {MOST:g}")
    if whole:
        return iq.astype(np.complex64)
    return ((iq[..., 0] + 1j * iq[..., 1].astype(np.float32)) * np.float32(scale)).astype(np.complex64)


def _scale(path: Path, arrays: Mapping[str, NDArray]) -> float:
    scale = np.asarray(arrays.get("scale", np.float32(1)))
    if scale.size != 1 or scale.dtype.kind not in "iuf" or not LEAST <= float(scale.item()) <= MOST:
        raise DataError(f"{path}: scale must be one number within {LEAST:g} to {MOST:g}")
    return float(scale.item())


def _meta(path: Path, arrays: Mapping[str, NDArray]) -> dict[str, Any]:
    raw = arrays["meta"]
    value = raw.item() if raw.ndim == 0 else None
    try:
        meta = json.loads(value.decode() if isinstance(value, bytes) else str(value))
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: meta is not JSON ({error})") from error
    if not isinstance(meta, dict):
        raise DataError(f"{path}: meta is not a JSON object")
    return meta


def _geometry(path: Path, meta: Mapping[str, Any]) -> Geometry:
    missing = [name for name in NEEDED if name not in meta]
    if missing:
        raise DataError(f"{path}: meta lacks {', '.join(missing)}")
    try:
        known = all(isinstance(meta.get(name), int | float) for name in ("cx", "cz", "r"))
        return Geometry(
            **{name: float(meta[name]) for name in ("fc", "fs", "pitch", "c")},
            nel=_whole(meta["nel"]), tx=tuple(_whole(t) for t in meta["tx"]),
            x_extent=(float(meta["x_extent"][0]), float(meta["x_extent"][1])),
            z_extent=(float(meta["z_extent"][0]), float(meta["z_extent"][1])),
            inclusion=(float(meta["cx"]), float(meta["cz"]), float(meta["r"])) if known else None,
        )  # fmt: skip
    except (TypeError, ValueError, IndexError, KeyError, OverflowError) as error:
        raise DataError(f"{path}: meta cannot be used ({error})") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _whole(value: Any) -> int:
    if int(value) != value:
        raise ValueError(f"{value} is not a whole number")
    return int(value)
