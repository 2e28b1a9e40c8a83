"""What may leave a site, and what may be aggregated: one flat array and a manifest.

``pack`` is the only way out and ``verify`` the only way in. Nothing is pickled: the array travels
as NPY bytes whose header is checked before anything is allocated, the manifest as plain scalars and
lists of text and of numbers.

The layout is canonical: tensors in the order of their names, each flattened row-major. So replies
of one backbone can be averaged, masked or compared as vectors, without looking into them.
"""

import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsecontrast.errors import PayloadError

VERSION = 2
SHARED = ("backbone.", "saliency.")  # whatever a method says, nothing else may leave
FLOATS = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2")}
DTYPES = FLOATS | {"int8": np.dtype("i1")}  # the last for updates alone, see deltas.py
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Payload:
    """A message's tensors.

    Attributes:
        flat: [n] float32, float16 or int8, the tensors one after another in the order of the manifest.
        manifest: ``version``, ``kind`` (weights | delta), ``dtype`` (fp32 | fp16 | int8), ``names``,
            ``shapes`` ("192x1x4x4", "" for a scalar), ``scales`` (what each tensor's numbers are to be
            multiplied with: 1 unless int8), ``sha256`` of the bytes of array and scales.
    """

    flat: np.ndarray
    manifest: dict[str, Any]


def pack(tensors: Mapping[str, Tensor], allowed: Sequence[str], dtype: str) -> Payload:
    """Pack exactly the allowed tensors.

    Args:
        tensors: by name; every one of ``allowed`` and nothing else.
        allowed: the method's ``shared_parameters()``.
        dtype: fp32 or fp16.

    Raises:
        PayloadError: ``names`` for a tensor that may not leave or is missing, ``dtype`` for one that
            is not floating point, ``nonfinite`` for NaN, infinity, or overflow in fp16.
    """
    foreign = sorted(name for name in {*tensors, *allowed} if not name.startswith(SHARED))
    if foreign:
        raise PayloadError("names", f"{foreign[:5]} may not leave: names must start with {SHARED}")
    if set(tensors) != set(allowed):
        odd = sorted(set(tensors) ^ set(allowed))
        raise PayloadError("names", f"{odd[:5]}: not exactly the {len(allowed)} allowed tensors")
    names = sorted(allowed)
    integers = [name for name in names if not tensors[name].is_floating_point()]
    if integers:
        raise PayloadError("dtype", f"{integers[:5]}: only floating point tensors can be averaged")
    parts = [tensors[name].detach().cpu().to(torch.float32).reshape(-1).numpy() for name in names]
    with np.errstate(over="ignore"):  # an overflow is found just below
        flat = np.concatenate(parts).astype(_dtype(dtype))
    check_finite(flat)
    return Payload(flat, manifest_of({name: tuple(tensors[name].shape) for name in names}, dtype, flat))


def repack(flat: np.ndarray, shapes: Shapes, dtype: str) -> Payload:
    """Pack a vector that is already in the canonical layout of ``shapes``."""
    with np.errstate(over="ignore"):
        cast = flat.astype(_dtype(dtype))
    check_finite(cast)
    return Payload(cast, manifest_of(shapes, dtype, cast))


def unpack(payload: Payload) -> dict[str, Tensor]:
    """Return a verified payload's tensors, fp32, by name."""
    flat = torch.from_numpy(payload.flat.astype(np.float32))
    shapes = [parse_shape(text) for text in payload.manifest["shapes"]]
    parts = flat.split([math.prod(shape) for shape in shapes])
    names = payload.manifest["names"]
    return {n: p.reshape(s).clone() for n, p, s in zip(names, parts, shapes, strict=True)}


def verify(payload: Payload, expected: Shapes, dtype: str | None = None, kind: str = "weights") -> None:
    """Refuse a payload that does not fit.

    Args:
        payload: what arrived.
        expected: shapes by name of the receiver's own shared tensors.
        dtype: fp32, fp16 or int8 when the receiver insists.
        kind: weights, or delta for an update of weights that the receiver knows.

    Raises:
        PayloadError: ``manifest``, ``names``, ``shape``, ``dtype``, ``size`` or ``nonfinite``.
    """
    flat, manifest = payload.flat, payload.manifest
    _check_manifest(manifest, expected)
    if manifest["kind"] != kind:
        raise PayloadError("manifest", f"holds {manifest['kind'][:20]!r}, expected {kind}")
    if dtype is not None and manifest["dtype"] != dtype:
        raise PayloadError("dtype", f"manifest says {manifest['dtype']!r}, expected {dtype}")
    if flat.dtype != _dtype(manifest["dtype"], DTYPES):
        raise PayloadError("dtype", f"array is {flat.dtype}, the manifest says {manifest['dtype']}")
    total = sum(math.prod(shape) for shape in expected.values())
    if flat.shape != (total,):
        raise PayloadError("size", f"array has shape {flat.shape}, expected ({total},)")
    _check_scales(manifest, len(expected))
    if _sha256(flat, manifest["scales"]) != manifest["sha256"]:
        raise PayloadError("manifest", "sha256 of the array is not the manifest's")
    check_finite(flat)


def check_norm(flat: np.ndarray, reference: np.ndarray, max_norm_ratio: float) -> None:
    """Refuse weights that no honest training could have made of ``reference``.

    Raises:
        PayloadError: ``norm``, the two norms are more than a factor ``max_norm_ratio`` apart.
    """
    size, before = norm(flat), norm(reference)
    if size > max_norm_ratio * before or size * max_norm_ratio < before:
        raise PayloadError("norm", f"norm is not within x{max_norm_ratio:g} of the global weights'")


def fingerprint(shapes: Shapes) -> str:
    """Identify an architecture: sha256 of the names and shapes of its shared tensors."""
    lines = [f"{name} {_format_shape(shapes[name])}" for name in sorted(shapes)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def norm(flat: np.ndarray) -> float:
    """2-norm, summed in double precision."""
    return float(np.sqrt(np.sum(np.square(flat, dtype=np.float64))))


def to_npy(flat: np.ndarray) -> bytes:
    """Serialise an array as NPY bytes."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, flat, allow_pickle=False)
    return buffer.getvalue()


def from_npy(data: bytes) -> np.ndarray:
    """Read NPY bytes; the header is believed only if the bytes are all there.

    Raises:
        PayloadError: ``size`` for truncated bytes and for a header that cannot be read, ``dtype`` for
            anything but a vector of the agreed types.
    """
    buffer = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(buffer)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, fortran, dtype = read_header[version](buffer)
    except Exception as error:  # the header is parsed as Python text, which can fail in any way
        raise PayloadError("size", "truncated or malformed array") from error
    if dtype not in DTYPES.values() or len(shape) != 1 or fortran:
        raise PayloadError("dtype", f"array is {dtype} of {len(shape)} dimensions, expected a vector")
    body = memoryview(data)[buffer.tell() :]
    if len(body) != shape[0] * dtype.itemsize:
        raise PayloadError("size", f"array holds {len(body)} bytes, its header promises {shape[0]} values")
    return np.frombuffer(body, dtype=dtype)


def manifest_of(
    shapes: Shapes, dtype: str, flat: np.ndarray, kind: str = "weights", scales: Sequence[float] | None = None
) -> dict[str, Any]:
    """Describe an array in the canonical layout of ``shapes``."""
    names = sorted(shapes)
    scales = [1.0] * len(names) if scales is None else list(scales)
    return {
        "version": VERSION,
        "kind": kind,
        "dtype": dtype,
        "names": names,
        "shapes": [_format_shape(shapes[name]) for name in names],
        "scales": scales,
        "sha256": _sha256(flat, scales),
    }


def _sha256(flat: np.ndarray, scales: Sequence[float]) -> str:
    return hashlib.sha256(flat.tobytes() + np.array(scales, "<f8").tobytes()).hexdigest()


def _check_manifest(manifest: Mapping[str, Any], expected: Shapes) -> None:
    kinds = {
        "version": int, "kind": str, "dtype": str, "names": list, "shapes": list, "scales": list,
        "sha256": str,
    }  # fmt: skip
    if set(manifest) != set(kinds) or any(not isinstance(manifest[k], t) for k, t in kinds.items()):
        raise PayloadError("manifest", f"manifest must hold exactly {sorted(kinds)}")
    if manifest["version"] != VERSION:
        raise PayloadError("manifest", f"manifest version {manifest['version']}, expected {VERSION}")
    if manifest["names"] != sorted(expected):
        odd = sorted(set(map(str, manifest["names"])) ^ set(expected))
        raise PayloadError("names", f"{len(odd)} unknown or missing names, or another order")
    wrong = [n for n, s in zip(sorted(expected), manifest["shapes"], strict=False)
             if s != _format_shape(expected[n])]  # fmt: skip
    if wrong or len(manifest["shapes"]) != len(expected):
        raise PayloadError("shape", f"{wrong[:5]}: not the shapes of this backbone")


def _check_scales(manifest: Mapping[str, Any], tensors: int) -> None:
    scales, free = manifest["scales"], manifest["dtype"] == "int8"
    right = [isinstance(s, float) and 0 < s < math.inf and (free or s == 1) for s in scales]
    if len(scales) != tensors or not all(right):
        raise PayloadError("manifest", f"scales must be {tensors} positive numbers, and 1 unless int8")


def check_finite(flat: np.ndarray) -> None:
    """Refuse NaN and infinity.

    Raises:
        PayloadError: ``nonfinite``.
    """
    if not np.isfinite(flat).all():
        raise PayloadError("nonfinite", f"{int((~np.isfinite(flat)).sum())} values are NaN or infinite")


def _dtype(name: str, known: Mapping[str, np.dtype] = FLOATS) -> np.dtype:
    if name not in known:
        raise PayloadError("dtype", f"{name!r}: must be one of {sorted(known)}")
    return known[name]


def _format_shape(shape: Sequence[int]) -> str:
    return "x".join(str(int(size)) for size in shape)


def parse_shape(text: str) -> tuple[int, ...]:
    """Read a shape of a manifest: "192x1x4x4", "" for a scalar."""
    return tuple(int(size) for size in text.split("x")) if text else ()
