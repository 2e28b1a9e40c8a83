"""``python -m benchmarks.faults``: every fault that a federation must survive, injected for real.

    python -m benchmarks.faults [--quick] [--only GROUP ...] [--out DIR] [--json FILE]

A case is one fault and what must hold under it; it is judged once, its row kept under ``--out``, and the
command given again goes on with what is missing (``--again`` judges what failed anew). A case that fails
stays in the table with what was found; one that this machine cannot try counts neither way, and is tried
anew by the next command. Exit status 1 where one failed.
"""

import argparse
import importlib
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.fault_cases.case import judge, row_file, withstood
from benchmarks.record import print_table, write_result

GROUPS = ("replies", "sites", "inputs", "storage", "transport", "byzantine", "soak", "crash", "network")
QUICK = ("replies", "inputs", "storage")  # a minute together


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge the cases, print each group and the whole; 0 where all held."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        out = options.out or Path(scratch)
        rows: list[dict[str, Any]] = []
        for group in options.only or (QUICK if options.quick else GROUPS):
            found = run_group(group, out.resolve(), options.quick, options.again, options.kept)
            if not found:
                continue
            print_table(group, found)
            print(f"{group}: {withstood(found)}", flush=True)
            rows += found
    print(f"all: {withstood(rows)}")
    if options.json:
        quick = " --quick" if options.quick else ""
        only = f" --only {' '.join(options.only)}" if options.only else ""
        write_result("faults", f"python -m benchmarks.faults{quick}{only}", rows, options.json)
    return int(any(row["held"] is False for row in rows))


def run_group(
    group: str, out: Path, quick: bool, again: bool = False, kept: bool = False
) -> list[dict[str, Any]]:
    """Judge a group's cases, one after the other, and tell each as it ends; returns their rows.

    Args:
        group: a module of ``fault_cases``.
        out: see ``judge``.
        quick: a few cases.
        again: see ``judge``.
        kept: judge nothing, give the rows that are kept.
    """
    module = importlib.import_module(f"benchmarks.fault_cases.{group}")
    rows = []
    with module.cases(out / "work" / group, quick) as found:
        for case in found:
            if kept and not row_file(case, out).exists():
                continue
            row = judge(case, out, again and not kept)
            rows.append(row)
            word = {True: "held  ", False: "FAILED", None: "-     "}[row["held"]]
            print(f"{word} {group}: {row['fault']}: {row['found']}", flush=True)
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few cases of the fast groups")
    parser.add_argument("--only", nargs="+", choices=GROUPS, metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep rows here, and go on with them")
    parser.add_argument("--again", action="store_true", help="judge anew what failed")
    parser.add_argument("--kept", action="store_true", help="judge nothing, tell the rows that are kept")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    for sent in (signal.SIGINT, signal.SIGTERM):  # also where a shell started it deaf to Ctrl-C
        signal.signal(sent, _interrupt)  # every process of a federation ends with this one
    sys.exit(main())
