"""``python -m benchmarks.fault_cases.reading FOLDER``: read the films there as a site does."""

import json
import sys
from pathlib import Path

import numpy as np

from sparsecontrast.config import compose
from sparsecontrast.data.cache import load_dataset
from sparsecontrast.data.images import read_header, read_image
from sparsecontrast.errors import ImageReadError
from sparsecontrast.overrides import assign


def main() -> None:
    """Index, decode and cache; then look at each image that passed, file by file."""
    folder = Path(sys.argv[1])
    config = compose(
        ["data=dicom", assign("data.root", folder / "films"), "data.chest_only=false", "data.image_size=64",
         "data.frontal_only=false"]
    )  # fmt: skip
    data = load_dataset(config, folder / "cache", folder / "state", progress=False)
    left_out = {Path(path).name: reason for path, reason in
                zip(data.quarantine["path"], data.quarantine["reason"], strict=True)}  # fmt: skip
    decoded = [Path(path).name for path in data.frame["path"]]
    odd = [name for name in decoded if not _as_told(folder / "films" / name)]
    told = {"quarantined": left_out, "decoded": decoded, "odd": odd}
    (folder / "found.json").write_text(json.dumps(told))


def _as_told(path: Path) -> bool:
    """Whether an image is finite, and of the size that its header tells."""
    try:
        image, header = read_image(path), read_header(path)
    except ImageReadError:
        return False
    return bool(np.isfinite(image).all()) and image.shape == (header.height, header.width)


if __name__ == "__main__":
    main()
