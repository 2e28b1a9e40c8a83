"""The figure of the README from the figures of `benchmarks.multisite`.

python -m benchmarks.multisite_plot benchmarks/results/multisite-cpu.json docs/multisite.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

ORDER = {
    "federated sparse": "federated, sparse",
    "federated dense": "federated, dense",
    "local_only": "each site alone",
    "centralised": "all images in one place",
    "pixels": "raw 16x16 pixels",
    "random_init": "untrained network",
}
OURS, OTHERS = "#0b6e8f", "#8a8f94"


def main(argv: list[str] | None = None) -> None:
    """Draw one panel a task: probe AUROC with all labels, its interval, and the seeds as ticks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path, help="JSON of benchmarks.multisite")
    parser.add_argument("target", type=Path, help="PNG")
    args = parser.parse_args(argv)
    rows = json.loads(args.source.read_text())["rows"]
    rows = [r for r in rows if r["metric"] == "linear_probe_auroc" and r["labels"] == 1.0]
    if not rows:
        parser.error(f"{args.source}: holds no linear_probe_auroc with all labels")
    args.target.parent.mkdir(parents=True, exist_ok=True)
    draw(rows, args.target)


def draw(rows: list[dict[str, Any]], target: Path) -> None:
    """Write the PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(11, 2.7), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, task in zip(figure.subplots(1, len(tasks), sharey=True), tasks, strict=True):
        _panel(axes, [row for row in rows if row["task"] == task])
        axes.set_title(task, fontsize=10)
    figure.supxlabel("AUROC of a linear probe on held-out patients", fontsize=9)
    figure.savefig(target)


def _panel(axes: Any, rows: list[dict[str, Any]]) -> None:
    found = {row["features"]: row for row in rows}
    for place, name in enumerate(ORDER):
        row = found[name]
        colour = OURS if name == "federated sparse" else OTHERS
        axes.hlines(place, row["low"], row["high"], color=colour, linewidth=2)
        axes.plot(row["auroc"], place, "o", color=colour, markersize=7)
        axes.plot(row["seeds"], [place] * len(row["seeds"]), "|", color="black", markersize=7)
        label = f"{row['auroc']:.3f}"
        axes.annotate(label, (row["high"], place), (5, -3), textcoords="offset points", fontsize=8)
    axes.set_yticks(range(len(ORDER)), list(ORDER.values()), fontsize=9)
    axes.set_ylim(len(ORDER) - 0.5, -0.5)
    axes.margins(x=0.25)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="#e6e6e6")
    axes.spines[["top", "right", "left"]].set_visible(False)


if __name__ == "__main__":
    main()
