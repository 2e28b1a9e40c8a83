"""Replies that may not be aggregated: each is refused, its sender named, and the round made of the rest.

One of three sites trains honestly and its answer is rewritten on the wire in the second round: behind the
site's own guard, as a site would that had none. The new weights are then held to the mean of the other two
sites' answers, computed here.
"""

import contextlib
import dataclasses
import io
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from benchmarks.fault_cases.answers import copy, expect_mean, manifest_of, vector_of
from benchmarks.fault_cases.case import Case, Found, expect
from benchmarks.fault_cases.wire import Delivery, Trouble, Wire, serve, when_used, whole_rounds, words
from sparsecontrast import payload

SITES, LIAR, ROUND = 3, "hospital_01", 2
QUICK = ("one value is NaN", "one tensor has another name", "the answer of the round before", "cut short")


@dataclasses.dataclass(frozen=True)
class Told:
    """A reply on the wire, to be rewritten in place.

    Attributes:
        content: of the reply.
        before: of the same site, a round earlier.
        other: of another site, in this round; None where it has not answered yet.
    """

    content: RecordDict
    before: RecordDict
    other: RecordDict | None


Lie = Callable[[Told], None]


def _send(content: RecordDict, flat: np.ndarray, **changes: Any) -> None:
    """Put an array in place, with the digest that belongs to it: the lie is to be found, not a slip."""
    manifest = manifest_of(content) | changes
    shapes = dict.fromkeys(manifest["names"], ())  # their number alone is in the digest
    told = payload.manifest_of(shapes, manifest["dtype"], flat, manifest["kind"], manifest["scales"])
    content["arrays"] = ArrayRecord({"flat": Array(flat)})
    content["manifest"] = ConfigRecord(manifest | {"sha256": told["sha256"]})


def _one(value: float) -> Lie:
    def lie(told: Told) -> None:
        flat = vector_of(told.content)
        flat[len(flat) // 2] = value
        _send(told.content, flat)

    return lie


def _times(factor: float) -> Lie:
    def lie(told: Told) -> None:
        _send(told.content, (vector_of(told.content) * factor).astype(np.float32))

    return lie


def _resized(change: int) -> Lie:
    def lie(told: Told) -> None:
        _send(told.content, np.resize(vector_of(told.content), len(vector_of(told.content)) + change))

    return lie


def _cast(kind: str) -> Lie:
    def lie(told: Told) -> None:
        _send(told.content, vector_of(told.content).astype(kind))

    return lie


def _changed(**changes: Any) -> Lie:
    """Change the manifest alone; a function is given the old value."""

    def lie(told: Told) -> None:
        old = manifest_of(told.content)
        made = {key: value(old[key]) if callable(value) else value for key, value in changes.items()}
        _send(told.content, vector_of(told.content), **made)

    return lie


def _status(**changes: Any) -> Lie:
    def lie(told: Told) -> None:
        told.content["status"] = ConfigRecord({**told.content.config_records["status"], **changes})

    return lie


def _examples(count: float) -> Lie:
    def lie(told: Told) -> None:
        metrics = dict(told.content.metric_records["metrics"]) | {"num-examples": count}
        told.content["metrics"] = MetricRecord(metrics)

    return lie


def _bytes(change: Callable[[bytes], bytes]) -> Lie:
    """Rewrite the NPY bytes, and leave all else as it was."""

    def lie(told: Told) -> None:
        old = told.content.array_records["arrays"]["flat"]
        new = Array(old.dtype, old.shape, old.stype, change(old.data))
        told.content["arrays"] = ArrayRecord({"flat": new})

    return lie


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def _promising(data: bytes) -> bytes:
    """Say in the header that there are a thousand million values."""
    length = 10 + int.from_bytes(data[8:10], "little")
    head = re.sub(rb"\(\d+,\)", b"(1000000000,)", data[: length - 1]).rstrip().ljust(length - 1)
    return head + b"\n" + data[length:]


class _Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.path,))


def _pickled(mark: str) -> Lie:
    def lie(told: Told) -> None:
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, np.array([_Bomb(mark)], dtype=object), allow_pickle=True)
        _bytes(lambda _: buffer.getvalue())(told)

    return lie


def _swap(told: Told) -> None:
    for key in list(told.content):
        del told.content[key]
    for key, record in told.before.items():
        told.content[key] = record


def _copied(told: Told) -> None:
    if told.other is None:
        raise RuntimeError("no other site has answered yet")
    told.before.update(dict(told.other))
    _swap(told)


def _second_array(told: Told) -> None:
    flat = vector_of(told.content)
    told.content["arrays"] = ArrayRecord({"flat": Array(flat), "more": Array(flat)})


def _emptied(told: Told) -> None:
    for key in list(told.content):
        del told.content[key]


def _without(key: str) -> Lie:
    def lie(told: Told) -> None:
        del told.content[key]

    return lie


def _scale(value: float) -> Lie:
    return _changed(scales=lambda old: [value, *old[1:]])


# fault -> (how updates travel, what is done, the code under which it must be refused)
LIES: dict[str, tuple[str, Lie, str]] = {
    "one value is NaN": ("weights", _one(math.nan), "payload_nonfinite"),
    "one value is infinite": ("weights", _one(math.inf), "payload_nonfinite"),
    "one value is minus infinite": ("weights", _one(-math.inf), "payload_nonfinite"),
    "all values are NaN": ("weights", _times(math.nan), "payload_nonfinite"),
    "scaled by 1e6": ("weights", _times(1e6), "payload_norm"),
    "scaled by 1e-6": ("weights", _times(1e-6), "payload_norm"),
    "one value is 1e30": ("weights", _one(1e30), "payload_norm"),
    "one tensor has another shape": (
        "weights", _changed(shapes=lambda old: ["7x7", *old[1:]]), "payload_shape",
    ),
    "one shape is missing": ("weights", _changed(shapes=lambda old: old[1:]), "payload_shape"),
    "one tensor has another name": (
        "weights", _changed(names=lambda old: ["backbone.images", *old[1:]]), "payload_names",
    ),
    "two names are swapped": (
        "weights", _changed(names=lambda old: [old[1], old[0], *old[2:]]), "payload_names",
    ),
    "another dtype, float64": ("weights", _cast("<f8"), "payload_dtype"),
    "another dtype, float16": ("weights", _cast("<f2"), "payload_dtype"),
    "another dtype, int32": ("weights", _cast("<i4"), "payload_dtype"),
    "the manifest says fp16": ("weights", _changed(dtype="fp16"), "payload_dtype"),
    "of another version": ("weights", _changed(version=99), "payload_manifest"),
    "an update where weights were asked for": ("weights", _changed(kind="delta"), "payload_manifest"),
    "scaled by its manifest": ("weights", _scale(1e6), "payload_manifest"),
    "one value too few": ("weights", _resized(-1), "payload_size"),
    "ten times too long": ("weights", _resized(10**6), "payload_size"),
    "cut short": ("weights", _bytes(lambda data: data[:-7]), "payload_size"),
    "cut within the header": ("weights", _bytes(lambda data: data[:9]), "payload_size"),
    "no bytes at all": ("weights", _bytes(lambda data: b""), "payload_size"),
    "a header that promises 4 GB": ("weights", _bytes(_promising), "payload_size"),
    "one bit flipped on the way": ("weights", _bytes(_flipped), "payload_manifest"),
    "a second array": ("weights", _second_array, "payload_manifest"),
    "no manifest": ("weights", _without("manifest"), "payload_manifest"),
    "no status": ("weights", _without("status"), "malformed"),
    "nothing in it": ("weights", _emptied, "malformed"),
    "a status that is a path": ("weights", _status(status="error", code="/home/DOE^JANE"), "malformed"),
    "of the round before": ("weights", _status(round=ROUND - 1), "payload_stale"),
    "of the round to come": ("weights", _status(round=ROUND + 1), "payload_stale"),
    "of another run": ("weights", _status(run_key="0" * 32), "payload_stale"),
    "in another site's name": ("weights", _status(site="hospital_00"), "payload_stale"),
    "the answer of the round before": ("weights", _swap, "payload_stale"),
    "the answer of another site": ("weights", _copied, "payload_stale"),
    "minus five images": ("weights", _examples(-5), "payload_weight"),
    "NaN images": ("weights", _examples(math.nan), "payload_weight"),
    "no images told": ("weights", _without("metrics"), "payload_weight"),
    "8 bits: a scale is infinite": ("delta_int8", _scale(math.inf), "payload_manifest"),
    "8 bits: a scale is NaN": ("delta_int8", _scale(math.nan), "payload_manifest"),
    "8 bits: a scale is 1e20": ("delta_int8", _scale(1e20), "payload_norm"),
    "an update scaled by 1e6": ("delta", _times(1e6), "payload_norm"),
}  # fmt: skip
PICKLED = "a pickle in place of the array"


@contextlib.contextmanager
def cases(folder: Path, quick: bool) -> Iterator[list[Case]]:
    """Give the cases; their workers end with the block."""
    chosen = [fault for fault in LIES if not quick or fault in QUICK]
    with when_used(SITES, folder / "server.log") as wire:

        def of(fault: str) -> Case:
            upload, lie, code = LIES[fault]
            return Case("replies", fault, lambda work: refused(wire(), work, upload, lie, code))

        def pickled(work: Path) -> Found:
            mark = work / "unpickled"
            found = refused(wire(), work, "weights", _pickled(str(mark)), "payload_dtype")
            expect(not mark.exists(), "the pickle was loaded")
            return found

        yield [*map(of, chosen), Case("replies", PICKLED, pickled)]


class Lying(Trouble):
    """Rewrites one site's answer of one round."""

    def __init__(self, wire: Wire, lie: Lie):
        self.wire, self.lie, self.held = wire, lie, None

    def deliver(self, site: str, round_number: int, reply: Message) -> list[Delivery]:
        """Let all but the lie pass."""
        if (site, round_number) != (LIAR, ROUND):
            return [(True, reply)]
        arrived = self.wire.arrived
        copies = [copy(arrived[key]) for key in ((LIAR, ROUND - 1), (LIAR, ROUND))]
        other = arrived.get(("hospital_00", ROUND))
        self.lie(Told(copies[1].content, copies[0].content, other and copy(other).content))
        return [(True, copies[1])]


def refused(wire: Wire, folder: Path, upload: str, lie: Lie, code: str) -> Found:
    """Run two rounds with a lie in the second; returns the code under which it was refused."""
    told = words(folder, SITES, "federation.rounds=2", f"federation.upload={upload}")
    rows = serve(wire, told, Lying(wire, lie))
    run = folder / "run"
    (last,) = (row for row in whole_rounds(rows) if row["round"] == ROUND)
    expect(last["refused"] == {LIAR: code}, f"refused: {last['refused']}, should be {LIAR}: {code}")
    honest = sorted(site for site, number in wire.arrived if number == ROUND and site != LIAR)
    expect(last["contributors"] == honest and len(honest) == SITES - 1, f"made of {last['contributors']}")
    expect_mean(run, ROUND, [wire.arrived[site, ROUND].content for site in honest])
    return {"found": code}
