"""Are the images what they should be: index, quarantine, pixels. Says counts, never which.

The contact sheet shows patients. It is written where the site keeps its state, readable by its owner alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sparsecontrast.doctor.finding import Finding
from sparsecontrast.errors import DataError, ImageReadError
from sparsecontrast.settings import Config

if TYPE_CHECKING:
    import pandas as pd

SHEET = "contact-sheet.png"
COLUMNS, ROWS, SIDE = 6, 4, 160
QUARANTINE = (0.02, 0.5)  # share of files left out: warn above, FAIL above
FLAT = 0.02  # standard deviation of pixels in [0, 1] below which nothing is to be seen
CLIPPED = 0.6  # share of pure black and pure white above which a window is wrong


@dataclass(frozen=True)
class Film:
    """One image of the sheet; ``fault`` is "" where nothing is strange about it."""

    pixels: np.ndarray | None
    fault: str


def images(config: Config, state_dir: Path) -> Iterator[Finding]:
    """Read the index, and look at some training images."""
    from sparsecontrast.data.cache import load_rows

    try:
        frame, left_out = load_rows(config.data, state_dir, progress=True)  # many headers take minutes
    except DataError as error:  # its text may name files
        remedy = "sparsecontrast index with this site's overrides tells more"
        yield Finding("FAIL", "data", f"no index can be made: {error.code}", remedy)
        return
    train = frame[frame["split"] == "train"]
    yield _size(config, frame, train)
    yield _left_out(len(frame), left_out)
    yield _pixels(train, state_dir / SHEET)


def _size(config: Config, frame: "pd.DataFrame", train: "pd.DataFrame") -> Finding:
    patients = frame["patient_id"].nunique()
    told = f"{len(frame)} images of {patients} patients, {len(train)} to train on"
    least = config.data.min_images
    if len(train) < max(1, least):
        return Finding(
            "FAIL", "data", told, f"data.min_images={least}: add images, or look at the quarantine"
        )
    return Finding("ok", "data", told)


def _left_out(kept: int, left_out: "pd.DataFrame") -> Finding:
    count = len(left_out)
    share = count / max(1, kept + count)
    told = f"{count} of {kept + count} files left out ({share:.1%})"
    if share <= QUARANTINE[0]:
        return Finding("ok", "quarantine", told)
    level = "FAIL" if share > QUARANTINE[1] else "warn"
    reason = left_out["reason"].astype(str).value_counts().index[0][:80]  # reasons name no file
    return Finding(level, "quarantine", f"{told}, most often: {reason}", "see quarantine.csv below state_dir")


def _pixels(train: "pd.DataFrame", sheet: Path) -> Finding:
    chosen = (
        np.unique(np.linspace(0, len(train) - 1, COLUMNS * ROWS).round().astype(int)) if len(train) else []
    )
    films = [_film(train["path"].iloc[i]) for i in chosen]
    if not films:
        return Finding("FAIL", "pixels", "no training image to look at", "see the lines on data")
    _write_sheet(films, sheet)
    faults = [film.fault for film in films if film.fault]
    told = f"{len(films)} looked at, {len(faults)} strange"
    if not faults:
        return Finding("ok", "pixels", f"{told}; see {sheet}")
    common = max(sorted(set(faults)), key=faults.count)
    level = "FAIL" if len(faults) > len(films) / 2 else "warn"
    return Finding(level, "pixels", f"{told}, most often: {common}", f"look at {sheet}")


def _film(path: str) -> Film:
    from sparsecontrast.data.decode import read_pixels

    try:
        pixels = read_pixels(path, SIDE)
    except ImageReadError:
        return Film(None, "unreadable")
    if pixels.std() < FLAT:
        return Film(pixels, "almost uniform")
    if ((pixels <= 0) | (pixels >= 1)).mean() > CLIPPED:
        return Film(pixels, "mostly pure black and white")
    return Film(pixels, "")


def _write_sheet(films: list[Film], path: Path) -> None:
    """Write films as they will be trained on; unreadable ones are crossed out, strange ones framed."""
    import io

    from PIL import Image, ImageDraw

    from sparsecontrast.data.decode import fit
    from sparsecontrast.durable import write_bytes

    sheet = Image.new("RGB", (COLUMNS * SIDE, -(-len(films) // COLUMNS) * SIDE))
    pen = ImageDraw.Draw(sheet)
    for i, film in enumerate(films):
        left, top = i % COLUMNS * SIDE, i // COLUMNS * SIDE
        if film.pixels is not None:
            sheet.paste(Image.fromarray(np.asarray(fit(film.pixels, SIDE), dtype=np.uint8)), (left, top))
        corners = (left, top, left + SIDE - 1, top + SIDE - 1)
        if film.pixels is None:
            pen.line(corners, fill=(255, 60, 60), width=3)
        if film.fault:
            pen.rectangle(corners, outline=(255, 60, 60), width=3)
    data = io.BytesIO()
    sheet.save(data, "PNG")
    write_bytes(path, data.getvalue(), 0o600)
