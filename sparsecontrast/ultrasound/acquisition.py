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

HDF5 = (".h5", ".hdf5", ".uff")
NEEDED = ("fc", "fs", "pitch", "nel", "tx", "c", "x_extent", "z_extent")


@dataclass(frozen=True)
class Geometry:
    """A linear array and the field that it looks at; metres, hertz, metres a second.

    Attributes:
        fc: centre frequency, to which the IQ data were demodulated.
        fs: sampling frequency of the IQ data; the first sample is at the moment of transmission.
        pitch: distance of neighbouring elements; the array is centred at x = 0.
        nel: elements, all of which receive.
        tx: elements that transmit, one a transmission.
        c: speed of sound.
        x_extent: lateral edges of the field.
        z_extent: axial edges of the field.
        inclusion: (x, z, radius) of a known round inclusion, for metrics.
    """

    fc: float
    fs: float
    pitch: float
    nel: int
    tx: tuple[int, ...]
    c: float
    x_extent: tuple[float, float]
    z_extent: tuple[float, float]
    inclusion: tuple[float, float, float] | None = None

    def __post_init__(self):
        if min(self.fc, self.fs, self.pitch, self.c) <= 0 or self.nel < 2 or not self.tx:
            raise DataError("geometry: fc, fs, pitch and c must be above 0, nel at least 2, tx not empty")
        if not all(0 <= element < self.nel for element in self.tx):
            raise DataError(f"geometry: tx={list(self.tx)} names elements outside of 0..{self.nel - 1}")
        if self.x_extent[0] >= self.x_extent[1] or not 0 <= self.z_extent[0] < self.z_extent[1]:
            raise DataError("geometry: x_extent and z_extent must each grow, z from 0 on")

    @property
    def elements(self) -> NDArray[np.float64]:
        """Lateral positions of the elements [nel], metres."""
        return np.asarray((np.arange(self.nel) - (self.nel - 1) / 2) * self.pitch, np.float64)


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
    ``Geometry`` and optionally ``cx``, ``cz``, ``r``. HDF5 files (.h5, .hdf5, .uff) hold data sets of these
    names; other layouts of UFF are not read.

    Raises:
        MissingDataError: no such file.
        DataError: not such a file, or h5py is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingDataError(f"{path}: no such file; give an .npz with images [M, H, W] or iq and meta")
    arrays = _read_hdf5(path) if path.suffix.lower() in HDF5 else _read_npz(path)
    if "images" in arrays:
        x, z = arrays.get("x"), arrays.get("z")
        shape = np.shape(arrays["images"])
        for name, axis, size in (("x", x, shape[-1]), ("z", z, shape[-2] if len(shape) > 1 else -1)):
            if axis is not None and np.shape(axis) != (size,):
                raise DataError(f"{path}: {name} has shape {np.shape(axis)}, images have {shape}")
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
            known = ("images", "x", "z", "iq", "scale", "meta")
            return {name: np.asarray(file[name][()]) for name in known if name in file}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: cannot be read as HDF5 ({error})") from error


def _complex(path: Path, arrays: Mapping[str, NDArray]) -> NDArray[np.complex64]:
    iq = arrays["iq"]
    if iq.dtype.kind == "c":
        return iq.astype(np.complex64)
    if iq.ndim != 4 or iq.shape[-1] != 2:
        raise DataError(f"{path}: iq of shape {iq.shape}: need complex [M, nel, T], or real [M, nel, T, 2]")
    scale = float(arrays.get("scale", np.float32(1)))
    return ((iq[..., 0] + 1j * iq[..., 1].astype(np.float32)) * np.float32(scale)).astype(np.complex64)


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
            nel=int(meta["nel"]), tx=tuple(int(t) for t in meta["tx"]),
            x_extent=(float(meta["x_extent"][0]), float(meta["x_extent"][1])),
            z_extent=(float(meta["z_extent"][0]), float(meta["z_extent"][1])),
            inclusion=(float(meta["cx"]), float(meta["cz"]), float(meta["r"])) if known else None,
        )  # fmt: skip
    except (TypeError, ValueError, IndexError) as error:
        raise DataError(f"{path}: meta cannot be used ({error})") from error
