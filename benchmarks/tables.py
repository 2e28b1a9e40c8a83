"""The tables of the READMEs, made from the committed results: no figure is typed.

    python -m benchmarks.tables [--check]

Rewrites what stands between ``<!-- table NAME -->`` and ``<!-- end -->`` in ``README.md`` and
``benchmarks/README.md``; ``--check`` says which files would change, and fails if one would.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.auto_keep_table import auto_keep
from benchmarks.cells_table import cells, federated_cells
from benchmarks.committed import Rows, markdown, rows
from benchmarks.denoise_table import denoise_equal, denoise_gains, denoise_noise
from benchmarks.fault_cases.case import withstood
from benchmarks.miram_step_table import miram_step
from benchmarks.sparsity_table import sparsity, speed
from benchmarks.sweep_tables import gains, leaks
from benchmarks.wire_table import wire

HERE = Path(__file__).parent
READMES = (HERE / "README.md", HERE.parent / "README.md")
MARKED = re.compile(r"(<!-- table (?P<name>\S+) -->\n).*?(?=<!-- end -->)", re.DOTALL)
OURS = {"ours": "**ours**", "surprise": "**surprise**"}


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite or check both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args(argv).check
    stale = [path for path in READMES if (text := path.read_text()) != fill(text)]
    for path in stale:
        print(f"{path.relative_to(HERE.parent)}: {'is stale' if check else 'rewritten'}")
        if not check:
            path.write_text(fill(path.read_text()))
    return int(check and bool(stale))


def fill(text: str) -> str:
    """Put today's tables between the marks.

    Raises:
        KeyError: no table has a name that is marked.
    """
    return MARKED.sub(lambda found: f"{found[1]}\n{TABLES[found['name']]()}\n\n", text)


BAR = (("phantoms", 7, "2 and more"), ("multisite", 7, "2 and more"))
GROUPS = (
    BAR[0], ("phantoms", 7, "2 to 8"), ("phantoms", 7, "under 2"), ("phantoms", 12, "2 and more"), BAR[1],
    ("multisite", 7, "all"), ("multisite", 12, "all"),
)  # fmt: skip
FEW = tuple((data, m, "2 and more") for data in ("phantoms", "multisite") for m in (1, 3))


def localisation(asked: Sequence[tuple[str, int, str]], file: str = "localisation-cpu.json") -> str:
    """Recall over chance of every selector, the mean of the seeds and the worst; how alike choices are."""
    found = {(r["selector"], r["data"], r["m"], r["group"]): r for r in rows(file)}
    names = {"phantoms": "phantoms", "multisite": "real"}
    head = [
        "selector",
        *(f"{names[data]}, {m} {'cells' if m > 1 else 'cell'}, {group}" for data, m, group in asked),
        "same",
    ]
    body = []
    for selector in dict.fromkeys(key[0] for key in found):
        same = statistics.mean(found[selector, "phantoms", 7, "all"]["sameness"])
        cells = [_over_chance(found.get((selector, *one))) for one in asked]
        body.append([OURS.get(selector, selector.replace("_", " ")), *cells, f"{same:.2f}"])
    return markdown(head, body)


def _over_chance(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    return f"{statistics.mean(row['over_chance']):.2f} ({min(row['over_chance']):.2f})"


PHANTOMS = (("all findings", "macro"), ("by size", "lesion under 2 patches"), ("by size", "larger lesion"))
REAL = (("bacterial against viral", None), ("pneumonia against normal", None), ("NIH findings", "macro"))
BREASTS = (("normal or benign or malignant", "macro"), ("malignant against benign", None))


def quality(
    data: str,
    asked: Sequence[tuple[str, str | None]],
    file: str = "quality-cpu.json",
    reference: str = "dense",
) -> str:
    """AUROC of every arm, and the paired differences with their intervals over patients and seeds."""
    found: dict[str, Rows] = {}
    for row in rows(file):
        if row["data"] == data and "auroc" in row:
            found.setdefault(row["arm"], []).append(row)
    head = ["arm", "steps", "CPU s"]
    head += [
        text
        for task, label in asked
        for text in (label if label not in (None, "macro") else task, f"− {reference}", "ours − it")
    ]
    body = []
    for arm, mine in found.items():
        cells = [text for one in asked for text in _difference(mine, *one, reference)]
        steps, seconds = (mine[0].get(f"mean_{key}") for key in ("steps", "train_seconds"))
        told = ["–" if value is None else f"{value:.0f}" for value in (steps, seconds)]
        body.append([OURS.get(arm, arm.replace("_", " ")), *told, *cells])
    return markdown(head, body)


def _difference(mine: Rows, task: str, label: str | None, reference: str = "dense") -> tuple[str, str, str]:
    """AUROC, and both differences with their intervals; of a task's only label where ``label`` is None."""
    row = next((r for r in mine if r["task"] == task and label in (None, r["label"])), None)
    if row is None:
        return "–", "–", "–"
    return f"{row['auroc']:.3f}", _spread(row, f"minus_{reference}"), _spread(row, "ours_minus")


def _spread(row: dict[str, Any], key: str) -> str:
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    return "–" if low is None or high is None else f"{row[key]:+.3f} [{low:+.3f}, {high:+.3f}]"


def epoch() -> str:
    """Speed-up of the epoch beside that of its steps."""
    head = ("size", "precision", "kept", "steps", "epoch", "epoch / steps")
    figures = ("steps_speedup", "epoch_speedup", "epoch_share")
    return markdown(
        head,
        [
            [f"{r['size_px']}", r["precision"], f"{r['keep']:g}", *(f"{r[key]:.2f}" for key in figures)]
            for r in rows("epoch-*.json")
        ],
    )


def borders() -> str:
    """Error of a tile's features by halo, over that of what tells tiles apart in brackets; the work last."""
    found = {(r["network"], r["size"], r["tiles"], r["halo"]): r for r in rows("borders-cpu.json")}
    halos = sorted({key[3] for key in found})
    body = []
    for network, size, count in dict.fromkeys(key[:3] for key in found):
        mine = [found.get((network, size, count, halo)) for halo in halos]
        errors = ["–" if r is None else f"{r['error']:.2f} ({r['of_spread']:.2f})" for r in mine]
        work = " / ".join(f"{r['work']:.2f}" for r in mine if r is not None)
        body.append([network.replace("_", " "), f"{size} px, {count} x {count}", *errors, work])
    return markdown(["network", "tiles", *(f"halo {halo} px" for halo in halos), "work"], body)


def audit() -> str:
    """Lower bounds of epsilon beside the claim and beside those of exact runs."""
    head = ("setting", "run", "claim", "lower bound", "right guesses", "exact runs", "largest possible", "")
    body = []
    for r in rows("audit-*.json"):
        exact = f"{r['exact_least']:.2f} to {r['exact_most']:.2f}" if "exact_least" in r else "–"
        name = r["contender"].replace("ours", "**ours**") if r["sound"] else r["contender"]
        told = [f"{r['correct']} of {r['guesses']}", exact, f"{r['ceiling']:.2f}", r["verdict"]]
        body.append([r["setting"], name, f"{r['claim']:.0f}", f"{r['lower_bound']:.2f}", *told])
    return markdown(head, body)


def faults() -> str:
    """Every group of injected faults: how many cases, and how many were withstood."""
    found: dict[str, Rows] = {}
    for row in rows("faults-cpu.json"):
        found.setdefault(row["group"], []).append(row)
    body = [[group, FAULTS[group], withstood(cases)] for group, cases in found.items()]
    return markdown(("group", "what is done", "withstood"), body)


def small_maps() -> str:
    """Matrix products against convolutions, by layer."""
    head = ["network", "layer", "map", "precision", "forward and backward x", "forward x"]
    body = [
        [
            row["network"], _layer(row), f"{row['pixels']} x {row['pixels']}", row["precision"],
            f"{row['step_ratio']:.2f}", f"{row['infer_ratio']:.2f}",
        ]
        for row in rows("small-maps-cpu.json")
    ]  # fmt: skip
    return markdown(head, body)


DECODERS = {
    "eager": "eager", "linformer": "Linformer", "performer": "Performer", "performer_256": "of 256",
    "nystromformer": "Nystromformer",
}  # fmt: skip


def decoders() -> str:
    """Times faster than fused softmax attention, and how many times leaner, by tokens."""
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows("decoders-*.json"):
        if "x_fused" in row:
            key = (row["part"], row["precision"], row["batch"], row["tokens"])
            found.setdefault(key, {})[row["name"]] = row
    head = ["", "precision", "images", "tokens", "fused ms", "peak MiB", *DECODERS.values()]
    body = []
    for key, mine in found.items():
        told = [
            f"{mine[name]['x_fused']:.2f} / {mine[name]['leaner_fused']:.2f}" if name in mine else "–"
            for name in DECODERS
        ]
        fused = mine["fused"]
        body.append(
            [*(str(part) for part in key), f"{fused['cost_ms']:.0f}", f"{fused['peak_mib']:.1f}", *told]
        )
    return markdown(head, body)


def decoders_break_even() -> str:
    """From how many tokens on a linear attention is faster than fused softmax attention."""
    found: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in rows("decoders-*.json"):
        if row.get("break_even_of") == "time":
            after, before, tokens = row["after"], row["before"], row["tokens"]
            told = (
                f"{tokens} ({after} to {before})"
                if tokens
                else f"by {before}"
                if before
                else f"after {after}"
            )
            found.setdefault((row["part"], row["precision"], row["batch"]), {})[row["name"]] = told
    names = [name for name in DECODERS if name != "eager"]
    head = ["", "precision", "images", *(DECODERS[name] for name in names)]
    body = [[*(str(part) for part in key), *(mine[name] for name in names)] for key, mine in found.items()]
    return markdown(head, body)


def privacy() -> str:
    """What a private step costs, beside one without privacy and plain Opacus."""
    names = {"timm": "timm", "patch_contrast": "**ours**", "opacus_hooks": "Opacus, hooks"}
    names |= {
        "opacus_ghost": "Opacus, ghost clipping",
        "opacus_frozen": "Opacus, hooks, tokens and positions frozen",
    }
    head = [
        "network", "precision", "step", "private", "kept", "ms", "of dense", "of its own without",
        "Opacus takes x", "peak MiB",
    ]  # fmt: skip
    body = []
    for row in rows("privacy-cpu.json"):
        more = [f"{row['pieces']} pieces"] if row["pieces"] > 1 else []
        more += [f"{row['films']} films a patient"] if row["films"] > 1 else []
        told = [row.get(key) for key in ("of_dense", "of_own", "opacus_ratio")]
        body.append(
            [
                row["backbone"].replace("_", "-"), row["precision"], ", ".join([names[row["method"]], *more]),
                "yes" if row["private"] else "no", f"{row['keep']:.2g}", f"{row['cost_ms']:.0f}",
                *("–" if value is None else f"{value:.2f}" for value in told), f"{row['peak_mib']:.0f}",
            ]
        )  # fmt: skip
    return markdown(head, body)


def _layer(row: dict[str, Any]) -> str:
    kind = "depthwise, " if row["groups"] > 1 else ""
    stride = f", stride {row['stride']}" if row["stride"] > 1 else ""
    return f"{row['kernel']} x {row['kernel']}, {kind}{row['channels_in']} to {row['channels_out']}{stride}"


FAULTS = {
    "replies": "NaN, infinity, scaled, other shapes, names, types, stale, replayed, cut, too long, pickles",
    "sites": "dropped, slow, flapping, killed, three answers for one; ten sites, quorum of five",
    "inputs": "100 broken DICOM files, 100 with random bytes, pickles in place of every file that is read",
    "storage": "a full disk at each write of server and site; flipped bits, cut and lost files",
    "transport": "wrong authority, wrong name, expired, unregistered key, plain HTTP; one with nothing wrong",
    "byzantine": "updates turned round, ten times as long, or both, 2 of 10: AUROC within 0.02; controls",
    "soak": "24 rounds of ten sites: memory, files, processes, ports",
    "crash": "kill -9 of client process, ServerApp, SuperNode, SuperLink in each phase, then `resume=`",
    "network": "a hospital's line cut, silently: in training, amid weights and answers; all lines at once",
}
TABLES: dict[str, Callable[[], str]] = {
    "sparsity": sparsity,
    "speed": lambda: speed((0.5, 0.25)),
    "small-maps": small_maps,
    "decoders": decoders,
    "decoders-break-even": decoders_break_even,
    "miram-step": miram_step,
    "privacy": privacy,
    "sweep-gains": gains,
    "sweep-leaks": leaks,
    "cells": cells,
    "federated-cells": federated_cells,
    "localisation": lambda: localisation(GROUPS),
    "localisation-few": lambda: localisation(FEW, "localisation-few-cells-cpu.json"),
    "localisation-bar": lambda: localisation(BAR),
    "quality-phantoms": lambda: quality("phantoms", PHANTOMS),
    "quality-real": lambda: quality("multisite", REAL),
    "quality-miram-phantoms": lambda: quality("phantoms", PHANTOMS, "quality-miram-cpu.json", "mae"),
    "quality-miram-guangzhou": lambda: quality("guangzhou", REAL[:2], "quality-miram-cpu.json", "mae"),
    "quality-miram-mias": lambda: quality("mias", BREASTS, "quality-miram-cpu.json", "mae"),
    "auto-keep": auto_keep,
    "denoise-gains": denoise_gains,
    "denoise-equal": denoise_equal,
    "denoise-noise": denoise_noise,
    "borders": borders,
    "epoch": epoch,
    "audit": audit,
    "faults": faults,
    "wire": wire,
}

if __name__ == "__main__":
    sys.exit(main())
