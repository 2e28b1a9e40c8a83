"""Put the arms of one run of ``benchmarks.quality`` into a committed result, and say so in it.

    python -m benchmarks.quality_merge NEW INTO --arms evit

Rows of the arms in INTO are replaced by those of NEW, whose differences were paired with the reference that
NEW trained itself: both must be of the same films, questions and steps. ``merged`` of INTO then says which
arms came from where, and by how much the AUROC of the arms that both have differ at most.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import quality_arms as qa

Result = dict[str, Any]
QUESTION = ("data", "task", "label")
ALIKE = ("patients", "positives", "mean_steps")  # of one arm, in both


def main(argv: Sequence[str] | None = None) -> None:
    """Merge two files; INTO is written whole or not at all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument("into", type=Path, metavar="INTO")
    parser.add_argument("--arms", nargs="+", required=True)
    args = parser.parse_args(argv)
    found = merged(json.loads(args.into.read_text()), json.loads(args.new.read_text()), args.arms)
    part = args.into.with_name(f".{args.into.name}.part")
    part.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    part.replace(args.into)
    print(f"{args.into}: {found['merged'][-1]}")


def merged(into: Result, new: Result, arms: Sequence[str]) -> Result:
    """Replace the rows of ``arms``; a mode of an arm (``ours, asked dense``) belongs to it.

    Raises:
        SystemExit: an arm is not in ``new``, or the two are not of one protocol.
    """
    fresh = [row for row in new["rows"] if _arm(row) in arms]
    if missing := set(arms) - {_arm(row) for row in fresh}:
        raise SystemExit(f"merge: the new result has no arm {', '.join(sorted(missing))}")
    kept = [row for row in into["rows"] if _arm(row) not in arms]
    shift = _largest_shift(kept, new["rows"])
    order = [*qa.arms(qa.Protocol()), "pixels_16x16", "random_init"]
    asked = list(dict.fromkeys(_question(row) for row in kept))
    if strange := {_question(row) for row in fresh} - set(asked):
        raise SystemExit(f"merge: the committed result does not ask {sorted(strange)[0]}")
    rows = sorted([*kept, *fresh], key=lambda row: (asked.index(_question(row)), order.index(_arm(row))))
    source = {key: new[key] for key in ("command", "machine", "versions", "date")}
    told = {"arms": list(arms), **source, "largest_auroc_shift_of_other_arms": shift}
    return {**into, "merged": [*into.get("merged", []), told], "rows": rows}


def _largest_shift(kept: list[dict[str, Any]], rows: list[dict[str, Any]]) -> float:
    """How far arms that both results trained lie apart; none at all would leave nothing to compare with."""
    theirs = {(*_question(row), row["arm"]): row for row in rows if "mean_steps" in row and "auroc" in row}
    pairs = [(row, theirs[key]) for row in kept if (key := (*_question(row), row["arm"])) in theirs]
    if not pairs or any(one.get(key) != two.get(key) for one, two in pairs for key in ALIKE):
        raise SystemExit("merge: the two results are not of the same films, questions and steps")
    return round(max(abs(one["auroc"] - two["auroc"]) for one, two in pairs), 4)


def _question(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[key] for key in QUESTION)


def _arm(row: dict[str, Any]) -> str:
    return row["arm"].partition(",")[0]


if __name__ == "__main__":
    main()
