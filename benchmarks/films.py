"""The images that the benchmarks of quality and of localisation share: phantoms, and real films."""

from pathlib import Path

from sparsecontrast.config import compose
from sparsecontrast.data.cache import load_dataset
from sparsecontrast.data.dataset import Dataset

NAMES = ("phantoms", "multisite")


def load_films(name: str, size: int, patch: int, patients: int, root: str | Path, out: str | Path) -> Dataset:
    """Load one data set; the phantoms are the same for every seed of a benchmark.

    Args:
        name: one of ``NAMES``.
        size: side of the images in pixels.
        patch: side of a patch, which must divide it.
        patients: phantom patients of each of ten sites, one film each; four of ten are held out.
        root: folder of the real films, with its ``index.csv``.
        out: folder of the benchmark; the cache lies in it.
    """
    told = [f"backbone.img_size={size}", f"backbone.patch_size={patch}"]
    if name == "phantoms":
        told += [f"data.phantom.patients_per_site={patients}", "data.phantom.images_per_patient=1",
                 "data.val_fraction=0.1", "data.test_fraction=0.4"]  # fmt: skip
    else:
        told += ["experiment=multisite_cxr", f"data.root={Path(root).resolve()}"]
    folder = Path(out).resolve()
    return load_dataset(compose(told), folder / "cache", folder / "state", progress=False)
