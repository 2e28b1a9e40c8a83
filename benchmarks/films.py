"""The images that the benchmarks of quality and of localisation share: phantoms, and real films."""

from pathlib import Path

import numpy as np

from sparsecontrast.config import compose
from sparsecontrast.data.cache import load_dataset
from sparsecontrast.data.dataset import Dataset

NAMES = ("phantoms", "multisite")
PARTS = ("guangzhou", "mias")  # one origin of the real films; mammograms
FOCAL = {"nodule", "mass", "consolidation"}  # findings of a phantom that a box bounds well
SMALL = 2  # patches; a lesion whose box covers fewer is small


def load_films(name: str, size: int, patch: int, patients: int, root: str | Path, out: str | Path) -> Dataset:
    """Load one data set; the phantoms are the same for every seed of a benchmark.

    Args:
        name: one of ``NAMES`` or of ``PARTS``.
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
        experiment = "mammograms" if name == "mias" else "multisite_cxr"
        told += [f"experiment={experiment}", f"data.root={Path(root).resolve()}"]
    folder = Path(out).resolve()
    found = load_dataset(compose(told), folder / "cache", folder / "state", progress=False)
    return found.site("guangzhou_wcmc") if name == "guangzhou" else found


def labels_by_size(dataset: Dataset, patch: int) -> dict[str, np.ndarray]:
    """Ask for small and for large focal lesions apart: 1, 0 without any, NaN with one of the other size.

    An image is as its largest lesion is.

    Args:
        dataset: with boxes.
        patch: side of a patch in pixels.
    """
    found = np.array([_largest(dataset, i) for i in range(len(dataset))]) / patch**2
    names = {f"lesion under {SMALL} patches": found < SMALL, "larger lesion": found >= SMALL}
    return {name: np.where(found == 0, 0.0, np.where(asked, 1.0, np.nan)) for name, asked in names.items()}


def _largest(dataset: Dataset, i: int) -> float:
    """Pixels of the largest focal lesion's box, 0 without one."""
    pairs = zip(dataset.boxes[i], dataset.box_labels[i], strict=True)
    return max((float(box[2] * box[3]) for box, label in pairs if label in FOCAL), default=0.0)
