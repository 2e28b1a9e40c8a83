"""Cut a collection into the sites of a federation: who would have got what, and how unlike they are.

``python -m simulation.partition OVERRIDES --out partition.csv`` writes an index whose ``site`` column
says it. Whole patients move, never single images, and every site gets patients to train on:
``minimum`` of them with images in the split ``train`` (all patients count where nobody is in it).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from simulation.partition_plot import LABEL, partition_table, plot_partition
from sparsecontrast.config import anchored, compose
from sparsecontrast.data.sites import is_cut, refuse_leaks
from sparsecontrast.errors import ConfigError, SparseContrastError
from sparsecontrast.settings import FederationConfig

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["numbered_patients", "partition", "partition_table", "plot_partition", "patient_groups"]

DRAWS = 100
"""Dirichlet draws before the most even of them is repaired by hand."""


def partition(
    frame: "pd.DataFrame",
    config: FederationConfig,
    seed: int,
    overlap: float = 0.0,
    minimum: int | None = None,
) -> "pd.DataFrame":
    """Give every image its site.

    - ``by_site``: as it is; so is an index that was cut in the configured way before.
    - ``iid``: patients shuffled and dealt in turn.
    - ``quantity``: the sizes of the sites follow one Dirichlet(alpha) draw.
    - ``dirichlet``: patients are grouped by what they have; each group is spread over the sites by a
      Dirichlet(alpha) draw of its own (Hsu et al. 2019, arXiv:1909.06335, over groups of patients).
    - ``scanner``: as iid, but each site has its own scanner. Phantoms are taken again at that
      hospital (path, view and boxes change); other images get its number in a column ``scanner``,
      which the cache hands to ``sparsecontrast.data.scanner.apply_scanner``.

    A draw that leaves a site short of ``minimum`` is thrown away. After ``DRAWS`` of them the one whose
    smallest site is largest is kept, and patients move from the largest site to the smallest.

    Args:
        frame: an index; its order of rows does not matter.
        config: ``partition``, ``sites``, ``alpha``.
        seed: of the run; the same seed, patients and config give the same sites.
        overlap: share of the patients with several images who are seen at a second site as well: half of
            their images lie there. In [0, 1].
        minimum: patients of each site; None for 8, or half an equal share where that is less.

    Returns:
        A copy with new sites ``site_00``..., rows as they were; the old site stays as ``source_site``
        unless each site films anew. Columns ``partition`` and ``overlap`` say what was done.

    Raises:
        ConfigError: too few patients for so many sites, no labels to group by, overlap out of range, an
            index that was cut in another way.
        PatientLeakError: a patient at two sites although ``overlap`` is 0.
    """
    if not 0 <= overlap <= 1:
        raise ConfigError(f"overlap={overlap}: must be in [0, 1]")
    frame = frame.copy()
    if not is_cut(frame, config.partition):
        sites = _sites_of_images(frame, config, seed, overlap, minimum)
        if config.partition != "scanner" and "source_site" not in frame:
            frame["source_site"] = frame["site"]  # disease labels are judged within it
        frame["site"] = [f"site_{site:02d}" for site in sites]
        if config.partition == "scanner":
            frame = _filmed_at(frame, sites)
        frame["partition"] = config.partition
    if overlap > 0:
        frame["overlap"] = overlap
    refuse_leaks(frame)
    return frame


def _sites_of_images(
    frame: "pd.DataFrame", config: FederationConfig, seed: int, overlap: float, minimum: int | None
) -> list[int]:
    """Return the number of each image's site."""
    from sparsecontrast.trainer import derive_seed

    rng = np.random.Generator(np.random.PCG64(derive_seed(seed, "partition", config.partition)))
    codes = numbered_patients(frame)
    counted = np.bincount(codes, weights=(frame["split"] == "train").to_numpy(float)) > 0
    if not counted.any():
        counted[:] = True
    minimum = _minimum(minimum, int(counted.sum()), config.sites)
    home = _homes(frame, config, codes, counted, minimum, rng)
    sites = home[codes]
    if overlap > 0 and config.sites > 1:
        _spread(sites, frame["path"].to_numpy(dtype=str), codes, overlap, config.sites, rng)
    return sites.tolist()


def numbered_patients(frame: "pd.DataFrame") -> np.ndarray:
    """Number the patients, int [N], in the order of their first paths.

    Neither the order of the rows has a say nor the pseudonyms, which depend on the site's random key:
    the same seed cuts the same files in the same way.
    """
    first = frame.groupby("patient_id")["path"].min().reset_index()
    order = first.sort_values(["path", "patient_id"])["patient_id"].tolist()
    rank = {patient: code for code, patient in enumerate(order)}
    return frame["patient_id"].map(rank).to_numpy(dtype=np.int64)


def _minimum(asked: int | None, patients: int, sites: int) -> int:
    """Return how many patients each site must get, or refuse."""
    minimum = max(1, min(8, patients // (2 * sites))) if asked is None else asked
    if patients < sites * minimum or minimum < 0:
        raise ConfigError(
            f"federation.sites={sites}: {patients} patients to train on cannot give each site {minimum}; "
            "ask for fewer sites or bring more patients"
        )
    return minimum


def _homes(
    frame: "pd.DataFrame",
    config: FederationConfig,
    codes: np.ndarray,
    counted: np.ndarray,
    minimum: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return the site of each patient, int [P]."""
    if config.partition in ("iid", "scanner"):
        return _dealt(counted, config.sites, rng)
    if config.partition == "quantity":
        groups = np.zeros(len(counted), dtype=np.int64)
    else:
        groups = patient_groups(frame, codes, config.sites)
    best, smallest = np.zeros(len(counted), dtype=np.int64), -1
    for _ in range(DRAWS):
        home = _drawn(groups, config.alpha, config.sites, rng)
        least = int(np.bincount(home[counted], minlength=config.sites).min())
        if least > smallest:
            best, smallest = home, least
        if smallest >= minimum:
            break
    return _repaired(best, counted, minimum, config.sites, rng)


def _dealt(counted: np.ndarray, sites: int, rng: np.random.Generator) -> np.ndarray:
    """Deal patients in turn: first those who count, so that both kinds are spread evenly."""
    order = rng.permutation(len(counted))
    order = order[np.argsort(~counted[order], kind="stable")]
    home = np.empty(len(counted), dtype=np.int64)
    home[order] = np.arange(len(counted)) % sites
    return home


def _drawn(groups: np.ndarray, alpha: float, sites: int, rng: np.random.Generator) -> np.ndarray:
    """Spread each group of patients over the sites in the proportions of one Dirichlet draw."""
    home = np.empty(len(groups), dtype=np.int64)
    for group in range(int(groups.max()) + 1):
        members = rng.permutation(np.flatnonzero(groups == group))
        shares = np.cumsum(rng.dirichlet(np.full(sites, alpha)))
        ends = np.rint(shares / shares[-1] * len(members)).astype(np.int64)
        home[members] = np.searchsorted(ends, np.arange(len(members)), side="right")
    return home


def _repaired(
    home: np.ndarray, counted: np.ndarray, minimum: int, sites: int, rng: np.random.Generator
) -> np.ndarray:
    """Move patients from the largest site to the smallest until every site has the minimum."""
    home = home.copy()
    while True:
        sizes = np.bincount(home[counted], minlength=sites)
        if sizes.min() >= minimum:
            return home
        movable = np.flatnonzero(counted & (home == sizes.argmax()))
        home[rng.choice(movable)] = sizes.argmin()


def _spread(
    sites: np.ndarray,
    paths: np.ndarray,
    codes: np.ndarray,
    overlap: float,
    n: int,
    rng: np.random.Generator,
) -> None:
    """Send half of the images of some patients to a second site, in place."""
    several = np.flatnonzero(np.bincount(codes) > 1)
    for patient in rng.permutation(several)[: round(overlap * len(several))]:
        rows = np.flatnonzero(codes == patient)
        rows = rows[np.argsort(paths[rows], kind="stable")]
        sites[rows[len(rows) // 2 :]] = (sites[rows[0]] + rng.integers(1, n)) % n


def patient_groups(frame: "pd.DataFrame", codes: np.ndarray, smallest: int) -> np.ndarray:
    """Group patients by what they have.

    A patient has a label when any of his images has it; unknown counts as absent. Patients with the same
    combination are a group. A combination of fewer than ``smallest`` patients says too little: its patients
    join those who have the label that is rarest among all patients, of the ones they have.

    Args:
        frame: an index.
        codes: the patient of each row, 0 .. P - 1.
        smallest: patients of a group that stands for itself.

    Returns:
        int [P], groups numbered from 0.

    Raises:
        ConfigError: the index has no labels.
    """
    columns = [name for name in frame.columns if name.startswith(LABEL)]
    if not columns or frame[columns].isna().all(axis=None):
        raise ConfigError(
            "federation.partition=dirichlet: the index has no labels to group patients by; try iid"
        )
    has = frame[columns].fillna(0).groupby(codes).max().to_numpy() > 0
    keys = ["+".join(name for name, there in zip(columns, row, strict=True) if there) for row in has]
    sizes = {key: keys.count(key) for key in set(keys)}
    frequency = dict(zip(columns, has.sum(axis=0).tolist(), strict=True))
    rarest = [min(key.split("+"), key=lambda name: frequency.get(name, 0)) for key in keys]
    keys = [key if sizes[key] >= smallest else rare for key, rare in zip(keys, rarest, strict=True)]
    return np.unique(keys, return_inverse=True)[1]


def _filmed_at(frame: "pd.DataFrame", sites: Sequence[int]) -> "pd.DataFrame":
    """Let every image come from the scanner of its site."""
    from sparsecontrast.data.phantom import describe, parse_path, phantom_path

    others = ~frame["path"].str.startswith("phantom:")
    if others.any():
        frame["scanner"] = np.where(others, np.asarray(sites, dtype=float), np.nan)
    paths, views, boxes = (frame[name].tolist() for name in ("path", "view", "boxes"))
    for row in np.flatnonzero(~others.to_numpy()).tolist():
        film = {**parse_path(paths[row]), "site": sites[row]}
        findings = describe(**film)
        paths[row], views[row], boxes[row] = phantom_path(**film), findings.view, json.dumps(findings.boxes)
    return frame.assign(path=paths, view=views, boxes=boxes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a partitioned index; returns the exit status, 2 for an error that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m simulation.partition", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="such as federation.partition=dirichlet data=phantom")
    parser.add_argument("--out", type=Path, required=True, help="the CSV to write, for data.index=")
    parser.add_argument("--plot", type=Path, help="a PNG of who got what")
    parser.add_argument("--overlap", type=float, default=0.0, help="share of patients seen at two sites")
    options = parser.parse_args(arguments)
    try:
        write(options.overrides, options.out, options.plot, options.overlap)
    except SparseContrastError as error:
        print(f"error [{error.code}]: {error}", file=sys.stderr)
        return 2
    return 0


def write(words: Sequence[str], out: Path, plot: Path | None = None, overlap: float = 0.0) -> None:
    """Partition the data of a configuration into ``out`` and print who got what.

    What the index left out goes to a ``quarantine.csv`` beside it, where ``data.index`` looks for it.
    """
    from simulation.canaries import toss
    from sparsecontrast.data.cache import load_rows
    from sparsecontrast.data.index import write_index, write_table

    config = compose(list(words))
    frame, left_out = load_rows(config.data, anchored(config.output_dir) / "state")
    frame = toss(
        partition(frame, config.federation, config.seed, overlap), config.audit.canaries, config.seed
    )
    write_index(frame, out)
    if len(left_out):
        write_table(left_out, out.parent / "quarantine.csv")
    if plot is not None:
        plot_partition(frame, plot)
    print(partition_table(frame).to_string(index=False))


if __name__ == "__main__":
    sys.exit(main())
