"""Files that are not what they say: malformed DICOM, each quarantined or decoded, and pickles, never loaded.

A hundred files are made, with a seed, from the real ones beside the project. Most are broken by construction
(cut within the pixels, a header that contradicts them); the last are random bytes put into a sound file,
which may hit what nothing depends on. One process reads them all, as a site would: whatever a decoder does,
it must end well, and every file be either in the quarantine with a reason or a finite image of its size.
"""

import contextlib
import itertools
import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.fault_cases import pickles
from benchmarks.fault_cases.case import Case, Found, expect

DICOM = Path("../shared/data/dicom")
SOURCES = (
    "rsna_cxr_mono2_jpeg.dcm", "vlut_04.dcm", "mlut_18.dcm", "dicomdirtests_77654033_CR1_6154",
    "RG3_RLE.dcm", "RG3_J2KI.dcm",
)  # fmt: skip
SHALLOW = SOURCES[:4]  # small: random bytes are put into these
FILES = 100
# of files, in bytes: Latin-1, no encoding at all, and what a table or a command line would take amiss
NAMES = (
    b"M\xfcller.dcm", b"\xff\xfe\x80", b"new\nline", b"carriage\rreturn", b"quo\"t'e,", b"-rf", b" blank ",
    b"nan",
)  # fmt: skip
BYTES = 40  # changed at once in a fuzzed file
PIXELS = b"\xe0\x7f\x10\x00"  # tag (7FE0,0010), little endian
Break = Callable[[bytes], bytes]


def field(element: int, value: int) -> Break:
    """Set a US element of group 0028."""

    def change(data: bytes) -> bytes:
        at = _find(data, b"\x28\x00" + struct.pack("<H", element) + b"US\x02\x00")
        return data[: at + 8] + struct.pack("<H", value) + data[at + 10 :]

    return change


def dropped(element: int) -> Break:
    """Take a US element of group 0028 out."""

    def change(data: bytes) -> bytes:
        at = _find(data, b"\x28\x00" + struct.pack("<H", element) + b"US\x02\x00")
        return data[:at] + data[at + 10 :]

    return change


def cut(share: float) -> Break:
    """End within the pixels."""

    def change(data: bytes) -> bytes:
        at = _find(data, PIXELS) + 12
        return data[: at + int((len(data) - at) * share)]

    return change


def syntax(uid: bytes) -> Break:
    """Claim another transfer syntax, of the same length in bytes or shorter."""

    def change(data: bytes) -> bytes:
        at = _find(data, b"\x02\x00\x10\x00UI")
        size = struct.unpack("<H", data[at + 6 : at + 8])[0]
        return data[: at + 8] + uid[:size].ljust(size, b"\x00") + data[at + 8 + size :]

    return change


def shorter(data: bytes) -> bytes:
    """Say that the pixels are ten bytes."""
    at = _find(data, PIXELS) + 8
    return data[:at] + struct.pack("<I", 10) + data[at + 4 :]


def photometric(data: bytes) -> bytes:
    """Claim a colour space that there is not."""
    return data.replace(b"MONOCHROME", b"CHROMOMONE")


def unmarked(data: bytes) -> bytes:
    """Take the marker away by which DICOM is known."""
    return data[:128] + b"DIKM" + data[132:]


# what breaks a file whatever is in it; the numbers are elements of group 0028
BROKEN: dict[str, Break] = {
    "cut after 1 %": cut(0.01), "cut after 50 %": cut(0.5), "cut after 97 %": cut(0.97),
    "no rows": field(0x10, 0), "rows 65535": field(0x10, 65535), "columns 3": field(0x11, 3),
    "rows missing": dropped(0x10), "columns missing": dropped(0x11),
    "bits allocated 7": field(0x100, 7), "bits allocated 0": field(0x100, 0),
    "bits allocated missing": dropped(0x100), "bits stored 40": field(0x101, 40),
    "9 samples a pixel": field(0x02, 9), "photometric interpretation unknown": photometric,
    "transfer syntax unknown": syntax(b"1.2.840.9.9.9"),
    "transfer syntax of RLE or JPEG 2000": lambda data: syntax(
        b"1.2.840.10008.1.2.4.90" if b"1.2.840.10008.1.2.5\x00" in data[:600] else b"1.2.840.10008.1.2.5"
    )(data),
    "pixels of ten bytes": shorter, "no marker": unmarked,
}  # fmt: skip


@contextlib.contextmanager
def cases(folder: Path, quick: bool) -> Iterator[list[Case]]:
    """Give the cases."""
    count = 12 if quick else FILES
    yield [
        Case("inputs", f"{count} DICOM files that are broken", lambda work: broken(work, count)),
        Case("inputs", f"{count} DICOM files with random bytes", lambda work: fuzzed(work, count)),
        Case("inputs", f"{2 * len(NAMES)} files with odd names", named),
        *pickles.cases(),
    ]


def broken(folder: Path, count: int) -> Found:
    """Each kind of damage to each source, as far as ``count`` goes: none may pass for an image."""
    ways = [(kind, source) for kind in BROKEN for source in SOURCES]
    random.Random(0).shuffle(ways)
    made = {f"{kind}, {source}": BROKEN[kind]((DICOM / source).read_bytes()) for kind, source in ways[:count]}
    quarantined, decoded = read(folder, made)
    expect(not decoded, f"taken for sound: {decoded}")
    return {"found": f"{len(quarantined)} of {count} quarantined, each with its reason"}


def fuzzed(folder: Path, count: int) -> Found:
    """Random bytes may hit what nothing depends on: what is decoded is finite and as its header says."""
    draw = random.Random(1)
    made = {
        f"{number}, {source}": fuzz((DICOM / source).read_bytes(), draw)
        for number, source in zip(range(count), itertools.cycle(SHALLOW), strict=False)
    }
    quarantined, decoded = read(folder, made)
    return {"found": f"{len(quarantined)} quarantined with a reason, {len(decoded)} decoded, finite, in size"}


def named(folder: Path) -> Found:
    """Names alone break nothing: sound files are decoded, and no image is quarantined, each by its name."""
    films = folder / "films"
    films.mkdir()
    for name in NAMES:
        (films / os.fsdecode(name)).write_bytes((DICOM / SOURCES[0]).read_bytes())
        (films / os.fsdecode(b"no image" + name)).write_bytes(b"<html>502</html>")
    for time in ("first", "second, from the index that was kept"):
        found = loaded(folder)
        expect(sorted(found["decoded"]) == sorted(map(os.fsdecode, NAMES)), f"{time}: {found}")
        expect(len(found["quarantined"]) == len(NAMES), f"{time}: {found['quarantined']}")
        expect(all(found["quarantined"].values()), f"{time}: a file is in quarantine without a reason")
    return {"found": f"{len(NAMES)} decoded, {len(NAMES)} quarantined, twice: the kept index opens them too"}


def fuzz(data: bytes, draw: random.Random) -> bytes:
    """Put random bytes into the header, or anywhere."""
    end = min(_find(data, PIXELS) + 12, len(data)) if draw.random() < 0.7 else len(data)
    changed = bytearray(data)
    for _ in range(BYTES):
        changed[draw.randrange(132, end)] = draw.randrange(256)
    return bytes(changed)


def read(folder: Path, made: dict[str, bytes]) -> tuple[list[str], list[str]]:
    """Load files in a process of its own, a sound one among them, and account for every one.

    Returns:
        What was done to the files that were quarantined, and to those that were decoded.
    """
    (folder / "films").mkdir()
    told = {f"{number:03d}": what for number, what in enumerate(made)}
    for name, what in told.items():
        (folder / "films" / name).write_bytes(made[what])
    (folder / "films" / "sound").write_bytes((DICOM / SOURCES[0]).read_bytes())
    found = loaded(folder)
    quarantined, decoded = found["quarantined"], found["decoded"]
    expect("sound" in decoded, "the sound file is lost")
    lost = sorted(set(told) - set(quarantined) - set(decoded))
    expect(not lost, f"lost: {[told[name] for name in lost]}")
    expect(all(quarantined.values()), "a file is in quarantine without a reason")
    expect(not found["odd"], f"decoded to what the header does not say: {[told[n] for n in found['odd']]}")
    return [told[name] for name in quarantined], [told[name] for name in decoded if name in told]


def loaded(folder: Path) -> dict[str, Any]:
    """Load ``folder/films`` in a process of its own; what it found."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.fault_cases.reading", str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    expect(done.returncode == 0, f"reading ended with {done.returncode}: {done.stderr[-250:]}")
    return json.loads((folder / "found.json").read_text())


def _find(data: bytes, what: bytes) -> int:
    at = data.find(what)
    if at < 0:
        raise ValueError(f"no element {what.hex()} in this file")
    return at
