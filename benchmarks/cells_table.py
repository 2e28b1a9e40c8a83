"""The tables of ``benchmarks.cells`` and ``benchmarks.cells_federated``."""

from typing import Any

from benchmarks.committed import markdown, rows

NAMES = {
    "sparse_attn_net": "**SparseAttnNet**",
    "sparse_attn_net_15": "SparseAttnNet, k held",
    "small_cnn": "small CNN",
    "vit_tiny": "ViT-tiny",
}
HEAD = (
    "task", "arm", "macro-F1", "− CNN", "accuracy", "pixels", "weights", "MFLOP", "time x CNN", "of 32",
    "each seed",
)  # fmt: skip
JUDGES = {
    "federated": "**federated**", "pooled": "pooled", "own": "alone, the lab's own",
    "other": "alone, the other lab's",
}  # fmt: skip
TOGETHER = {"mean": "mean of labs", "all": "all cells"}


def cells() -> str:
    """Scores of every arm with intervals over seeds, and what it costs."""
    return markdown(HEAD, [_line(row) for row in rows("cells-*.json")])


def federated_cells() -> str:
    """Scores of every arm at each lab and together, and what the federated one has more, with intervals."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows("federated-cells-*.json"):
        found.setdefault(row["arm"], {})[row["cells"]] = row
    labs = [name for name in next(iter(found.values()), {}) if name not in TOGETHER]
    head = ["model", *labs]
    for name in TOGETHER.values():
        head += [name, "federated − it"]
    body = []
    for arm, mine in found.items():
        line = [JUDGES[arm], *(_spread(mine[lab], "macro_f1", "{:.3f}") for lab in labs)]
        for name in TOGETHER:
            line += [_spread(mine[name], "macro_f1", "{:.3f}"), _spread(mine[name], "minus", "{:+.3f}")]
        body.append([*line, mine["mean"]["each_seed"]])
    return markdown([*head, "mean of labs, each seed"], body)


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
