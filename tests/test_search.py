"""The search for planted words sees each way of writing one, wrapped and cut, and sees none in noise."""

import base64
import gzip
import hashlib
import io
import json
import urllib.parse
import zipfile
import zlib

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.common import constant
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from tests.search import canary, forms, found
from tests.wiretap import Message, messages, objects

ONE, OTHER, NUMBER = canary("one"), canary("other"), canary("number", digits=True)
TEXT = f"/data/{ONE.token}^Jane/scan.dcm".encode()
NOISE = np.random.Generator(np.random.PCG64(7)).bytes(100_000)


def zipped(data):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a name", data)
    return file.getvalue()


WAYS = {
    "plain": TEXT,
    "upper case": TEXT.upper(),
    "lower case": TEXT.lower(),
    "utf-16": TEXT.decode().encode("utf-16"),
    "utf-16 big": TEXT.decode().encode("utf-16-be"),
    "hex": TEXT.hex().encode(),
    "upper hex": TEXT.hex().upper().encode(),
    "url": "".join(f"%{byte:02X}" for byte in TEXT).encode(),
    "quoted": urllib.parse.quote(TEXT.decode()).encode(),
    "json": "".join(f"\\u{byte:04x}" for byte in TEXT).encode(),
    "repr": repr(TEXT).encode(),
    "backwards": TEXT[::-1],
    **{f"base64 at {i}": base64.b64encode(b"." * i + TEXT) for i in range(3)},
    **{f"url-safe base64 at {i}": base64.urlsafe_b64encode(b"\xff" * i + TEXT) for i in range(3)},
    "base64 behind letters": b"ab" + base64.b64encode(TEXT),
    "zlib": zlib.compress(TEXT),
    "fast zlib": zlib.compress(TEXT, 1),
    "best zlib": zlib.compress(TEXT, 9),
    "gzip": gzip.compress(TEXT),
    "zip": zipped(TEXT),
    "base64 of gzip": base64.b64encode(gzip.compress(TEXT)),
    "gzip of base64": gzip.compress(base64.b64encode(TEXT)),
    "gzip of base64 of zlib": gzip.compress(base64.b64encode(zlib.compress(TEXT.decode().encode("utf-16")))),
    "hex of zlib": zlib.compress(TEXT).hex().encode(),
    "json of json": json.dumps(json.dumps({"path": TEXT.decode()})).encode(),
    "md5": hashlib.md5(ONE.token.encode()).hexdigest().encode(),
    "sha256": hashlib.sha256(ONE.token.lower().encode()).digest(),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_word_is_found_however_it_is_written(way):
    for place in (0, 50_001):
        told = found([OTHER, ONE, NUMBER], NOISE[:place] + b"\n" + WAYS[way] + b"\n" + NOISE[place:])
        assert told and all(line.startswith("one: ") for line in told)


def test_nothing_is_found_where_there_is_nothing():
    assert len({one.token.lower() for one in map(canary, "abcdefghij")}) == 10
    assert found([ONE, OTHER, NUMBER], NOISE) == []
    assert found([OTHER, NUMBER], b"".join(WAYS.values())) == []
    assert found([NUMBER], f"1.2.3.{NUMBER.token}".encode()) == ["number: plain"]


def test_no_way_of_writing_is_short_enough_to_be_met_by_chance():
    any_case, exact = forms(ONE.token)
    assert min(map(len, [*any_case.values(), *exact.values()])) >= 14


def request(body, *headers):
    lines = [b"POST /v1/fleet/push-object HTTP/1.1", b"Host: x", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def test_bodies_are_joined_and_decoded():
    half = len(TEXT) // 2
    cut = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (TEXT[:half], TEXT[half:], b""))
    coded = gzip.compress(TEXT)
    stream = (
        request(cut, b"Transfer-Encoding: chunked")
        + request(TEXT, b"Content-Length: %d" % len(TEXT))
        + request(coded, b"content-encoding: gzip", b"content-length: %d" % len(coded))
        + request(b"")
    )
    assert [one.body for one in messages(stream)] == [TEXT, TEXT, TEXT, b""]
    assert {one.path for one in messages(stream)} == {"/v1/fleet/push-object"}


@pytest.mark.parametrize(
    "stream",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01 a handshake",
        request(TEXT, b"Content-Length: 999"),
        request(b"20\r\n" + TEXT, b"Transfer-Encoding: chunked"),
        request(TEXT, b"Content-Length: %d" % len(TEXT), b"Content-Encoding: br"),
    ],
)
def test_a_wire_that_cannot_be_read_is_an_error_and_not_a_silent_one(stream):
    with pytest.raises(ValueError, match=r"HTTP/1.1|cut off|cannot be read"):
        messages(stream)


def test_a_word_that_flower_cuts_in_two_is_put_together(monkeypatch):
    from flwr.app.message import array

    monkeypatch.setattr(array, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", 4096)
    assert constant.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE > 4096
    data = NOISE[:4090] + ONE.token.encode() + NOISE[:9000]
    content = RecordDict({"a": ArrayRecord({"x": Array("uint8", (len(data),), "numpy.ndarray", data)})})
    parts = [(name, one.deflate()) for name, one in get_all_nested_objects(content).items()]
    assert len(parts) == 7 and not any(found([ONE], part) for _, part in parts)
    assert data in objects(parts)
    assert found([ONE], b"\n".join(objects(parts))) == ["one: plain"]
    assert Message(b"POST /x HTTP/1.1", b"").path == "/x"
