"""The table of ``benchmarks.wire``."""

from benchmarks.committed import markdown, rows

HEAD = ("what travels", "MB up a round", "MB down", "AUROC", "− fp32", "each seed")


def wire() -> str:
    """Megabytes of all sites together, and AUROC less that of the same run in fp32."""
    body = []
    for row in rows("wire-*.json"):
        plain = not row["minus_fp32_of_seeds"] or not any(row["minus_fp32_of_seeds"])
        spread = "{minus_fp32:+.4f} [{low:+.4f}, {high:+.4f}]".format(**row)
        seeds = " ".join(f"{value:+.4f}" for value in row["minus_fp32_of_seeds"])
        told = ["–", "–"] if plain else [spread, seeds]
        sizes = [f"{row['megabytes_up']:.1f}", f"{row['megabytes_down']:.1f}"]
        body.append([row["wire"], *sizes, f"{row['auroc']:.3f}", *told])
    return markdown(HEAD, body)
