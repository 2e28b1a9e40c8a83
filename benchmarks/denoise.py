"""What A2A gains over plain compounding, and over other ways to denoise the same sub-aperture images.

    python -m benchmarks.denoise [--quick] [--json FILE] [--data FOLDER] [--phantoms N]

Simulated synthetic-aperture acquisitions (``us_sa_sim``: three scanners, channel data), white noise added
to the channels at 0 to 30 dB below their mean power, 2 to 16 apertures (16: halves of the receivers).
Phantoms with a cyst or a bright inclusion; a few points 20 dB above the image's mean, away from it, tell the
resolution. Each row is one image by one method:

- gcnr, cnr, speckle_snr (mean / deviation of the ring around the inclusion), contrast_db;
- snr_db against the noise-free compound of the same apertures, amplitudes, best single factor;
- bias_db: mean power in the ring against that compound's, and bias_inside_db within the inclusion;
- fwhm_lateral_mm, fwhm_axial_mm: median over the points, -6 dB; nan (absent) if no point has two flanks.

``nlm`` and ``bm3d`` smooth the log-image at several strengths. At equal resolution each is judged by its
best gCNR among the strengths whose FWHM is at most 1.05 of A2A's in both directions, chosen with the truth
in hand. ``noise_alone`` rows: pure noise in; gcnr is what looks like a lesion, left_db the power that is
left. Intervals are 95 % bootstrap over phantoms. A killed run continues when the same command is given again.
"""

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.denoisers import STRENGTHS, coherence_factor, compound, has, noise2noise, smoother
from benchmarks.record import kept_rows, print_table, write_result
from sparsecontrast.errors import MissingDataError
from sparsecontrast.methods.a2a import A2AConfig, denoise
from sparsecontrast.ultrasound import metrics
from sparsecontrast.ultrasound.acquisition import Geometry, read_acquisition
from sparsecontrast.ultrasound.beamform import delay_and_sum, grid
from sparsecontrast.ultrasound.simulate import add_noise, echoes

DATA = Path("../shared/data/us_sa_sim")
NOISES, COUNTS, MIDDLE = (0.0, 10.0, 20.0, 30.0), (2, 4, 16), 10.0
POINT_DB = 20.0
EQUAL = 1.05  # of A2A's FWHM: as sharp
SHOWN = ("gcnr", "cnr", "speckle_snr", "snr_db", "bias_db", "fwhm_lateral_mm", "fwhm_axial_mm", "seconds")
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One acquisition to denoise."""

    file: str
    noise_db: float
    apertures: int
    noise_alone: bool = False

    def key(self) -> Row:
        """Name it in its rows."""
        return {"phantom": self.file, "noise_db": self.noise_db, "apertures": self.apertures,
                "noise_alone": self.noise_alone}  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """Sub-aperture images with and without noise, and where things are."""

    images: NDArray
    clean: NDArray
    x: NDArray
    z: NDArray
    geometry: Geometry
    points: NDArray


def main(argv: Sequence[str] | None = None) -> None:
    """Measure cell by cell, print, and write JSON if asked."""
    args = _arguments(argv)
    command = "python -m benchmarks.denoise" + (" --quick" if args.quick else "")
    command += "" if args.phantoms is None else f" --phantoms {args.phantoms}"
    kept = None if args.json is None else args.json.with_name(args.json.name + ".partial")
    rows = [] if kept is None else kept_rows(kept, command)
    config = A2AConfig(steps=20) if args.quick else A2AConfig()
    for cell in cells(args.data, 1 if args.quick else args.phantoms, args.quick):
        if any(all(row[name] == value for name, value in cell.key().items()) for row in rows):
            continue
        found = measure(scene(args.data, cell), cell, config, args.quick)
        print_table(" ".join(map(str, cell.key().values())), [_told(row) for row in found])
        rows += found
        if kept is not None:
            write_result("denoise", command, rows, kept)
    for title, table in summary(rows):
        print_table(title, table)
    if args.json is not None and kept is not None:
        write_result("denoise", command, rows, args.json)
        kept.unlink()


def cells(data: Path, phantoms: int | None, quick: bool = False) -> Iterator[Cell]:
    """Give what to measure: phantoms with an inclusion, as many a scanner; first each noise, then each count.

    Args:
        data: folder with ``index.csv``.
        phantoms: a scanner; None for four at each noise and two at each count.
        quick: one cell of signal and one of noise alone.
    """
    import pandas as pd

    if not (data / "index.csv").is_file():
        raise MissingDataError(f"{data}: no index.csv; give the folder of us_sa_sim with --data")
    frame = pd.read_csv(data / "index.csv")
    frame = frame[frame["label"] != "none"]
    files = {str(site): [str(f) for f in group["path"]] for site, group in frame.groupby("site")}
    if quick:
        first = next(iter(files.values()))[0]
        yield from (Cell(first, MIDDLE, 8), Cell(first, 0.0, 8, noise_alone=True))
        return
    for noise, some in itertools.product(NOISES, files.values()):
        yield from (Cell(file, noise, 8) for file in some[: phantoms or 4])
    for count, some in itertools.product(COUNTS, files.values()):
        yield from (Cell(file, MIDDLE, count) for file in some[: phantoms or 2])
    for count, some in itertools.product((2, 8), files.values()):
        yield Cell(some[0], 0.0, count, noise_alone=True)


def scene(data: Path, cell: Cell) -> Scene:
    """Read, add points and noise, and beamform; the noise depends on the cell alone."""
    read = read_acquisition(data / cell.file)
    geometry, channels = read.geometry, read.channels
    if geometry is None or channels is None or geometry.inclusion is None:
        raise MissingDataError(f"{cell.file}: has no channel data with a known inclusion")
    x, z = grid(geometry)
    beam = partial(_apertures, geometry=geometry, count=cell.apertures, x=x, z=z)
    places = _points(geometry)
    level = float(np.sqrt((np.abs(delay_and_sum(channels, geometry, x, z).mean(0)) ** 2).mean()))
    pulses = echoes(places, np.full(len(places), level * 10 ** (POINT_DB / 20)), geometry, channels.shape[-1])
    # noise is that of the phantom, not of the points
    generator = np.random.default_rng([int(cell.noise_db), *cell.file.encode()])
    noise = add_noise(channels, cell.noise_db, generator) - channels
    clean = beam(np.zeros_like(channels) if cell.noise_alone else channels + pulses)
    return Scene(clean + beam(noise), clean, x, z, geometry, places)


def methods(config: A2AConfig, quick: bool) -> dict[str, Callable[[NDArray], Mapping[str, NDArray]]]:
    """Name the ways to denoise; each gives one or more amplitude images."""

    def ours(images: NDArray) -> Mapping[str, NDArray]:
        found = denoise(images, config)
        return {"a2a": found.image, "a2a anatomy": found.anatomy, "a2a coherent": np.abs(found.coherent)}

    found: dict[str, Callable[[NDArray], Mapping[str, NDArray]]] = {
        "compound": lambda images: {"compound": compound(images)},
        "a2a": ours,
        "coherence factor": lambda images: {"coherence factor": coherence_factor(images)},
        "noise2noise": lambda images: {"noise2noise": noise2noise(images, config)},
    }
    for name in ("nlm", "bm3d"):
        if not has(name):
            print(f"{name}: its package is not installed, left out")
            continue
        for strength in STRENGTHS[1:2] if quick else STRENGTHS:
            title = f"{name} {strength:g}"
            found[title] = partial(_smoothed, title=title, way=smoother(name, strength))
    return found


def measure(scene: Scene, cell: Cell, config: A2AConfig, quick: bool) -> list[Row]:
    """Measure every method on one scene."""
    rows = []
    for run in methods(config, quick).values():
        start = time.process_time()
        images = run(scene.images)
        seconds = time.process_time() - start
        for name, image in images.items():
            row = {**cell.key(), "method": name, **quality(image, scene, cell.noise_alone)}
            rows.append({**row, "seconds": seconds, "threads": torch.get_num_threads()})
    return rows


def quality(image: NDArray, scene: Scene, noise_alone: bool) -> Row:
    """Measure one amplitude image [H, W]; what is not finite is left out."""
    assert scene.geometry.inclusion is not None
    inside, ring = metrics.regions(scene.x, scene.z, scene.geometry.inclusion)
    a, b = image[inside], image[ring]
    if noise_alone:
        plain = np.abs(scene.images.mean(0))
        return _finite({"gcnr": metrics.gcnr(a, b), "left_db": metrics.bias_db(image, plain)})
    clean = np.abs(scene.clean.mean(0))
    factor = float((image * clean).sum() / (image**2).sum())
    lateral, axial = metrics.point_fwhm(image, scene.x, scene.z, scene.points)
    return _finite({
        "gcnr": metrics.gcnr(a, b), "cnr": metrics.cnr(a, b), "speckle_snr": metrics.speckle_snr(b),
        "contrast_db": metrics.bias_db(a, b), "snr_db": metrics.snr_db(factor * image, clean),
        "bias_db": metrics.bias_db(b, clean[ring]), "bias_inside_db": metrics.bias_db(a, clean[inside]),
        "fwhm_lateral_mm": 1e3 * lateral, "fwhm_axial_mm": 1e3 * axial,
        "clean_gcnr": metrics.gcnr(clean[inside], clean[ring]),
    })  # fmt: skip


def summary(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Give tables: means by method, gains of A2A over compounding, and gCNR at equal resolution."""
    settings = sorted({(r["apertures"], r["noise_db"]) for r in rows if not r["noise_alone"]})
    gains, equals = [], []
    for apertures, noise in settings:
        chosen = [
            r for r in rows
            if (r["apertures"], r["noise_db"], r["noise_alone"]) == (apertures, noise, False)
        ]  # fmt: skip
        names = list(dict.fromkeys(r["method"] for r in chosen))
        yield (
            f"{noise:g} dB, {apertures} apertures: means",
            [
                {
                    "method": n,
                    **{k: _mean([r[k] for r in chosen if r["method"] == n and k in r]) for k in SHOWN},
                }
                for n in names
            ],
        )
        where = {"noise_db": noise, "apertures": apertures}
        gains += [where | row for row in _gains(chosen)]
        equals += [where | row for row in at_equal_resolution(chosen)]
    yield "A2A against plain compounding, paired, 95 % intervals over phantoms", gains
    yield f"gCNR of A2A less that of others at FWHM <= {EQUAL} of A2A's", equals
    alone = [r for r in rows if r["noise_alone"]]
    names = list(dict.fromkeys(r["method"] for r in alone))
    yield "pure noise in", [
        {"apertures": m, "method": n,
         **{k: _mean([r[k] for r in alone if (r["method"], r["apertures"]) == (n, m) and k in r])
            for k in ("gcnr", "left_db")}}
        for m in sorted({r["apertures"] for r in alone}) for n in names
    ]  # fmt: skip


def at_equal_resolution(rows: Sequence[Row]) -> list[Row]:
    """Compare A2A's gCNR with each other family's best at least as sharp image, phantom by phantom."""
    ours = {r["phantom"]: r for r in rows if r["method"] == "a2a"}
    families = dict.fromkeys(r["method"].split()[0] for r in rows if not r["method"].startswith("a2a"))
    found = []
    for family in families:
        differences = []
        for phantom, a2a in ours.items():
            sharp = [
                r["gcnr"] for r in rows
                if r["phantom"] == phantom and r["method"].split()[0] == family
                and all(r.get(k, math.inf) <= EQUAL * a2a.get(k, 0.0)
                        for k in ("fwhm_lateral_mm", "fwhm_axial_mm"))
            ]  # fmt: skip
            if sharp:
                differences.append(a2a["gcnr"] - max(sharp))
        mean, low, high = interval(differences)
        found.append({"against": family, "phantoms": len(differences), "difference": mean,
                      "low": low, "high": high})  # fmt: skip
    return found


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float | None, float | None, float | None]:
    """Give the mean and its 95 % bootstrap interval; None three times where there is no value."""
    if not values:
        return None, None, None
    array, generator = np.asarray(values, float), np.random.default_rng(0)
    means = array[generator.integers(0, len(array), (draws, len(array)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(array.mean()), float(low), float(high)


def _gains(rows: Sequence[Row]) -> list[Row]:
    plain = {r["phantom"]: r for r in rows if r["method"] == "compound"}
    found = []
    for method in ("a2a", "a2a anatomy", "a2a coherent"):
        ours = [r for r in rows if r["method"] == method]
        row: Row = {"method": method, "phantoms": len(ours)}
        for key, percent in (("gcnr", False), ("cnr", True), ("speckle_snr", True), ("snr_db", False),
                             ("fwhm_lateral_mm", True)):  # fmt: skip
            pairs = [
                (r[key], plain[r["phantom"]][key]) for r in ours if key in r and key in plain[r["phantom"]]
            ]
            mean, low, high = interval([100 * (a / b - 1) if percent else a - b for a, b in pairs])
            told = "" if mean is None else f"{mean:+.3g} ({low:+.3g} to {high:+.3g})"
            row[f"{key} {'%' if percent else '+'}"] = told
        found.append(row)
    return found


def _apertures(channels: NDArray, geometry: Geometry, count: int, x: NDArray, z: NDArray) -> NDArray:
    """Beamform and give ``count`` apertures in the order of their positions, spread over the array."""
    shots = len(geometry.tx)
    if count <= shots:
        images = delay_and_sum(channels, geometry, x, z)
        return images[np.linspace(0, shots - 1, count).round().astype(int)]
    images = delay_and_sum(channels, geometry, x, z, halves=True)
    centres = [tx + side * geometry.nel / 4 for tx in geometry.tx for side in (-1, 1)]
    return images[np.argsort(centres, kind="stable")]


def _points(geometry: Geometry) -> NDArray:
    """Place points at two columns and four depths, away from the inclusion and its ring."""
    assert geometry.inclusion is not None
    (x0, x1), (z0, z1) = geometry.x_extent, geometry.z_extent
    places = np.array([(x0 + s * (x1 - x0), z0 + d * (z1 - z0)) for s in (0.2, 0.8)
                       for d in (0.15, 0.4, 0.65, 0.9)])  # fmt: skip
    cx, cz, r = geometry.inclusion
    return places[np.hypot(places[:, 0] - cx, places[:, 1] - cz) > (metrics.FAR + 0.3) * r]


def _smoothed(images: NDArray, title: str, way: Callable[[NDArray], NDArray]) -> Mapping[str, NDArray]:
    return {title: way(images)}


def _finite(row: Row) -> Row:
    return {key: float(value) for key, value in row.items() if math.isfinite(value)}


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _told(row: Row) -> Row:
    return {key: row[key] for key in ("method", *SHOWN, "left_db") if key in row}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two cells, few steps: does it run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--data", type=Path, default=DATA, metavar="FOLDER", help=f"default {DATA}")
    parser.add_argument("--phantoms", type=int, metavar="N", help="a scanner; default 4, and 2 by count")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
