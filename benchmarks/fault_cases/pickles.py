"""A pickle wherever something is read: it would make a folder if it were ever loaded."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fault_cases.case import Case, Found, expect
from benchmarks.fault_cases.wire import TINY
from sparsecontrast import checkpoint
from sparsecontrast.config import compose
from sparsecontrast.errors import SparseContrastError
from sparsecontrast.overrides import assign


class Bomb:
    """Makes a folder where it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.path,))


def cases() -> list[Case]:
    """One case for each place."""
    return [Case("inputs", f"a pickle as {place}", _never(read)) for place, read in PLACES.items()]


def _never(read: Callable[[Path, bytes], str]) -> Callable[[Path], Found]:
    """Read it, and see that it was not unpickled; ``read`` says how it was met."""

    def work(folder: Path) -> Found:
        mark = folder / "unpickled"
        bomb = pickle.dumps(Bomb(mark))
        found = read(folder, bomb)
        expect(not mark.exists(), "it was loaded")
        pickle.loads(bomb)
        expect(mark.exists(), "it does nothing even when it is loaded: nothing was shown")
        return {"found": found}

    return work


def _refused(work: Callable[[], object]) -> str:
    try:
        work()
    except SparseContrastError as error:
        return f"refused: {error.code}"
    expect(False, "taken without a word")
    return ""


def _round(folder: Path, bomb: bytes) -> str:
    """A round whose JSON vouches for the pickle."""
    import torch

    checkpoint.write_round(folder, 1, {"backbone.w": torch.ones(3)}, {})
    weights, told = (checkpoint.round_file(folder, 1, end) for end in (".safetensors", ".json"))
    weights.write_bytes(bomb)
    meta = json.loads(told.read_text())
    meta["files"][weights.name] = hashlib.sha256(bomb).hexdigest()
    told.write_text(json.dumps(meta))
    expect(checkpoint.latest(folder) is None, "it counts as a whole round")
    return _refused(lambda: checkpoint.read_round(folder, 1))


def _init(folder: Path, bomb: bytes) -> str:
    from sparsecontrast.methods import build_method
    from sparsecontrast.start import load_start

    (folder / "start.safetensors").write_bytes(bomb)
    config = compose([*TINY, assign("init", folder / "start.safetensors")])
    return _refused(lambda: load_start(build_method(config), config))


def _pretrained(folder: Path, bomb: bytes) -> str:
    from sparsecontrast.methods import build_method

    (folder / "timm.pth").write_bytes(bomb)
    config = compose([*TINY, assign("backbone.pretrained", folder / "timm.pth")])
    return _refused(lambda: build_method(config))


def _cache(folder: Path, bomb: bytes) -> str:
    """In place of both files of a store; it is made anew."""
    from sparsecontrast.data.decode import Task
    from sparsecontrast.data.store import open_pixels

    tasks = [Task(f"phantom:0:0:{i}:0") for i in range(2)]
    first = np.array(open_pixels(tasks, 32, folder).images)
    (store,) = folder.glob("pixels-*")
    for name in ("header.json", "pixels.u8"):
        (store / name).write_bytes(bomb)
    expect(np.array_equal(open_pixels(tasks, 32, folder).images, first), "other pixels")
    return "made anew"


def _local(folder: Path, bomb: bytes) -> str:
    """As the newer of two states of a site: the older one is taken."""
    from client.rounds import KeptRounds
    from sparsecontrast.methods import build_method
    from sparsecontrast.trainer import LocalTrainer

    config = compose(list(TINY))
    trainer = LocalTrainer(build_method(config), config, "x")
    kept = KeptRounds(folder / "state", folder)
    for number in (1, 2):
        kept.save(trainer, number, None)
    (folder / "state" / "round_0002.safetensors").write_bytes(bomb)
    expect(kept.restore(trainer, 3) == 1, "not the older state")
    return "the state before it was taken"


def _acquisition(folder: Path, bomb: bytes) -> str:
    from sparsecontrast.ultrasound.acquisition import read_acquisition

    (folder / "scan.npz").write_bytes(bomb)
    return _refused(lambda: read_acquisition(folder / "scan.npz"))


def _object_array(folder: Path, bomb: bytes) -> str:
    from sparsecontrast.ultrasound.acquisition import read_acquisition

    objects = np.array([Bomb(folder / "unpickled")], dtype=object)
    np.savez(folder / "scan.npz", images=objects)
    return _refused(lambda: read_acquisition(folder / "scan.npz"))


PLACES: dict[str, Callable[[Path, bytes], str]] = {
    "a round's weights, with the right hash": _round, "the file of init=": _init,
    "the file of backbone.pretrained=": _pretrained, "the cache": _cache,
    "a site's local state": _local, "an acquisition": _acquisition,
    "an array of objects in an acquisition": _object_array,
}  # fmt: skip
