"""The tables of ``benchmarks.sparsity``."""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.committed import markdown, rows
from benchmarks.shares import computed_of_row

NAMES = {"sparse_contrast": "**SparseContrast**"}
SHARE_HEAD = ("kept", "fine cells", "tokens")
SPEED_HEAD = (
    "network", "px", "precision", *SHARE_HEAD, "train x equal", "x stock", "infer x equal", "x stock", "peak",
)  # fmt: skip
HEAD = (
    "method", *SHARE_HEAD, "train x equal", "x stock", "infer x equal", "x stock", "one image x equal",
    "x stock", "saved", "peak",
)  # fmt: skip
COLUMNS = (
    ("train", "ratio_equal_precision"), ("train", "ratio_stock_fp32"), ("infer_n", "ratio_equal_precision"),
    ("infer_n", "ratio_stock_fp32"), ("infer_1", "ratio_equal_precision"), ("infer_1", "ratio_stock_fp32"),
    ("train", "saved_share_equal_precision"), ("train", "peak_share_equal_precision"),
)  # fmt: skip
SPEED_COLUMNS = (*COLUMNS[:4], COLUMNS[-1])
Phases = dict[str, dict[str, Any]]


def sparsity() -> str:
    """Time and memory of every contender, one table a model, size and precision."""
    found: dict[tuple[str, int, str], dict[tuple[str, float, str], Phases]] = {}
    for row in rows("sparsity-*.json"):
        cell = found.setdefault((row["backbone"], row["size_px"], row["cell"]), {})
        cell.setdefault((row["method"], row["keep"], row["attention"]), {})[row["phase"]] = row
    tables = {key: markdown(HEAD, list(_contenders(cell, key[2]))) for key, cell in found.items()}
    return "\n\n".join(f"{key[0]}, {key[1]} px, {key[2]}:\n\n{table}" for key, table in tables.items())


def speed(keeps: Sequence[float]) -> str:
    """SparseContrast at some shares of the tokens, one line a network, size and precision."""
    found: dict[tuple[str, int, float, str], Phases] = {}
    for row in rows("sparsity-*.json"):
        if row["method"] == "sparse_contrast" and row["keep"] in keeps:
            key = (row["backbone"], row["size_px"], row["keep"], row["cell"])
            found.setdefault(key, {})[row["phase"]] = row
    body = []
    for (backbone, size, _, cell), phases in sorted(found.items(), key=lambda item: item[0][:2]):
        told = [*_share(phases["infer_n"]), *_figures(phases, SPEED_COLUMNS)]
        body.append([backbone.replace("_", "-"), str(size), cell, *told])
    return markdown(SPEED_HEAD, body)


def _contenders(cell: dict[tuple[str, float, str], Phases], precision: str) -> Iterator[list[str]]:
    for (method, _, attention), phases in cell.items():
        one = phases["infer_n"]
        if method in ("dense", "stock") and (
            one["precision"] not in precision or one["compiled"] != ("compiled" in precision)
        ):
            continue  # the stock reference, which has its own table
        name = method.replace("_", " ") + (f" ({attention})" if method == "dense" else "")
        yield [NAMES.get(method, name), *_share(one), *_figures(phases, COLUMNS)]


def _share(row: dict[str, Any]) -> list[str]:
    """The share that was asked for, fine cells of all, and the share of the tokens that this comes to."""
    found = computed_of_row(row)
    fine = "–" if found.fine_cells is None else f"{found.fine_cells} of {found.cells}"
    tokens = "–" if found.token_share is None else f"{found.token_share:.3g}"
    return [f"{row['keep']:.2g}", fine, tokens]


def _figures(phases: Phases, columns: Sequence[tuple[str, str]]) -> list[str]:
    figures = [phases.get(phase, {}).get(key) for phase, key in columns]
    return ["–" if f is None else f"{f:.2f}" for f in figures]
