"""What a round must come to: the mean of the answers that count, computed apart from the server."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto

from benchmarks.fault_cases.case import expect
from sparsecontrast import checkpoint, payload


def vector_of(content: RecordDict) -> np.ndarray:
    """The array of an answer [n], as it travelled."""
    return content.array_records["arrays"]["flat"].numpy().copy()


def manifest_of(content: RecordDict) -> dict[str, Any]:
    """The manifest of an answer."""
    return dict(content.config_records["manifest"])


def expect_mean(run: Path, number: int, contents: Sequence[RecordDict]) -> None:
    """Hold a round's weights to the mean of these answers, weighted by their images, in float64.

    Raises:
        BrokenPromiseError: the checkpoint holds something else.
    """
    before, after = (flat_of(run, n) for n in (number - 1, number))
    counts = [int(str(content.metric_records["metrics"]["num-examples"])) for content in contents]
    wanted = np.average(np.stack([_weights(content, before) for content in contents]), 0, counts)
    off = float(np.abs(after - wanted).max())
    expect(off <= 1e-5, f"round {number} is off the mean of the answers that count by {off:.3g}")


def flat_of(run: Path, number: int) -> np.ndarray:
    """A round's global weights as one vector, in the order of their names."""
    tensors = checkpoint.read_round(run, number).tensors
    return np.concatenate([tensors[name].numpy().reshape(-1) for name in sorted(tensors)])


def copy(message: Message) -> Message:
    """Copy a message over its bytes."""
    return message_from_proto(message_to_proto(message))


def _weights(content: RecordDict, before: np.ndarray) -> np.ndarray:
    told, flat = manifest_of(content), vector_of(content).astype(np.float64)
    if told["kind"] == "weights":
        return flat
    sizes = [math.prod(payload.parse_shape(text)) for text in told["shapes"]]
    return before + flat * np.repeat(np.array(told["scales"]), sizes)
