"""What a site sends up: its weights, or how they differ from those the round sent out, as 8-bit numbers too.

An update is small beside the weights, so eight bits a number tell it well: one scale a tensor, values in
-127..127, and what rounding leaves behind is added to the site's next update (error feedback: Seide et
al., 1-Bit SGD, Interspeech 2014; Karimireddy et al., arXiv 1901.09847, algorithm 2), so that over the
rounds nothing is lost. Both sides count from the weights as they were sent, in ``federation.payload_dtype``.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from sparsecontrast import payload
from sparsecontrast.errors import PayloadError
from sparsecontrast.payload import Payload, Shapes

UPLOADS = ("weights", "delta", "delta_int8")
LEVELS = 127


def pack_upload(
    tensors: Mapping[str, Tensor],
    allowed: Sequence[str],
    upload: str,
    dtype: str,
    reference: np.ndarray,
    residual: np.ndarray | None = None,
) -> tuple[Payload, np.ndarray | None]:
    """Pack exactly the allowed tensors for the way up.

    Args:
        tensors: by name, trained.
        allowed: the method's ``shared_parameters()``.
        upload: weights, delta or delta_int8.
        dtype: fp32 or fp16, of what is not int8.
        reference: [n] fp32, the weights that the round sent out.
        residual: [n] fp32, what rounding left of the site's update before this one; None for nothing.

    Returns:
        The payload, and what rounding left this time; None where nothing is fed back.

    Raises:
        PayloadError: as ``payload.pack``; ``size`` for a reference or a residual of another length.
    """
    if upload == "weights":
        return payload.pack(tensors, allowed, dtype), None
    flat = payload.pack(tensors, allowed, "fp32").flat
    shapes = {name: tuple(tensors[name].shape) for name in allowed}
    for other in (reference, residual):
        if other is not None and other.shape != flat.shape:
            raise PayloadError("size", f"{other.shape} numbers to count from, expected {flat.shape}")
    update = flat - reference
    if upload == "delta":
        cast = payload.repack(update, shapes, dtype)
        return Payload(cast.flat, payload.manifest_of(shapes, dtype, cast.flat, "delta")), None
    wanted = update if residual is None else update + residual
    rounded, scales = quantise(wanted, _sizes(shapes))
    manifest = payload.manifest_of(shapes, "int8", rounded, "delta", scales)
    return Payload(rounded, manifest), wanted - _dequantise(rounded, scales, _sizes(shapes))


def weights_of(
    packed: Payload, expected: Shapes, upload: str, dtype: str, reference: np.ndarray, max_norm_ratio: float
) -> np.ndarray:
    """Check what a site sent up and return the weights [n], fp32, that it stands for.

    Args:
        packed: what arrived.
        expected: shapes by name of the receiver's own shared tensors.
        upload: weights, delta or delta_int8: how it had to be sent.
        dtype: fp32 or fp16, of what is not int8.
        reference: [n] fp32, the weights that the round sent out.
        max_norm_ratio: the largest factor, up or down, between the norms of weights and reference.

    Raises:
        PayloadError: the reasons of ``payload.verify`` and of ``payload.check_norm``.
    """
    kind = "weights" if upload == "weights" else "delta"
    payload.verify(packed, expected, "int8" if upload == "delta_int8" else dtype, kind)
    flat = packed.flat.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # found just below
        if upload == "delta_int8":
            flat = _dequantise(packed.flat, packed.manifest["scales"], _sizes(expected))
        if kind == "delta":
            flat = reference + flat
    payload.check_finite(flat)
    payload.check_norm(flat, reference, max_norm_ratio)
    return flat


def quantise(flat: np.ndarray, sizes: Sequence[int]) -> tuple[np.ndarray, list[float]]:
    """Round [n] to int8, each tensor by a scale of its own: the largest magnitude becomes 127."""
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    largest = [float(np.abs(part).max(initial=0.0)) for part in parts]
    # below the smallest normal number a scale would divide by zero: such a tensor is zeros
    scales = [top / LEVELS if top / LEVELS > np.finfo(np.float32).tiny else 1.0 for top in largest]
    rounded = [
        np.rint(part / np.float32(s)).clip(-LEVELS, LEVELS) for part, s in zip(parts, scales, strict=True)
    ]
    return np.concatenate(rounded).astype(np.int8), scales


def _dequantise(rounded: np.ndarray, scales: Sequence[float], sizes: Sequence[int]) -> np.ndarray:
    return rounded.astype(np.float32) * np.repeat(np.array(scales, np.float32), sizes)


def _sizes(shapes: Shapes) -> list[int]:
    return [int(np.prod(shapes[name], dtype=np.int64)) for name in sorted(shapes)]
