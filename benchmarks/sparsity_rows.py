"""One row a contender: its times and memory beside those of the dense references."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.contenders import Contender, Model
from benchmarks.shares import computed
from benchmarks.stopwatch import Ratio, Times, ratio
from sparsecontrast.precision import Precision


@dataclass(frozen=True)
class Cell:
    """What is measured together: one model at one precision, compiled or not."""

    model: Model
    precision: Precision
    compiled: bool

    def key(self) -> dict[str, Any]:
        """Name the cell in its rows."""
        changes = " ".join(f"{name}={value}" for name, value in self.model.changes)
        return {
            "backbone": self.model.backbone, "size_px": self.model.size,
            "cell": self.precision + (" compiled" if self.compiled else ""),
            **({"changes": changes} if changes else {}),
        }  # fmt: skip


def fold(
    cell: Cell, phase: str, images: int, times: Mapping[Contender, Times], references: Sequence[Contender],
    memory: Mapping[Contender, Mapping[str, float]],
) -> list[dict[str, Any]]:  # fmt: skip
    """Fold one phase of a cell into one row a contender; the first of the references is stock timm."""
    stock = references[0]
    equal = [
        c for c in references
        if (c.method, c.precision, c.compiled) == ("dense", cell.precision, cell.compiled)
    ]  # fmt: skip
    fastest = max(equal, key=lambda c: ratio(times[equal[0]], times[c]).median)
    rows = []
    for contender, time in times.items():
        told = {
            **cell.key(), "precision": contender.precision, "compiled": contender.compiled,
            "method": contender.method, "keep": contender.keep,
            **computed(contender.method, contender.keep, cell.model).row(),
            "attention": contender.attention,
            "phase": phase, "images": images, "reference_attention": fastest.attention,
            **_spread("ratio_equal_precision", ratio(times[fastest], time)),
            **_spread("ratio_stock_fp32", ratio(times[stock], time)),
            "cost_ms": 1e3 * _median(time.cost), "wall_ms": 1e3 * _median(time.wall),
            "repeats": len(time.cost),
        }  # fmt: skip
        for name, value in memory.get(contender, {}).items():
            what = name.removesuffix("_mib")
            told[name] = value
            least = [memory[c][name] for c in equal if name in memory.get(c, {})]
            told |= {f"{what}_share_equal_precision": value / min(least)} if least else {}
            told |= {f"{what}_share_stock_fp32": value / memory[stock][name]}
        rows.append(told)
    return rows


def _spread(name: str, found: Ratio) -> dict[str, float]:
    return {name: found.median, f"{name}_low": found.low, f"{name}_high": found.high}


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
