"""The table of ``benchmarks.cells``."""

from typing import Any

from benchmarks.committed import markdown, rows

NAMES = {"sparse_attn_net": "**SparseAttnNet**", "small_cnn": "small CNN", "vit_tiny": "ViT-tiny"}
HEAD = (
    "task", "arm", "macro-F1", "− CNN", "accuracy", "pixels", "weights", "MFLOP", "time x CNN", "of 32",
    "each seed",
)  # fmt: skip


def cells() -> str:
    """Scores of every arm with intervals over seeds, and what it costs."""
    return markdown(HEAD, [_line(row) for row in rows("cells-*.json")])


def _line(row: dict[str, Any]) -> list[str]:
    return [
        row["task"], NAMES.get(row["arm"], str(row["arm"])), _spread(row, "macro_f1", "{:.3f}"),
        _spread(row, "delta", "{:+.3f}"), _spread(row, "accuracy", "{:.3f}"), f"{row['pixels_read']:.1%}",
        f"{row['parameters']:,}", f"{row['mflops']:.1f}", f"{row['time_of_cnn_1']:.2f}",
        f"{row['time_of_cnn_32']:.2f}", row["each_seed"],
    ]  # fmt: skip


def _spread(row: dict[str, Any], key: str, form: str) -> str:
    if key not in row:
        return "–"
    return f"{form} [{form}, {form}]".format(row[key], row[f"{key}_low"], row[f"{key}_high"])
