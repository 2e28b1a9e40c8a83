"""Decode once: a verified, memory-mapped array of square uint8 images.

A cache folder holds

    lock                     one builder at a time
    pixels-<key>/            complete and immutable; exists under this name only when whole
        pixels.u8            the images, one after the other
        header.json          what they are, and checksums of both files
    building-<pid>-<random>/ a build under way, or what a killed one left; the next builder removes it

The key is a digest of the side in pixels, of the code that decodes, and of every row's identity: path,
size and mtime of a file; the path alone of a phantom. A changed file thus asks for another key. At
every open both checksums are computed again (50 ms for 100 MB); what does not match is rebuilt.
A build copies from other stores of the folder whatever rows it can, and then removes those stores
whose every image it holds itself. The folder can be deleted at any time.
"""

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import secrets
import shutil
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsecontrast.data.decode import Decoded, Reader, Task, decode_all, read_pixels
from sparsecontrast.durable import sync_folder
from sparsecontrast.errors import DataError, StorageError
from sparsecontrast.progress import track

FORMAT = 1
# Every other file of this folder may have a say in what a decoded pixel is.
NOT_PIXELS = {
    "__init__", "cache", "csv_files", "dataset", "filters", "index", "labels", "progress", "pseudonyms",
    "recipe", "sites", "splits", "store", "tables", "transforms",
}  # fmt: skip


@dataclass(frozen=True)
class Store:
    """Decoded tasks.

    Attributes:
        images: uint8 [N, S, S], a copy-on-write memory map.
        kept: int [N], the task of each image, rising.
        shapes: int [N, 2], (height, width) before the fit.
        failures: (task, reason) of each task that could not be decoded.
    """

    images: np.ndarray
    kept: np.ndarray
    shapes: np.ndarray
    failures: list[tuple[int, str]]


def open_pixels(
    tasks: Sequence[Task],
    size: int,
    cache_dir: Path,
    reader: Reader = read_pixels,
    workers: int | None = None,
    shown: bool = False,
) -> Store:
    """Open the store of these tasks; build it first when it is not there, torn or stale.

    Safe with several processes at once: one builds, the others wait and then open.

    Raises:
        StorageError: the folder cannot be written.
    """
    source = _code_digest(reader)
    identities = [_identity(task) for task in tasks]
    key = _digest([FORMAT, size, source, *identities])
    folder = cache_dir / f"pixels-{key}"
    store = _open(folder, key)
    if store is not None:
        return store
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        # A worker that is still importing the caller's script would wait for its own parent.
        raise DataError("call load_dataset under `if __name__ == '__main__':`")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _lock(cache_dir / "lock", shown):
            store = _open(folder, key)  # another process may have built it meanwhile
            if store is None:
                donors = _donors(cache_dir, size, source)
                work = _Build(tasks, identities, size, reader, workers, shown, donors)
                _publish(work, cache_dir, folder, key, source)
                _prune(cache_dir, folder, donors, identities)
                store = _open(folder, key)
    except OSError as error:
        raise StorageError(
            f"cache folder {cache_dir} cannot be written ({error.strerror}); free space or set data.cache_dir"
        ) from error
    if store is None:
        raise StorageError(f"cache folder {cache_dir}: what was written reads back differently")
    return store


@dataclass(frozen=True)
class _Donor:
    """Another whole store: where it lies, its images, and which row holds which identity."""

    folder: Path
    images: np.ndarray
    rows: dict[str, int]
    shapes: np.ndarray
    everything: list[str]


@dataclass(frozen=True)
class _Build:
    """What to decode or copy, task by task."""

    tasks: Sequence[Task]
    identities: list[str]
    size: int
    reader: Reader
    workers: int | None
    shown: bool
    donors: list[_Donor]

    def results(self) -> Iterator[Decoded]:
        """Yield every task's result in order, copied where a donor has it."""
        found = [self._copied(identity) for identity in self.identities]
        missing = [task for task, donor in zip(self.tasks, found, strict=True) if donor is None]
        fresh = decode_all(missing, self.size, self.reader, self.workers)
        fresh = track(fresh, len(missing), "decoding images", self.shown)
        for donor in found:
            if donor is None:
                yield next(fresh)
            else:
                images, row, shape = donor
                yield Decoded(images[row], shape[0], shape[1])
        next(fresh, None)  # lets the bar end

    def _copied(self, identity: str) -> tuple[np.ndarray, int, list[int]] | None:
        for donor in self.donors:
            if identity in donor.rows:
                row = donor.rows[identity]
                return donor.images, row, donor.shapes[row].tolist()
        return None


def _publish(work: _Build, cache_dir: Path, folder: Path, key: str, source: str) -> None:
    """Build in a folder of its own, make it durable, then give it its name."""
    for leftover in cache_dir.glob("building-*"):  # we hold the lock: nobody is at work there
        shutil.rmtree(leftover, ignore_errors=True)
    building = cache_dir / f"building-{os.getpid()}-{secrets.token_hex(4)}"
    building.mkdir()
    try:
        body = {"format": FORMAT, "key": key, "size": work.size, "source": source}
        body |= {"identities": work.identities, **_write_pixels(work, building / "pixels.u8")}
        _write_synced(building / "header.json", json.dumps({"body": body, "sha256": _digest(body)}).encode())
        if folder.exists():  # under this key, and it did not verify
            shutil.rmtree(folder)
        building.rename(folder)
        sync_folder(cache_dir)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _write_pixels(work: _Build, path: Path) -> dict[str, Any]:
    """Write images one after the other; plain writes, so that a full disk is an error, not a signal."""
    kept, shapes, failures, checksum = [], [], [], 0
    with path.open("wb") as file:
        for number, result in enumerate(work.results()):
            if result.pixels is None:
                failures.append([number, result.reason])
                continue
            data = np.ascontiguousarray(result.pixels)
            checksum = zlib.crc32(data.data, checksum)
            file.write(data.data)
            kept.append(number)
            shapes.append([result.height, result.width])
        file.flush()
        os.fsync(file.fileno())
    return {"crc32": checksum, "kept": kept, "shapes": shapes, "failures": failures}


def _read_header(folder: Path) -> dict[str, Any] | None:
    try:
        header = json.loads((folder / "header.json").read_bytes())
        return header["body"] if header["sha256"] == _digest(header["body"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _open(folder: Path, key: str) -> Store | None:
    """Open a store and verify all of it; None when it is missing, torn or not of this key."""
    body = _read_header(folder)
    if body is None or body["key"] != key or body["format"] != FORMAT:
        return None
    count, size = len(body["kept"]), body["size"]
    shape = (count, size, size)
    try:
        if (folder / "pixels.u8").stat().st_size != np.prod(shape):
            return None
        if count == 0:
            images = np.zeros(shape, dtype=np.uint8)
        else:
            images = np.memmap(folder / "pixels.u8", dtype=np.uint8, mode="c", shape=shape)
    except OSError:
        return None
    if zlib.crc32(images.data) != body["crc32"]:
        return None
    shapes = np.array(body["shapes"], dtype=np.int64).reshape(-1, 2)
    failures = [(number, reason) for number, reason in body["failures"]]
    return Store(images, np.array(body["kept"], dtype=np.int64), shapes, failures)


def _donors(cache_dir: Path, size: int, source: str) -> list[_Donor]:
    """Whole stores of the same side, decoded by the same code."""
    donors = []
    for folder in sorted(cache_dir.glob("pixels-*")):
        body = _read_header(folder)
        if body is None or (body["size"], body["source"]) != (size, source):
            continue
        store = _open(folder, body["key"])
        if store is not None:
            names = body["identities"]
            rows = {names[task]: row for row, task in enumerate(store.kept.tolist())}
            donors.append(_Donor(folder, store.images, rows, store.shapes, names))
    return donors


def _prune(cache_dir: Path, folder: Path, donors: list[_Donor], identities: list[str]) -> None:
    """Remove stores that hold nothing but older or equal versions of the images just stored.

    A process that has one mapped keeps its pixels: the system frees them when it is done.
    """
    present = {_name(identity) for identity in identities}
    for donor in donors:
        if donor.folder != folder and present.issuperset(map(_name, donor.everything)):
            shutil.rmtree(donor.folder, ignore_errors=True)


def _identity(task: Task) -> str:
    """``<who>:<which version>``: a digest of path and scanner, and the file's size and mtime."""
    version = ""
    if not task.path.startswith("phantom:"):
        try:
            state = os.stat(task.path)
            version = f"{state.st_size}-{state.st_mtime_ns}"
        except OSError:
            version = "missing"
    name = f"{task.path}\n{task.scanner}\n{task.seed}".encode(errors="surrogateescape")
    return f"{hashlib.sha256(name).hexdigest()[:32]}:{version}"


def _name(identity: str) -> str:
    return identity.partition(":")[0]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()[:32]


def _code_digest(reader: Reader) -> str:
    """Digest of the code behind a pixel: a cache of another version of it is stale."""
    files = sorted(p for p in Path(__file__).parent.glob("*.py") if p.stem not in NOT_PIXELS)
    sources = [p.read_text() for p in files]
    return _digest([reader.__module__, reader.__qualname__, *sources])


@contextlib.contextmanager
def _lock(path: Path, shown: bool) -> Iterator[None]:
    """Hold an exclusive lock; the system releases that of a killed process."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if shown:
                print("waiting: another process builds the cache", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
