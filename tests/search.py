"""Planted words that must not leave a site, and the search that finds them however they are written."""

import base64
import binascii
import contextlib
import functools
import hashlib
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

DEPTH = 3  # a compressed text in base64 in a compressed body
START = 3  # bytes by which a pattern is looked up
MOST, PIECE = 1 << 26, 256  # bytes of one stream that are read, and at a time
_STREAMS = ((re.compile(rb"\x78[\x01\x5e\x9c\xda]"), 15), (re.compile(rb"\x1f\x8b\x08"), 31))
_ZIP = re.compile(rb"PK\x03\x04")
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{16,}")
_HEX = re.compile(rb"(?:[0-9A-Fa-f]{2}){12,}")


@dataclass(frozen=True)
class Canary:
    """A word that stands in one place of a site alone.

    Attributes:
        place: where, in words.
        token: what is searched for; letters or digits, so that no way to quote a text changes it.
    """

    place: str
    token: str


def canary(place: str, digits: bool = False) -> Canary:
    """Make the word of a place: always the same, and of no language."""
    letters = b"0123456789" if digits else b"bcdfghjklmnpqrstvwxz"
    drawn = hashlib.sha256(f"canary of {place}".encode()).digest()
    token = bytes(letters[byte % len(letters)] for byte in drawn[:14]).decode()
    return Canary(place, token if digits else token.capitalize())


@functools.cache
def forms(token: str) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Ways to write a word: in lower case those in which case does not matter, and those in which it does."""
    low = token.lower()
    any_case = {
        "plain": low.encode(),
        "utf-16": low.encode("utf-16-le"),
        "utf-16 from the big end": low.encode("utf-16-be"),
        "backwards": low[::-1].encode(),
    }
    exact: dict[str, bytes] = {}
    for spelling in {token, low, token.upper()}:
        data = spelling.encode()
        any_case[f"hex of {spelling}"] = data.hex().encode()
        any_case[f"url of {spelling}"] = "".join(f"%{byte:02x}" for byte in data).encode()
        any_case[f"json of {spelling}"] = "".join(f"\\u{byte:04x}" for byte in data).encode()
        for shift in range(3):
            text = base64.b64encode(b"\0" * shift + data)
            whole = text[-(-shift * 8 // 6) : (shift + len(data)) * 8 // 6]
            exact[f"base64, shifted by {shift}, of {spelling}"] = whole
            exact[f"url-safe base64, shifted by {shift}, of {spelling}"] = whole.translate(_SAFE)
        for name in ("md5", "sha1", "sha256"):  # without a key, whoever guesses a name can prove it
            exact[f"{name} of {spelling}"] = hashlib.new(name, data).digest()
            any_case[f"{name} of {spelling} in hex"] = hashlib.new(name, data).hexdigest().encode()
    return any_case, exact


def found(canaries: Sequence[Canary], data: bytes) -> list[str]:
    """Say which words stand in ``data``, and how they are written; also below compression, base64 and hex."""
    any_case, exact = {}, {}
    for one in canaries:
        ways = forms(one.token)
        any_case |= {pattern: f"{one.place}: {way}" for way, pattern in ways[0].items()}
        exact |= {pattern: f"{one.place}: {way}" for way, pattern in ways[1].items()}
    told: dict[str, None] = {}
    for depth, layer in enumerate(layers(data)):
        for line in (*_met(any_case, layer.lower()), *_met(exact, layer)):
            told[line + ", wrapped" * bool(depth)] = None
    return list(told)


def _met(patterns: dict[bytes, str], data: bytes) -> Iterator[str]:
    """Yield what ``patterns`` says of those that stand in ``data``, by way of their first three bytes."""
    if len(data) < START:
        return
    starts: dict[bytes, list[bytes]] = {}
    for pattern in patterns:
        starts.setdefault(pattern[:START], []).append(pattern)
    table = np.zeros(1 << 8 * START, dtype=bool)
    table[[int.from_bytes(start, "little") for start in starts]] = True
    codes = np.frombuffer(data, dtype=np.uint8).astype(np.int32)
    places = np.flatnonzero(table[codes[:-2] | codes[1:-1] << 8 | codes[2:] << 16])
    for place in places.tolist():
        for pattern in starts[data[place : place + START]]:
            if data.startswith(pattern, place):
                yield patterns[pattern]


def layers(data: bytes) -> Iterator[bytes]:
    """Yield ``data``, then what is found in it by undoing one more wrapping each time."""
    for _ in range(DEPTH):
        yield data
        data = b"\n".join(_unwrapped(data))
        if not data:
            return
    yield data


def _unwrapped(data: bytes) -> Iterator[bytes]:
    for start, bits in _STREAMS:
        for hit in start.finditer(data):
            yield _inflated(data, hit.start(), bits)
    for hit in _ZIP.finditer(data):  # a member's head is 30 bytes, its name and its extra field
        head = data[hit.start() : hit.start() + 30]
        if len(head) == 30:
            name, extra = int.from_bytes(head[26:28], "little"), int.from_bytes(head[28:30], "little")
            yield _inflated(data, hit.start() + 30 + name + extra, -15)
    for hit in _BASE64.finditer(data):
        run = hit[0].translate(_PLAIN)
        for start in range(4):  # what stands before it may look like a part of it
            part = run[start : len(run) - ((len(run) - start) % 4 == 1)]
            yield base64.b64decode(part + b"=" * (-len(part) % 4))
    for hit in _HEX.finditer(data):
        yield binascii.unhexlify(hit[0])


def _inflated(data: bytes, start: int, bits: int) -> bytes:
    """Undo one compressed stream as far as it goes; nothing where there is none."""
    stream, whole = zlib.decompressobj(bits), bytearray()
    with contextlib.suppress(zlib.error):
        for place in range(start, len(data), PIECE):
            whole += stream.decompress(data[place : place + PIECE])
            if stream.eof or len(whole) > MOST:
                break
    return bytes(whole)


_SAFE, _PLAIN = bytes.maketrans(b"+/", b"-_"), bytes.maketrans(b"-_", b"+/")
