"""Free text, wherever an app may put it into an answer, stays at the site; what leaves is written anew."""

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.clientapp import ClientApp

from client.app import hello
from client.guard import guard
from server.conversation import ask
from sparsecontrast import errors, payload
from sparsecontrast.errors import CODES, EgressError, PayloadError, SparseContrastError, code_of
from sparsecontrast.statuses import Known, own_version, rebuilt
from tests.federations import MODEL, DirectGrid, serve
from tests.test_guard import liar, site, told
from tests.test_leaves import messages

PHI = "DOE JANE 19311224"
MARK = "0f" * 32
GREETING = {"status": "ok", "version": own_version(), "sites": ["x"], "fingerprint": MARK}
TRAINED = {"status": "ok", "site": "x", "round": 1, "run_key": "ab" * 8}
ERROR = {"status": "error", "code": "site_empty", "site": "x"}
FIELDS = ("status", "site", "round", "run_key", "code", "version", "sites", "fingerprint", "idle")
KNOWN = Known(("x",), 1, "ab" * 8)


def array(content: Any, **more):
    told = content["arrays"]["flat"]
    kept = {"dtype": told.dtype, "shape": told.shape, "stype": told.stype, "data": told.data}
    content["arrays"] = ArrayRecord({"flat": Array(**(kept | more))})


def comment(content: Any):
    """Put a text behind the header of the NPY bytes, as a comment that numpy reads over."""
    data = content["arrays"]["flat"].data
    length = int.from_bytes(data[8:10], "little")
    head = data[10 : 10 + length].rstrip() + b"#" + PHI.encode()
    head = head.ljust((len(head) // 64 + 1) * 64 - 11) + b"\n"
    array(content, data=data[:8] + len(head).to_bytes(2, "little") + head + data[10 + length :])


HIDDEN = {
    "stype": lambda c: array(c, stype=PHI),
    "dtype": lambda c: array(c, dtype=PHI),
    "shape": lambda c: array(c, shape=(19311224,)),
    "a comment in the header": comment,
}


def test_nothing_around_the_numbers_of_an_array_leaves(tmp_path):
    """One app with all of it, and the numbers arrive as they were."""
    seen = []

    def hide(content):
        seen.append(content["arrays"]["flat"].numpy().copy())
        for change in HIDDEN.values():
            change(content)

    grid = serve([site(tmp_path)], told(tmp_path), liar(hide))
    assert not [data for data in grid.sent if PHI.encode() in data or b"19311224" in data]
    (content,) = [m.content for m in messages(grid.sent) if m.content.array_records]
    left = content.array_records["arrays"]["flat"]
    assert (left.dtype, left.stype, left.shape) == ("float32", "numpy.ndarray", (len(seen[0]),))
    assert left.data == payload.to_npy(seen[0])


@pytest.mark.parametrize("hide", HIDDEN.values(), ids=HIDDEN)
def test_each_of_these_places_holds_a_text_that_numpy_reads_over(hide):
    content = RecordDict({"arrays": ArrayRecord({"flat": Array(np.zeros(3, np.float32))})})
    hide(content)
    found = payload.from_npy(content.array_records["arrays"]["flat"].data)
    assert np.array_equal(found, np.zeros(3, np.float32))


@pytest.mark.parametrize("honest", [GREETING, TRAINED, ERROR], ids=["hello", "train", "error"])
@pytest.mark.parametrize("key", FIELDS)
@pytest.mark.parametrize("text", [PHI, [PHI], "ab" * 33])
def test_no_field_of_a_status_can_hold_another_text(honest, key, text):
    kind = "hello" if honest is GREETING else "train"
    assert rebuilt(kind, honest, KNOWN) == honest
    with pytest.raises(EgressError) as refused:
        rebuilt(kind, {**honest, key: text}, KNOWN)
    assert PHI not in str(refused.value)


def test_who_serves_no_site_or_fails_before_it_knows_says_no_name():
    idle = {"status": "ok", "version": own_version(), "idle": True}
    assert rebuilt("hello", idle, Known(())) == idle
    assert rebuilt("train", {**ERROR, "site": ""}, KNOWN) == {**ERROR, "site": ""}
    for kind, status, known in (
        ("train", idle, Known(())),
        ("other", GREETING, KNOWN),
        ("train", GREETING, KNOWN),
    ):
        with pytest.raises(EgressError):
            rebuilt(kind, status, known)


def test_a_status_of_the_apps_own_is_held_back_and_nothing_of_its_message_passes(tmp_path):
    """An app that answers a greeting with a text, in each place of the message around it too."""
    app = ClientApp(mods=[guard])

    @app.query("hello")
    def greet(message, context):
        reply = hello(message, context)
        record = {**reply.content["status"], "version": PHI}
        reply.content["status"] = ConfigRecord(record)
        reply.metadata.__dict__["_group_id"] = PHI
        return reply

    grid = DirectGrid([site(tmp_path)], app)
    letter = RecordDict({"config": ConfigRecord({"overrides": " ".join(MODEL)})})
    status = dict(ask(grid, {"x": (10, letter)}, "query.hello", 60, "h").replies["x"]["status"])
    assert status == {"status": "error", "code": "egress", "site": "x"}
    assert PHI.encode() not in grid.sent[0]


def test_the_codes_that_may_travel_are_a_closed_set():
    class OwnError(SparseContrastError):
        code = "doe_jane"

    assert code_of(OwnError("x")) == code_of(PayloadError("doe_jane", "x")) == "internal"
    assert code_of(PayloadError("stale", "x")) == "payload_stale" and code_of(errors.HeldError("x")) == "held"
    assert "doe_jane" not in CODES and {"internal", "config", "override_refused", "payload_norm"} <= CODES
