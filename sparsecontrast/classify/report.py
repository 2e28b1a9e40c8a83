"""A run of ``classify`` -> ``report.html``: one file that a biologist can read, nothing loaded from anywhere.

No path and no group is written; the pictures show the cells themselves.
"""

import datetime
from pathlib import Path
from typing import Any

import numpy as np

from sparsecontrast.charts import Dot, Line, dot_chart, line_chart
from sparsecontrast.classify.pictures import pictures
from sparsecontrast.classify.run import run_cells
from sparsecontrast.classify.trained import Trained
from sparsecontrast.durable import write_bytes

TEMPLATE = "report.html.j2"


def write_report(run: Trained, evaluation: dict[str, Any]) -> Path:
    """Write ``report.html`` of a judged run and return its path.

    Args:
        run: the run.
        evaluation: of ``run.evaluate``.

    Raises:
        StorageError: the page cannot be written; an older one is intact.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    cells, split = run_cells(run)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template(TEMPLATE).render(
        name=run.folder.name,
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        seed=run.config.seed,
        labs=_labs(run),
        classes=evaluation["classes"],
        images={**run.facts["images"], "test": len(split.test)},
        federated=run.federated is not None,
        strategy=run.facts.get("strategy", ""),
        local_only=_alone(evaluation.get("local_only", {})),
        share=evaluation["pixel_share"],
        words=evaluation["k"],
        patch=run.config.method.patch,
        size=run.config.train.image_size,
        border=run.config.method.border,
        parameters=evaluation["parameters"],
        replicates=evaluation["bootstrap"],
        tested=[_result(one, evaluation["classes"]) for one in evaluation["tested"]],
        scores=_score_chart(evaluation),
        left_out=_left_out(cells.left_out["reason"].tolist()),
        pictures=pictures(run.network, cells, split.test, run.config.evaluation.overlays, run.config.seed),
        charts={"loss": _loss_chart(run), "k": _k_chart(run)},
        epoch=run.facts["epoch"],
        refit=run.facts.get("refit", False),
        seconds=run.facts["seconds"],
    )
    path = run.folder / "report.html"
    write_bytes(path, page.encode())
    return path


def _labs(run: Trained) -> tuple[str, str]:
    """What it was trained and tested on, in words."""
    c = run.config.cells
    trained = " and ".join(c.train_labs) or "all labs"
    tested = " and ".join(c.test_labs) or trained
    return trained, tested


def _result(one: dict[str, Any], classes: list[str]) -> dict[str, Any]:
    counts = np.array(one["confusion"])
    return {
        "lab": "all labs" if one["lab"] == "all" else one["lab"], "images": one["images"],
        "accuracy": _words(one["accuracy"]), "macro_f1": _words(one["macro_f1"]),
        "confusion": [[name, *map(int, row), _share(row[i], row.sum())]
                      for i, (name, row) in enumerate(zip(classes, counts, strict=True))],
    }  # fmt: skip


def _words(score: dict[str, float]) -> str:
    return f"{100 * score['value']:.1f} % ({100 * score['low']:.1f} to {100 * score['high']:.1f})"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "–"


def _alone(found: dict[str, list[dict[str, Any]]]) -> list[tuple[str, str, str, str]]:
    """Rows (trained at, tested on, accuracy, macro-F1) of each lab's own model."""
    return [
        (lab, one["lab"], _words(one["accuracy"]), _words(one["macro_f1"]))
        for lab, tested in found.items()
        for one in tested
    ]


def _score_chart(evaluation: dict[str, Any]) -> Any:
    groups = []
    for title, key in (("macro-F1", "macro_f1"), ("accuracy", "accuracy")):
        dots = [
            Dot(one["lab"], one[key]["value"], one[key]["low"], one[key]["high"], one["lab"] == "all")
            for one in evaluation["tested"]
        ]
        groups.append((title, dots))
    return dot_chart(groups, "scores on held-out cells", "share", chance=None, high=1.0)


def _loss_chart(run: Trained) -> Any:
    if run.federated is not None:
        return _rounds_chart(run.rows)
    rows = _searched(run)
    if not rows:
        return None
    x = [row["epoch"] for row in rows]
    lines = [
        Line("held-out", x, [row["held_out_loss"] for row in rows]),
        Line("held-out, smoothed", x, [row["smoothed"] for row in rows], "dashed", 1),
    ]
    return line_chart(lines, "loss by epoch", "epoch", "cross-entropy", zero=True)


def _rounds_chart(rows: list[dict[str, Any]]) -> Any:
    """The loss that each lab told of each round."""
    labs = sorted({row["site"] for row in rows if row["site"] is not None})
    told = {lab: [row for row in rows if row["site"] == lab and "loss" in row] for lab in labs}
    lines = [
        Line(lab, [row["round"] for row in found], [row["loss"] for row in found], "main", i)
        for i, (lab, found) in enumerate(told.items())
        if found
    ]
    return line_chart(lines, "loss by round", "round", "training loss", zero=True)


def _k_chart(run: Trained) -> Any:
    if run.federated is not None:
        return None
    total, rows = run.network.grid[0] * run.network.grid[1], _searched(run)
    if not rows:
        return None
    x = [row["epoch"] for row in rows]
    lines = [
        Line("pixels read", x, [100 * row["k"] / total for row in rows]),
        Line("at most", x, [100 * run.network.ceiling / total] * len(x), "dashed", 1),
    ]
    return line_chart(lines, "share of the pixels read, by epoch", "epoch", "% of the pixels", zero=True)


def _searched(run: Trained) -> list[dict[str, Any]]:
    """Rows of the pass in which cells were held out; none where k had nothing to choose."""
    return [row for row in run.rows if "held_out_loss" in row]


def _left_out(reasons: list[str]) -> list[tuple[str, int]]:
    return [(reason, reasons.count(reason)) for reason in sorted(set(reasons))]
