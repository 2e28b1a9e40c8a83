"""Are a lab's pictures of cells what they should be: table, labels, files. Says counts, never which."""

from collections.abc import Iterator, Sequence

import numpy as np

from sparsecontrast.doctor.finding import Finding
from sparsecontrast.errors import DataError, ImageReadError

LOOKED_AT = 24  # pictures that are opened
SIDE = 64


def pictures(told: Sequence[str]) -> Iterator[Finding]:
    """Read the table and open some pictures.

    Args:
        told: overrides of the site's file.
    """
    from sparsecontrast.classify.listing import find_pictures
    from sparsecontrast.data.colour import read_colour
    from sparsecontrast.federated.cells import own_cells

    try:
        root, table = find_pictures(own_cells(told))
    except DataError as error:  # its text may name files
        yield Finding("FAIL", "cells", f"no pictures are found: {error.code}", "see cells.* of site.yaml")
        return
    labels = table["label"].astype(str)
    what = (
        f"{len(table)} pictures of {labels[labels != ''].nunique()} classes, {table['lab'].nunique()} lab(s)"
    )
    unlabelled = int((labels == "").sum())
    if unlabelled:
        yield Finding("warn", "cells", f"{what}, {unlabelled} without a label", "these are left out")
    else:
        yield Finding("ok", "cells", what)
    chosen = np.unique(np.linspace(0, len(table) - 1, min(LOOKED_AT, len(table))).round().astype(int))
    broken = 0
    for path in table["path"].iloc[chosen].astype(str):
        try:
            read_colour(root / path, SIDE)
        except ImageReadError:
            broken += 1
    told_of = f"{len(chosen)} looked at, {broken} unreadable"
    if not broken:
        yield Finding("ok", "cells", told_of)
    else:
        level = "FAIL" if broken > len(chosen) / 2 else "warn"
        yield Finding(level, "cells", told_of, "is cells.root the folder that the table's paths start from?")
