"""One injected fault, what must hold under it, and what was found; each case is judged once and kept."""

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsecontrast.durable import write_bytes

Found = dict[str, Any]  # plain values for the table


class BrokenPromiseError(Exception):
    """What must hold did not; the text says what was found instead."""


class NotHereError(Exception):
    """A machine cannot show it; the text says what it lacks."""


@dataclass(frozen=True)
class Case:
    """A fault of one group.

    Attributes:
        group: of the table.
        fault: what is done; unique in its group.
        work: injects it below a new folder and returns what was found, or raises ``BrokenPromiseError``, or
            ``NotHereError``.
    """

    group: str
    fault: str
    work: Callable[[Path], Found]


def judge(case: Case, out: Path, again: bool = False) -> dict[str, Any]:
    """Return a case's row: read where it was judged before, else by injecting its fault now.

    Any exception is a fault that was not withstood, and stands in the row as its reason; but for a fault that
    could not be tried here: whether it ``held`` is None then, and the row is not kept.

    Args:
        case: to judge.
        out: rows are kept in ``out/rows``, scratch folders lie in ``out/work``.
        again: also where an earlier attempt failed.
    """
    name = f"{case.group}/{slug(case.fault)}"
    kept, folder = row_file(case, out), out / "work" / f"{name}-{time.time_ns():x}"
    if kept.exists() and ((old := json.loads(kept.read_text()))["held"] or not again):
        return old
    row: dict[str, Any] = {"group": case.group, "fault": case.fault}
    folder.mkdir(parents=True)
    started = time.monotonic()
    try:
        row |= {"held": True, **case.work(folder)}
    except NotHereError as lacking:
        return row | {"held": None, "found": f"not done here: {lacking}"}
    except BrokenPromiseError as broken:
        row |= {"held": False, "found": str(broken)}
    except Exception as error:  # noqa: BLE001  a case that ends otherwise than foreseen has failed
        row |= {"held": False, "found": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    row["seconds"] = round(time.monotonic() - started, 1)
    write_bytes(kept, json.dumps(row).encode())
    return row


def row_file(case: Case, out: Path) -> Path:
    """Where a case's row is kept."""
    return out / "rows" / case.group / f"{slug(case.fault)}.json"


def withstood(rows: Sequence[Mapping[str, Any]]) -> str:
    """Count: ``5 of 6``, and how many could not be tried."""
    tried = [bool(row["held"]) for row in rows if row["held"] is not None]
    left = len(rows) - len(tried)
    return f"{sum(tried)} of {len(tried)}" + (f", {left} not done" if left else "")


def expect(true: object, found: object) -> None:
    """Go on where something holds.

    Raises:
        BrokenPromiseError: with ``found``, where it does not.
    """
    if not true:
        raise BrokenPromiseError(" ".join(str(found).split())[:300])


def slug(text: str) -> str:
    """Make a file's name of a fault's."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
