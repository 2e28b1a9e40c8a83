"""The picture of a privacy sweep: utility, membership and the audited bound against epsilon."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsecontrast.durable import write_bytes

AXIS = "epsilon"
ENDLESS = "inf"
COLOURS = ("#0b6e8f", "#c8553d", "#6b8f3a", "#7a5195", "#ad8a1f", "#444444")
PANELS = (
    ("auroc", "AUROC of a linear probe", None),
    ("membership", "AUROC of membership inference", 0.5),
    ("epsilon_at_least", "epsilon at least, audited", None),
)
Row = dict[str, Any]


def write_plot(rows: Sequence[Row], folder: Path) -> Path | None:
    """Write ``sweep.png``; None, and nothing written, where no axis is called epsilon or nothing is done.

    One line a group of runs that differ in epsilon alone, one row of panels a task. Dashed is the level of
    the weights that the runs of a line started from. Panels of which nothing is known are left out.
    """
    if not rows or any(AXIS not in row["group"] for row in rows):
        return None
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places = _places(rows)
    shown = [p for p in PANELS if any(row.get(p[0]) is not None for row in rows)]
    scenes = list(dict.fromkeys((_scene(row), row["task"]) for row in rows))
    figure = Figure(figsize=(4.6 * len(shown) + 1.4, 3.1 * len(scenes) + 0.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(scenes), len(shown), squeeze=False)
    for line, scene in zip(grid, scenes, strict=True):
        mine = [row for row in rows if (_scene(row), row["task"]) == scene]
        for axes, (key, title, chance) in zip(line, shown, strict=True):
            _panel(axes, mine, key, chance, places)
            axes.set_title(title, fontsize=9)
        line[0].set_ylabel(" ".join(part for part in scene if part), fontsize=9)
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    target = folder / "sweep.png"
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_bytes(target, picture.getvalue())
    return target


def _panel(
    axes: Any, rows: Sequence[Row], key: str, chance: float | None, places: dict[str, int]
) -> None:  # fmt: skip
    lines = list(dict.fromkeys(_line(row) for row in rows))
    for number, name in enumerate(lines):
        mine = sorted((r for r in rows if _line(r) == name), key=lambda r: places[r["group"][AXIS]])
        mine = [row for row in mine if row.get(key) is not None]
        if not mine:
            continue
        colour, aside = COLOURS[number % len(COLOURS)], 0.06 * (number - (len(lines) - 1) / 2)
        x = [places[row["group"][AXIS]] + aside for row in mine]
        axes.plot(x, [row[key] for row in mine], "o-", color=colour, markersize=4, linewidth=1.4, label=name)
        for place, row in zip(x, mine, strict=True):
            if row.get(f"{key}_low") is not None:
                axes.vlines(place, row[f"{key}_low"], row[f"{key}_high"], color=colour, linewidth=1.2)
        if key == "auroc" and mine[0].get("start") is not None:
            axes.axhline(mine[0]["start"], color=colour, linestyle="--", linewidth=0.9)
    if key == "epsilon_at_least":
        finite = {name: place for name, place in places.items() if name != ENDLESS}
        axes.plot(list(finite.values()), list(map(float, finite)), "k_", markersize=14, label="promised")
    if chance is not None:
        axes.axhline(chance, color="#8a8f94", linestyle=":", linewidth=0.9)
    axes.set_xticks(list(places.values()), ["∞" if n == ENDLESS else n for n in places], fontsize=8)
    axes.set_xlabel("epsilon", fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="y", color="#e6e6e6")
    axes.spines[["top", "right"]].set_visible(False)


def _places(rows: Sequence[Row]) -> dict[str, int]:
    """Where each epsilon stands on the axis: rising, the endless one last."""
    names = {row["group"][AXIS] for row in rows}
    return {name: place for place, name in enumerate(sorted(names, key=float))}


def _scene(row: Row) -> str:
    """What the panels of one row have in common: the images."""
    return str(row["group"].get("images", ""))


def _line(row: Row) -> str:
    """What the points of one line have in common."""
    return ", ".join(f"{a} {v}" for a, v in row["group"].items() if a not in (AXIS, "images")) or "all"
