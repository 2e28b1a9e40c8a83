"""The table of ``benchmarks.miram_step``."""

from benchmarks.committed import markdown, rows


def miram_step() -> str:
    """Cost of a step over that of a plain masked autoencoder, the range of the turns in brackets."""
    found = {(row["arm"], row["precision"]): row for row in rows("miram-step-*.json")}
    precisions = list(dict.fromkeys(precision for _, precision in found))
    head = ["", *(text for p in precisions for text in (f"{p}, CPU ms", "of the plain one"))]
    body = []
    for arm in dict.fromkeys(name for name, _ in found):
        mine = [found[arm, p] for p in precisions]
        told = [
            (f"{r['cpu_ms']:.0f}", f"{r['of_mae']:.2f} ({r['least']:.2f} to {r['most']:.2f})") for r in mine
        ]
        body.append([arm, *(text for pair in told for text in pair)])
    return markdown(head, body)
