"""Image files for tests, and readers of them that note what they read. Light: workers import it."""

import os
import time
from pathlib import Path

import numpy as np
from PIL import Image

from sparsecontrast.data import decode
from sparsecontrast.data.decode import Task
from sparsecontrast.errors import ImageReadError

SIZE = 32


def reading(path: str, size: int) -> np.ndarray:
    """Read a PNG and note it beside the file; the name may ask for a fault."""
    file = Path(path)
    with (file.parent / "reads.log").open("a") as log:
        log.write(f"{file.name} {os.getpid()}\n")
    if "slow" in file.name:
        time.sleep(0.15)
    if "crash" in file.name:
        os._exit(1)
    if "broken" in file.name:
        raise ImageReadError("broken on purpose")
    return np.asarray(Image.open(path), dtype=np.float32) / 255


def reads(folder: Path) -> list[str]:
    log = folder / "reads.log"
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


def make_files(folder: Path, count: int, name: str = "image", seed: int = 0) -> list[Path]:
    folder.mkdir(exist_ok=True)
    rng = np.random.Generator(np.random.PCG64(seed))
    files = []
    for i in range(count):
        pixels = rng.integers(1, 256, size=(40, 40) if i % 2 else (30, 48)).astype(np.uint8)
        files.append(folder / f"{name}{i:03}.png")
        Image.fromarray(pixels).save(files[-1])
    return files


def tasks_of(files: list[Path]) -> list[Task]:
    return [Task(str(f)) for f in files]


def expected(files: list[Path]) -> np.ndarray:
    return np.stack([decode.fit(np.asarray(Image.open(f), dtype=np.float32) / 255, SIZE) for f in files])


def stores(folder: Path) -> list[Path]:
    return sorted(folder.glob("pixels-*"))


def leftovers(folder: Path) -> list[Path]:
    return sorted(folder.glob("building-*"))
