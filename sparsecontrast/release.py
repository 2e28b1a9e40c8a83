"""What a site's answer may hold: the last look at tensors, scalars and privacy before they leave.

Nothing here trusts the code that made the answer. It sees the answer as it would go, the weights that
training started from, and what the site itself decided. The words of an answer are in ``statuses.py``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsecontrast import payload
from sparsecontrast.deltas import weights_of
from sparsecontrast.errors import EgressError, PayloadError

COUNTS = ("num-examples", "steps", "state-round")
PLAIN = (*COUNTS, "images", "seconds", "setup-seconds", "loss", "keep", "contrast", "chance_loss", "surprise",
         "distillation", "entropy", "sparsity", "low_resolution", "high_resolution")  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What a site lets out.

    Attributes:
        shapes: of the tensors that may leave, by name; None while no round was asked for.
        reference: the flat weights that the round started from [n]; None likewise.
        max_norm_ratio: the largest factor, up or down, between the norms of weights and reference.
        upload: how the site's configuration sends weights up.
        dtype: fp32 or fp16, of what is not int8.
        target_epsilon: None where the site trains without differential privacy.
        round: of the run; the number of the round that a site's state is of is not above it.
        scalars: what a private round tells, by the ledger's word (``disclosure.py``); None where the ledger
            does not hold this round of this run.
    """

    shapes: payload.Shapes | None = None
    reference: np.ndarray | None = None
    max_norm_ratio: float = 10.0
    upload: str = "weights"
    dtype: str = "fp32"
    target_epsilon: float | None = None
    round: int = 0
    scalars: Mapping[str, float] | None = None


def check_metrics(metrics: Mapping[str, Any], limits: Limits) -> None:
    """Refuse scalars that are not on the list, or would tell what no noise covers.

    Raises:
        EgressError: a foreign or missing name, a value that is no finite number, a private round that the
            ledger does not hold, or an epsilon above the promise.
    """
    private, scalars = limits.target_epsilon is not None, limits.scalars
    if private and scalars is None:
        raise EgressError("a private round that the ledger does not hold")
    foreign = sorted(set(metrics) - ({"state-round", *(scalars or ())} if private else set(PLAIN)))
    if foreign:
        kind = " of a private round" if private else ""
        raise EgressError(f"metrics{kind} hold {foreign[0][:40]!r}, which may not leave")
    odd = [
        k
        for k, v in metrics.items()
        if isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v)
    ]
    if odd:
        raise EgressError(f"metrics.{odd[0]}: not a finite number")
    if private:
        _check_private(metrics, limits)


def _check_private(metrics: Mapping[str, Any], limits: Limits) -> None:
    """Hold the scalars of a private round to what configuration and ledger say: not a bit more may leave."""
    scalars = limits.scalars or {}
    wrong = sorted(name for name, value in scalars.items() if metrics.get(name) != value)
    if wrong:
        raise EgressError(f"metrics.{wrong[0]} is not what configuration and ledger say")
    if scalars["epsilon"] > (limits.target_epsilon or 0.0):
        raise EgressError("metrics.epsilon is above the promise")
    if metrics.get("state-round", 0) not in range(limits.round + 1):
        raise EgressError("metrics.state-round is not a round of this run")


def check_weights(packed: payload.Payload, limits: Limits) -> None:
    """Refuse tensors that are not exactly the shared ones of this round's model, finite and of honest size.

    Raises:
        EgressError: says which check of ``deltas.weights_of`` failed.
    """
    if limits.shapes is None or limits.reference is None:
        raise EgressError("weights, but none were asked for")
    foreign = [name for name in limits.shapes if not name.startswith(payload.SHARED)]
    if foreign:
        raise EgressError(f"{foreign[0]}: may not leave, whatever the method says")
    try:
        weights_of(
            packed, limits.shapes, limits.upload, limits.dtype, limits.reference, limits.max_norm_ratio
        )
    except PayloadError as error:
        raise EgressError(f"weights held back: {error}") from error


def told(packed: payload.Payload) -> dict[str, Any]:
    """Describe verified tensors for the log: names, shapes, norms, bytes and their SHA-256."""
    manifest = packed.manifest
    names: Sequence[str] = manifest["names"]
    shapes: Sequence[str] = manifest["shapes"]
    sizes = [math.prod(payload.parse_shape(text)) for text in shapes]
    scales: Sequence[float] = manifest["scales"]
    parts = np.split(packed.flat, np.cumsum(sizes)[:-1])
    return {
        "tensors": [
            [name, shape, float(f"{scale * payload.norm(part):.6g}")]
            for name, shape, scale, part in zip(names, shapes, scales, parts, strict=True)
        ],
        "kind": manifest["kind"], "dtype": manifest["dtype"], "bytes": packed.flat.nbytes,
        "sha256": manifest["sha256"],
    }  # fmt: skip
