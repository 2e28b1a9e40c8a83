"""What a smaller payload costs: bytes a round, and the AUROC beside the same run with fp32 on the wire.

    python -m benchmarks.wire [--quick] [--seeds 3] [--out DIR] [--json FILE]

One federation a seed and a wire: ``experiment=laptop``, with all else alike. minus_fp32 is the mean over
seeds of the difference in AUROC of a linear probe on held-out phantoms; its interval resamples patients and
seeds together. Runs are kept under ``--out`` and continued when the command is given again.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import print_table, write_result
from sparsecontrast import probes
from sparsecontrast.evaluation import run_name
from sparsecontrast.item_scores import pooled, read_scores
from sparsecontrast.overrides import assign
from sparsecontrast.runs import CONFIG, Run, read_evaluation, read_run

FULL = "fp32"
WIRES: dict[str, tuple[str, ...]] = {
    FULL: (),
    "fp16": ("federation.payload_dtype=fp16",),
    "fp16, updates": ("federation.payload_dtype=fp16", "federation.upload=delta"),
    "int8, updates": ("federation.payload_dtype=fp16", "federation.upload=delta_int8"),
}
COMMON = (
    "experiment=laptop", "evaluation.baselines=[]", "evaluation.label_fractions=[1.0]",
    "evaluation.overlays=0",
)  # fmt: skip
QUICK = (
    "federation.rounds=2", "backbone.depth=1", "data.phantom.patients_per_site=24", "evaluation.bootstrap=50",
)  # fmt: skip
REPLICATES = 2000
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds of a tiny network, one seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="folder of the runs; default a temporary one")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(argv)
    seeds = range(1 if args.quick else args.seeds)
    with tempfile.TemporaryDirectory() as scratch:
        out = (args.out or Path(scratch)).resolve()
        runs = {
            wire: [federate(out, wire, seed, QUICK if args.quick else ()) for seed in seeds] for wire in WIRES
        }
        rows = [compared(wire, found, runs[FULL]) for wire, found in runs.items()]
    print_table("Wire", rows)
    if args.json:
        command = f"python -m benchmarks.wire{' --quick' if args.quick else f' --seeds {args.seeds}'}"
        write_result("wire", command, rows, args.json)


def federate(out: Path, wire: str, seed: int, more: Sequence[str]) -> Run:
    """Run one federation to its scores, or find it done."""
    words = [*COMMON, *WIRES[wire], *more, f"seed={seed}"]
    # of other words is another run, --quick among them
    folder = out / f"{wire.replace(', ', '-')}-{seed}-{hashlib.sha256(repr(words).encode()).hexdigest()[:8]}"
    if read_evaluation(folder) is None:
        words += [assign("data.cache_dir", out / "cache")]
        begun = (folder / CONFIG).exists()
        told = [assign("resume", folder)] if begun else [*words, assign("output_dir", folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "simulation", *told], check=True, env=environment)
    return read_run(folder)


def compared(wire: str, runs: Sequence[Run], full: Sequence[Run]) -> Row:
    """One row: bytes a round, AUROC, and its difference to the runs with fp32, seed by seed."""
    rounds = [row for run in runs for row in run.rounds]
    cells, other = scored(runs), scored(full)
    found = probes.seeds_bootstrap(cells, other, REPLICATES, 0)
    pairs = zip(runs, full, strict=True)
    of_seeds = [probes.mean_auroc(scored([a])) - probes.mean_auroc(scored([b])) for a, b in pairs]
    return {
        "wire": wire, "seeds": len(runs),
        "megabytes_up": round(sum(r["bytes_up"] for r in rounds) / len(rounds) / 1e6, 3),
        "megabytes_down": round(sum(r["bytes_down"] for r in rounds) / len(rounds) / 1e6, 3),
        "auroc": round(probes.mean_auroc(cells), 4), "minus_fp32": round(found.value, 4),
        "low": None if found.low is None else round(found.low, 4),
        "high": None if found.high is None else round(found.high, 4),
        "minus_fp32_of_seeds": [round(value, 4) for value in of_seeds],
    }  # fmt: skip


def scored(runs: Sequence[Run]) -> list[probes.Scored]:
    """Scores of the federated network, a cell a label, a model a run."""
    tables, name = [read_scores(run.folder) for run in runs], run_name(runs[0])
    asked = [question for question in tables[0] if question.features == name]
    return [pooled([table[question] for table in tables]) for question in asked]


if __name__ == "__main__":
    main()
