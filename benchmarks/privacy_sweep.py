"""Utility, membership inference and the audited bound against epsilon: the sweep, recorded.

    python -m benchmarks.privacy_sweep [--quick] [--json FILE] [--out outputs/privacy_sweep] [WORDS]

Gives ``python -m simulation.sweep experiment=privacy_sweep WORDS`` and records its table, and its plot beside
it. Runs are kept under ``--out`` and continued when the command is given again.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import write_result

QUICK = (
    "seed=0", "images=phantoms", "epsilon=8,inf", "start=random", "tokens=sparse", "backbone.depth=1",
    "data.phantom.patients_per_site=30", "federation.rounds=1",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing of the sweep, which prints its table, and record the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("words", nargs="*", help="choices and overrides, such as images=phantoms seed=0")
    parser.add_argument("--out", default="outputs/privacy_sweep", help="folder of the runs")
    parser.add_argument("--workers", type=int, default=None, help="runs at a time; default all cores")
    parser.add_argument("--quick", action="store_true", help="two cells of a tiny network")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(argv)
    out = Path(args.out).resolve() / ("quick" if args.quick else "")
    words = ["experiment=privacy_sweep", *(QUICK if args.quick else ()), *args.words, f"output_dir='{out}'"]
    workers = [] if args.workers is None else ["--workers", str(args.workers)]
    subprocess.run([sys.executable, "-m", "simulation.sweep", *words, *workers], check=True)
    rows = [flat(row) for row in json.loads((out / "sweep.json").read_text())["rows"]]
    command = " ".join(
        ["python -m benchmarks.privacy_sweep", *(["--quick"] if args.quick else []), *args.words]
    )
    if args.json:
        write_result("privacy_sweep", command, rows, args.json)
        if (picture := out / "sweep.png").exists():
            args.json.with_suffix(".png").write_bytes(picture.read_bytes())


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Lay the chosen points beside the figures; figures of a point's name are ``NAME_figure`` then."""
    group = row["group"]
    rest = {f"{key}_figure" if key in group else key: value for key, value in row.items() if key != "group"}
    return {**group, **rest}


if __name__ == "__main__":
    main()
