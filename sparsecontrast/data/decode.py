"""From image files to square uint8 pixels, in parallel; one bad file never stops the others.

Heavy imports stay inside functions: every worker process is a fresh interpreter.
"""

import contextlib
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sparsecontrast.errors import ImageReadError
from sparsecontrast.processes import follow_parent, one_thread

CHUNK = 16  # images sent to a worker at once
AHEAD = 2  # chunks in flight per worker: bounds memory, and the suspects after a crash
POOL_FROM = 200  # below this many images, starting processes costs more than it saves
CRASHED = "decoder crashed: the process that read it died"
Reader = Callable[[str, int], np.ndarray]


@dataclass(frozen=True)
class Task:
    """One image to decode; ``scanner`` (if any) is simulated on it with ``seed``."""

    path: str
    scanner: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Decoded:
    """What became of a task: pixels uint8 [S, S] and the file's (height, width), or a reason."""

    pixels: np.ndarray | None
    height: int = 0
    width: int = 0
    reason: str = ""


def read_pixels(path: str, size: int) -> np.ndarray:
    """Read a file, or render a phantom at ``size``: float32 [H, W] in [0, 1].

    Raises:
        ImageReadError: the file cannot be decoded.
    """
    if path.startswith("phantom:"):
        from sparsecontrast.data.phantom import parse_path, render

        place = parse_path(path)
        return render(place["seed"], place["site"], place["patient"], place["image"], size).image
    from sparsecontrast.data.images import read_image

    return read_image(path)


def placement(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """Return (left, top, w, h) of an image inside the cached square: longest side fills it, centred."""
    scale = size / max(height, width)
    w, h = (min(size, max(1, round(side * scale))) for side in (width, height))
    return (size - w) // 2, (size - h) // 2, w, h


def fit(image: np.ndarray, size: int) -> np.ndarray:
    """Resize float [H, W] in [0, 1] into uint8 [size, size], aspect kept, padded with 0.

    Lanczos with support scaled to the reduction, so every source pixel counts (no aliasing).
    """
    height, width = image.shape
    left, top, w, h = placement(height, width, size)
    if image.shape != (h, w):
        resized = Image.fromarray(np.ascontiguousarray(image, dtype=np.float32)).resize(
            (w, h), Image.Resampling.LANCZOS, reducing_gap=3.0
        )
        image = np.asarray(resized)
    square = np.zeros((size, size), dtype=np.uint8)
    square[top : top + h, left : left + w] = np.rint(image.clip(0, 1) * 255)  # Lanczos may overshoot
    return square


def decode(task: Task, size: int, reader: Reader = read_pixels) -> Decoded:
    """Decode one task; a file that cannot be read becomes a reason."""
    try:
        image = reader(task.path, size)
        if image.ndim != 2 or 0 in image.shape or not np.isfinite(image).all():
            raise ImageReadError(f"not a finite 2-D image (shape {image.shape})")
        if task.scanner is not None:
            from sparsecontrast.data.scanner import apply_scanner

            image = apply_scanner(image, scanner=task.scanner, seed=task.seed)
        return Decoded(fit(image, size), *image.shape)
    except ImageReadError as error:
        return Decoded(None, reason=str(error))


def decode_all(
    tasks: Sequence[Task], size: int, reader: Reader = read_pixels, workers: int | None = None
) -> Iterator[Decoded]:
    """Decode every task, in order.

    Args:
        tasks: what to decode.
        size: side of the squares in pixels.
        reader: (path, size) -> float32 [H, W]; a module-level function where processes are used.
        workers: processes; None for one a core, and for none when there is little to do.
    """
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)), len(tasks) // (POOL_FROM // 2))
    if workers > 1 and not multiprocessing.current_process().daemon:  # a daemon may have no children
        return _pooled(tasks, size, reader, workers)
    return (decode(task, size, reader) for task in tasks)


def _pooled(tasks: Sequence[Task], size: int, reader: Reader, workers: int) -> Iterator[Decoded]:
    """Decode in processes; after a crash, find the culprit among those in flight and go on."""
    if not _can_start():
        yield from (decode(task, size, reader) for task in tasks)
        return
    done = 0
    while done < len(tasks):
        try:
            for result in _parallel(tasks[done:], size, reader, workers):
                yield result
                done += 1
        except BrokenProcessPool:
            suspects = tasks[done : done + workers * AHEAD * CHUNK]
            for result in _one_by_one(suspects, size, reader):
                yield result
                done += 1


def _parallel(tasks: Sequence[Task], size: int, reader: Reader, workers: int) -> Iterator[Decoded]:
    chunks = iter([tasks[i : i + CHUNK] for i in range(0, len(tasks), CHUNK)])
    flight = deque()
    with _pool(workers) as pool:
        while True:
            while len(flight) < workers * AHEAD and (chunk := next(chunks, None)) is not None:
                flight.append(pool.submit(_decode_chunk, chunk, size, reader))
            if not flight:
                return
            yield from flight.popleft().result()


def _one_by_one(tasks: Sequence[Task], size: int, reader: Reader) -> Iterator[Decoded]:
    done = 0
    while done < len(tasks):
        try:
            with _pool(1) as pool:
                for task in tasks[done:]:
                    yield pool.submit(decode, task, size, reader).result()
                    done += 1
        except BrokenProcessPool:
            yield Decoded(None, reason=CRASHED)
            done += 1


def _decode_chunk(tasks: Sequence[Task], size: int, reader: Reader) -> list[Decoded]:
    return [decode(task, size, reader) for task in tasks]


def _can_start() -> bool:
    """Whether worker processes work here; a script without a __main__ guard makes them fail."""
    try:
        with _pool(1) as pool:
            return pool.submit(int).result() == 0
    except BrokenProcessPool:
        return False


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh interpreters (a forked one may hold locks of other threads), one thread each."""
    context = multiprocessing.get_context("spawn")
    with one_thread(), ProcessPoolExecutor(workers, context, initializer=follow_parent) as pool:
        yield pool
