"""The table of ``benchmarks.auto_keep``."""

from typing import Any

from benchmarks.committed import markdown, rows

HEAD = ("keep", "at most off", "off by more than", "tokens", "patients off", "worst run", "AUROC", "− dense",
        "time of dense", "one image")  # fmt: skip


def auto_keep() -> str:
    """What each promise saves and was worth, then the same share for every image."""
    return markdown(HEAD, [_line(row) for row in rows("auto-keep-*.json")])


def _line(row: dict[str, Any]) -> list[str]:
    promised = row["keep"] == "auto"
    risks = [f"{row['measured_risk']:.1%}", f"{row['worst_risk']:.1%}"] if promised else ["–", "–"]
    asked = [f"{row['allowed_risk']:.0%}", f"{row['tolerance']:g}"] if promised else ["–", "–"]
    share = f"{row['share']:.3f}" + (
        f" ({row['dense_runs']} of {row['runs']} dense)" if row.get("dense_runs") else ""
    )
    spread = "{minus_dense:+.3f} [{minus_dense_low:+.3f}, {minus_dense_high:+.3f}]".format(**row)
    times = [f"{row['time_of_dense']:.2f}", f"{row['time_of_dense_one']:.2f}"]
    return ["**auto**" if promised else "fixed", *asked, share, *risks, f"{row['auroc']:.3f}", spread, *times]
