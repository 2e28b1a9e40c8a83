"""``load_dataset``: from a configured source of images to memory-mapped pixels with their rows.

The rows come from, first match wins: the ``index`` argument; the CSV of ``data.index``, with what the
``quarantine.csv`` beside it left out; the phantoms; an index built from ``data.root``. A built index is
kept in the site's state folder, where the key of its pseudonyms lies, as

    index-<key>-<checksum>/index.csv, quarantine.csv

The key is a digest of the data section of the config, of the key of pseudonyms, of this folder's code,
and of path, size and mtime of every file below ``data.root``: whatever changes, the index is built
anew. Sites with very many files write an index once with ``sparsecontrast index`` and name it in
``data.index``; that saves the listing at every start.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sparsecontrast.config import anchored, as_dict
from sparsecontrast.data.dataset import Dataset, cached_boxes
from sparsecontrast.data.decode import Reader, Task, read_pixels
from sparsecontrast.data.store import open_pixels
from sparsecontrast.errors import EmptySiteError, IndexSchemaError, StorageError
from sparsecontrast.settings import Config, DataConfig

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Dataset", "load_dataset", "load_rows"]

QUARANTINE = "quarantine.csv"
NEEDED = {"image_id", "path", "patient_id", "site", "split", "height", "width", "boxes"}
# Keys of the data section that say nothing about the rows of a built index.
NOT_ROWS = {"image_size", "cache_dir", "index", "min_images", "phantom"}


def load_dataset(
    config: Config,
    cache_dir: Path,
    state_dir: Path,
    progress: bool = True,
    index: pd.DataFrame | None = None,
    reader: Reader = read_pixels,
    workers: int | None = None,
) -> Dataset:
    """Load a data set, decoding only what the cache does not hold.

    Args:
        config: ``config.data`` says where images come from and their side.
        cache_dir: for the pixels; sites of one machine may share it.
        state_dir: the site's own; ``quarantine.csv`` is written there.
        progress: tell what takes long, on stderr.
        index: rows to use instead of the configured source.
        reader: (path, size) -> float32 [H, W] in [0, 1]; a module-level function.
        workers: decoding processes; None for what suits the machine and the work.

    Raises:
        EmptySiteError: no image is left.
        StorageError: a folder cannot be written.
        IndexSchemaError, MissingDataError, RecipeError: the index cannot be had.
    """
    import pandas as pd

    from sparsecontrast.data.index import write_table

    data = config.data
    if index is None:
        frame, left_out = load_rows(data, state_dir, progress)
    else:
        frame, left_out = _merged(index, data), _quarantine([])
    # Stable: among equals the source's order, never that of pseudonyms, which depend on the site's key.
    frame = frame.sort_values(["site", "split"], kind="stable", ignore_index=True)
    store = open_pixels(_tasks(frame, data), data.image_size, cache_dir, reader, workers, progress)
    paths = frame["path"].tolist()
    failed = _quarantine([(paths[i], reason, "decode") for i, reason in store.failures])
    quarantine = pd.concat([left_out, failed], ignore_index=True)
    write_table(quarantine, state_dir / QUARANTINE)
    if len(store.kept) == 0:
        reasons = "; ".join(quarantine["reason"].astype(str).unique()[:3]) or "the index has no row"
        raise EmptySiteError(f"no usable image, {len(quarantine)} in {state_dir / QUARANTINE}: {reasons}")
    frame = frame.iloc[store.kept].reset_index(drop=True)
    boxes, box_labels = cached_boxes(frame, store.shapes, data.image_size)
    return Dataset(store.images, frame, boxes, box_labels, quarantine)


def load_rows(data: DataConfig, state_dir: Path, progress: bool = True) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the index rows of the configured source, sites merged, and what its index left out.

    Raises:
        IndexSchemaError, MissingDataError, RecipeError, EmptySiteError: the index cannot be had.
    """
    if data.index is not None:
        from sparsecontrast.data.index import read_index

        csv = anchored(data.index)
        frame, left_out = read_index(csv), _read_quarantine(csv.parent)
    elif data.kind == "phantom":
        from sparsecontrast.data.phantom import phantom_index

        frame = phantom_index(data.phantom, data.salt, data.val_fraction, data.test_fraction)
        left_out = _quarantine([])
    else:
        frame, left_out = _built(data, state_dir, progress)
    return _merged(frame, data), left_out


def _built(data: DataConfig, state_dir: Path, progress: bool) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Build an index, or read back the one built from the very same configuration, code and files."""
    from sparsecontrast.data.index import build_index, read_index, write_index, write_table
    from sparsecontrast.data.pseudonyms import load_key

    key = _index_key(data, load_key(state_dir))
    for kept in state_dir.glob(f"index-{key}-*"):
        if kept.name.endswith(f"-{_checksum(kept)}"):
            return read_index(kept / "index.csv"), _read_quarantine(kept)
    built = build_index(data, state_dir, progress)
    building = state_dir / f"building-{secrets.token_hex(8)}"
    write_index(built.frame, building / "index.csv")
    write_table(built.quarantine, building / QUARANTINE)
    frame = read_index(building / "index.csv")  # read back: the same frame as the next time
    for old in state_dir.glob("index-*"):
        shutil.rmtree(old, ignore_errors=True)
    try:
        building.rename(state_dir / f"index-{key}-{_checksum(building)}")
    except OSError as error:
        shutil.rmtree(building, ignore_errors=True)
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # then another process was faster
            raise StorageError(f"{state_dir}: the index cannot be kept ({error.strerror})") from error
    return frame, built.quarantine


def _checksum(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in ("index.csv", QUARANTINE):
        digest.update((folder / name).read_bytes() if (folder / name).exists() else b"missing")
    return digest.hexdigest()[:16]


def _index_key(data: DataConfig, pseudonyms: bytes) -> str:
    section = {k: v for k, v in as_dict(data).items() if k not in NOT_ROWS}
    digest = hashlib.sha256(json.dumps(section, sort_keys=True, default=str).encode())
    digest.update(hashlib.sha256(pseudonyms).digest())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    if data.root is not None:
        for line in _listing(str(anchored(data.root))):
            digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


def _listing(folder: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Yield path, size and mtime of every file below a folder, in a fixed order; links are followed."""
    try:
        here = os.stat(folder)
        entries = sorted(os.scandir(folder), key=lambda e: e.name)
    except OSError:  # missing or forbidden: build_index says so in its own words
        return
    place = (here.st_dev, here.st_ino)
    if place in above:  # a link to a folder that holds it
        return
    for entry in entries:
        if entry.is_dir():
            yield from _listing(entry.path, above | {place})
        else:
            state = entry.stat(follow_symlinks=entry.is_file())
            yield f"{entry.path}\n{state.st_size}\n{state.st_mtime_ns}\n"


def _merged(frame: pd.DataFrame, data: DataConfig) -> pd.DataFrame:
    """Check that an index has what is needed, and merge its sites as configured."""
    from sparsecontrast.data.sites import merge_sites

    if missing := sorted(NEEDED - set(frame.columns)):
        raise IndexSchemaError(f"index: columns {missing} are missing; it has {sorted(frame.columns)}")
    if data.merge_sites_to is None or "partition" in frame:  # a cut made its own sites
        return frame
    return merge_sites(frame, data.merge_sites_to)


def _tasks(frame: pd.DataFrame, data: DataConfig) -> list[Task]:
    import pandas as pd

    paths = frame["path"].tolist()
    if "scanner" not in frame:
        return [Task(path) for path in paths]
    scanners = pd.to_numeric(frame["scanner"], errors="coerce").tolist()  # "" in a CSV: as it is
    rows = zip(paths, scanners, strict=True)
    return [Task(p) if math.isnan(s) else Task(p, int(s), _noise_seed(p, data)) for p, s in rows]


def _noise_seed(path: str, data: DataConfig) -> int:
    """Seed an image's noise by its place below ``data.root``: no random key, no folder of this machine."""
    root = "" if data.root is None else f"{anchored(data.root)}/"
    return zlib.crc32(path.removeprefix(root).encode(errors="surrogateescape"))


def _quarantine(rows: list[tuple[str, str, str]]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(rows, columns=["path", "reason", "stage"], dtype=str)


def _read_quarantine(folder: Path) -> pd.DataFrame:
    """Read what making the index in this folder left out; what decoding left out is found anew."""
    from sparsecontrast.data.csv_files import read_table

    if not (folder / QUARANTINE).exists():
        return _quarantine([])
    rows = read_table(folder / QUARANTINE)
    return rows[rows["stage"] != "decode"].reset_index(drop=True)
