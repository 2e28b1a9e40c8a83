"""Who got what: the table and the picture of a partition."""

from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from sparsecontrast.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

LABEL = "label_"
BLUES = ("#1f4e79", "#6fa8dc", "#cfe2f3")
"""Of train, val and test."""


def partition_table(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Count, per site: images, patients, and images with each label (columns named by the labels).

    Returns:
        One row a site, by name; columns ``site``, ``images``, ``patients``, then the labels.
    """
    columns = [name for name in frame.columns if name.startswith(LABEL)]
    groups = frame.groupby("site", sort=True)
    table = groups.agg(images=("image_id", "size"), patients=("patient_id", "nunique"))
    positives = groups[columns].sum().astype(int).rename(columns=lambda name: name.removeprefix(LABEL))
    return table.join(positives).reset_index()


def plot_partition(frame: "pd.DataFrame", target: Path | str | IO[bytes]) -> None:
    """Draw who got what as stacked bars, images by split above, labels below; a PNG.

    Args:
        frame: an index.
        target: a path, or a file open for writing bytes.

    Raises:
        DataError: there is nothing to draw.
    """
    if frame.empty:
        raise DataError("no images: there is no partition to draw")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    table = partition_table(frame).set_index("site")
    splits = frame.groupby(["site", "split"]).size().unstack(fill_value=0).reindex(table.index)
    splits = splits[[name for name in ("train", "val", "test") if name in splits]]
    labels = table.drop(columns=["images", "patients"])
    panels: list[tuple[str, pd.DataFrame, Any]] = [("images", splits, BLUES)]
    if labels.to_numpy().sum() > 0:
        colours = matplotlib.colormaps["tab20" if labels.shape[1] > 10 else "tab10"]
        panels.append(("images with label", labels, [colours(i % colours.N) for i in range(labels.shape[1])]))
    figure = Figure(figsize=(3.0 + 0.55 * len(table), 2.7 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, counts, colours) in zip(rows, panels, strict=True):
        _bars(axes, counts, colours)
        axes.set_ylabel(title)
    rows[-1].tick_params(axis="x", labelrotation=90 if len(table) > 6 else 0)
    figure.savefig(target, format="png", dpi=110)


def _bars(axes: Any, counts: "pd.DataFrame", colours: Any) -> None:
    """Stack one bar a row of ``counts``, one layer a column."""
    floor = np.zeros(len(counts))
    for name, colour in zip(counts.columns, colours, strict=False):
        heights = counts[name].to_numpy(float)
        axes.bar(counts.index.astype(str), heights, bottom=floor, label=name, color=colour, width=0.75)
        floor += heights
    axes.spines[["top", "right"]].set_visible(False)
    handles, names = axes.get_legend_handles_labels()  # the topmost layer first, as in the bars
    axes.legend(
        handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False
    )
