"""The one door for replies: what is not in order never reaches a strategy."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from server.conversation import status_of
from server.strategy import Contribution
from sparsecontrast import payload
from sparsecontrast.deltas import weights_of
from sparsecontrast.errors import FederationError, PayloadError

MOST_METRICS = 64
_METRIC = re.compile(r"[a-z][a-z0-9_-]{0,39}")


class RefusedError(FederationError):
    """A site answered with an error of its own; ``code`` is the one it sent."""

    def __init__(self, code: str):
        super().__init__(f"the site reports {code}")
        self.code = code


@dataclass(frozen=True)
class Expectation:
    """What a reply of this round must be.

    Attributes:
        round_number: the round it was asked for.
        run_key: of this run.
        shapes: of the shared tensors, by name.
        dtype: fp32 or fp16.
        upload: weights, delta or delta_int8.
        reference: [n] fp32, the weights as they were sent out.
        max_norm_ratio: see ``payload.check_norm``.
    """

    round_number: int
    run_key: str
    shapes: Mapping[str, Sequence[int]]
    dtype: str
    upload: str
    reference: np.ndarray
    max_norm_ratio: float


def records_of(packed: payload.Payload) -> dict[str, ArrayRecord | ConfigRecord]:
    """Wrap a payload as the two records of a message."""
    flat = packed.flat
    array = Array(str(flat.dtype), tuple(flat.shape), "numpy.ndarray", payload.to_npy(flat))
    return {"arrays": ArrayRecord({"flat": array}), "manifest": ConfigRecord(dict(packed.manifest))}


def read_reply(site: str, reply: RecordDict, expected: Expectation) -> Contribution:
    """Check a reply from first to last.

    Args:
        site: who was asked.
        reply: what came.
        expected: what it must be.

    Raises:
        RefusedError: the site reports an error.
        PayloadError: ``stale`` for another round, run or site, ``weight`` for a count that is not a
            positive integer, and the reasons of ``deltas.weights_of``.
    """
    name, code = status_of(reply)
    if code:
        raise RefusedError(code)
    status = reply.config_records["status"]
    asked = (site, expected.round_number, expected.run_key)
    if (name, status.get("round"), status.get("run_key")) != asked:
        raise PayloadError("stale", "the reply names another site, round or run")
    flat = _array(reply, expected)
    metrics = _metrics(reply)
    examples = metrics.pop("num-examples", None)
    if not isinstance(examples, int) or isinstance(examples, bool) or examples <= 0:
        raise PayloadError("weight", f"num-examples is {examples!r}, must be a positive integer")
    return Contribution(site, flat, examples, metrics, payload.norm(flat - expected.reference))


def _array(reply: RecordDict, expected: Expectation) -> np.ndarray:
    arrays, manifest = reply.array_records.get("arrays"), reply.config_records.get("manifest")
    if arrays is None or manifest is None or list(arrays) != ["flat"] or len(reply.array_records) != 1:
        raise PayloadError("manifest", "a reply holds one array named flat and its manifest")
    packed = payload.Payload(payload.from_npy(arrays["flat"].data), dict(manifest))
    e = expected
    return weights_of(packed, e.shapes, e.upload, e.dtype, e.reference, e.max_norm_ratio)


def _metrics(reply: RecordDict) -> dict[str, int | float]:
    """Keep a reply's finite scalars with plain names; anything else is dropped unread."""
    record = reply.metric_records.get("metrics", {})
    kept = {
        key: value
        for key, value in record.items()
        if _METRIC.fullmatch(key) and isinstance(value, int | float) and math.isfinite(value)
    }
    return dict(list(kept.items())[:MOST_METRICS])
