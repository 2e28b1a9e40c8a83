"""What one `python -m simulation` costs from the data to the report, and what it ends with.

    python -m benchmarks.simulation [--experiment laptop] [--quick] [--json FILE] [OVERRIDE ...]

Runs the experiment once, in a fresh folder and nothing cached, with the workers that a user gets.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import print_table, write_result
from sparsecontrast.findings import pick, questions

QUICK = ("federation.rounds=2", "evaluation.bootstrap=50")


def main(argv: list[str] | None = None) -> None:
    """Run one experiment, then print and record its cost and its headline scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--experiment", default="laptop")
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as for python -m simulation")
    args = parser.parse_args(argv)
    words = [f"experiment={args.experiment}", *args.overrides, *(QUICK if args.quick else ())]
    with tempfile.TemporaryDirectory() as folder:
        rows = [{"experiment": args.experiment, **cost(words, Path(folder) / "run")}]
        rows += scores(json.loads((Path(folder) / "run" / "evaluation.json").read_text()))
    print_table("Cost", rows[:1])
    print_table("AUROC of a linear probe", rows[1:])
    if args.json:
        quick = " --quick" if args.quick else ""
        typed = " ".join(["--experiment", args.experiment, *args.overrides])
        write_result("simulation", f"python -m benchmarks.simulation {typed}{quick}", rows, args.json)


def cost(words: list[str], folder: Path) -> dict[str, Any]:
    """Run the experiment; returns seconds, losses and bytes. Its errors end the benchmark."""
    command = [sys.executable, "-m", "simulation", *words, f"output_dir={folder}"]
    started = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    wall = time.perf_counter() - started
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rounds = [r for r in records if r["site"] is None]
    sites = [r for r in records if r["site"] is not None and r["status"] == "ok"]
    return {
        "rounds": len(rounds),
        "sites": len({r["site"] for r in sites}),
        "wall_seconds": round(wall, 1),
        "rounds_seconds": round(sum(r["seconds"] for r in rounds), 1),
        "first_loss": round(rounds[0]["loss"], 3),
        "lowest_loss": round(min(r["loss"] for r in rounds), 3),
        "last_loss": round(rounds[-1]["loss"], 3),
        "megabytes_up": round(sum(r["bytes_up"] for r in rounds) / 1e6, 1),
    }


def scores(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Give the headline cells of an evaluation, flat."""
    return [
        {
            "task": question.task, "labels": row["fraction"], "features": row["features"],
            "auroc": _digits(row["value"]), "low": _digits(row["low"]), "high": _digits(row["high"]),
        }
        for question in questions(evaluation)
        for row in pick(evaluation["rows"], question, metric="linear_probe_auroc")
        if row["value"] is not None
    ]  # fmt: skip


def _digits(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


if __name__ == "__main__":
    main()
