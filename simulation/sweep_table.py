"""The table of a sweep: one row a group of runs that differ in their seed alone, and a task.

AUROC and its gain over the start weights are means over seeds; their intervals resample patients and seeds
together. Membership is a mean over seeds with its interval over patients (each seed tossed its own coins).
``epsilon at least`` is the largest of the seeds' audited bounds, each at a confidence so much higher that all
hold together (Bonferroni), and ``at most provable`` what it would be had every guess been right; no bound may
exceed the ``epsilon spent`` that the ledgers promise. ``beats start`` says what a reader would ask first:

    apart        the two levels' intervals do not overlap
    paired       they do, but the interval of the gain, film by film, lies above zero
    not shown    neither
    worse        the interval of the gain lies below zero

``noise over signal`` says why there may be little to see: how much longer a step's noise is than all
gradients of its patients could be together (``disclosure.py``).

A gain may still be none of learning: noise alone moves random weights, and probes often like them better.
``over noise`` is the gain over the runs at epsilon 0.1, where the sweep has them: as many steps, of which
practically nothing is left but noise.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sparsecontrast import probes
from sparsecontrast.durable import write_bytes
from sparsecontrast.evaluation import run_name, versions
from sparsecontrast.item_scores import Question, pooled, read_scores
from sparsecontrast.membership import CANARIES, CONFIDENCE, MEMBERSHIP, SPLIT, audited
from sparsecontrast.probes import Interval, Scored
from sparsecontrast.runs import Run, read_evaluation, read_run
from sparsecontrast.sweeps import SEED, Job

REPLICATES = 1000
START = "start"
EPSILON, CONTROL = "epsilon", "0.1"
SCORE = "calibrated"  # of the two of ``membership.py``: the one that is not mistaken by easy films
OUTCOMES = APART, PAIRED, NOT_SHOWN, WORSE = "apart", "paired", "not shown", "worse"
Row = dict[str, Any]
Group = tuple[tuple[str, str], ...]  # see ``Job.group``
Tables = Mapping[Question, Any]  # of one run, see ``item_scores.read_scores``
Column = tuple[str, str, str | None, str | None]  # title, key of the value, of its interval's ends
COLUMNS: tuple[Column, ...] = (
    ("task", "task", None, None), ("seeds", "seeds", None, None),
    ("AUROC", "auroc", "auroc_low", "auroc_high"), ("start", "start", "start_low", "start_high"),
    ("gain", "gain", "gain_low", "gain_high"), ("beats start", "beats_start", None, None),
    ("over noise", "over_noise", "over_noise_low", "over_noise_high"),
    ("membership AUROC", "membership", "membership_low", "membership_high"),
    ("canaries AUROC", "canaries", "canaries_low", "canaries_high"),
    ("epsilon at least", "epsilon_at_least", None, None),
    ("at most provable", "epsilon_ceiling", None, None),
    ("epsilon spent", "epsilon", None, None), ("delta", "delta", None, None),
    ("noise over signal", "noise_to_signal", None, None),
)  # fmt: skip


def rows_of(jobs: Sequence[Job], total: int) -> list[Row]:
    """Summarise runs that are done.

    Args:
        jobs: they.
        total: how many there will be.

    Raises:
        EvaluationError: runs of one group were not scored on the same images.
    """
    groups: dict[Group, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.group, []).append(job)
    counted = {"runs": len(jobs), "of_runs": total}
    return [
        row | counted for g, part in groups.items() for row in _group(g, part, _controls(g, part, groups))
    ]


def _controls(
    group: Group, jobs: Sequence[Job], groups: Mapping[Group, Sequence[Job]]
) -> Sequence[Job]:  # fmt: skip
    """Runs of noise alone, seed by seed beside a group's; none where a seed has none."""
    same = tuple((axis, CONTROL if axis == EPSILON else value) for axis, value in group)
    found = {job.values.get(SEED): job for job in groups.get(same, ()) if same != group}
    seeds = [job.values.get(SEED) for job in jobs]
    return [found[seed] for seed in seeds] if set(seeds) <= set(found) else ()


def write_table(rows: Sequence[Row], folder: Path, command: str) -> str:
    """Write ``table.md`` and ``sweep.json``; returns the table."""
    text = "\n".join([markdown(rows), *summary(rows)])
    write_bytes(folder / "table.md", text.encode())
    told = {"name": "sweep", "command": command, "versions": versions(), "rows": list(rows)}
    write_bytes(folder / "sweep.json", json.dumps(told, indent=1, allow_nan=False).encode())
    return text


def markdown(rows: Sequence[Row]) -> str:
    """Write rows as a table; a column that says nothing in any row is left out."""
    if not rows:
        return "no run is done yet\n"
    axes = list(rows[0]["group"])
    shown = [c for c in COLUMNS if any(row.get(c[1]) is not None for row in rows)]
    head = [*axes, *(title for title, *_ in shown)]
    body = [
        [*(str(row["group"][axis]) for axis in axes), *(_cell(row, column) for column in shown)]
        for row in rows
    ]
    lines = [head, ["---"] * len(head), *body]
    done = f"{rows[0]['runs']} of {rows[0]['of_runs']} runs"
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{done}; 95 % intervals\n"


def summary(rows: Sequence[Row]) -> list[str]:
    """Say in a line for each kind of privacy which groups beat the weights that they started from."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        if "beats_start" in row:
            spent = row.get("epsilon")
            kind = "Without privacy" if spent is None else f"At epsilon {row['group'].get(EPSILON, spent)}"
            kinds.setdefault(kind, []).append(row)
    said = [f"{kind}: {_counted(mine)}\n" for kind, mine in kinds.items()]
    beside = [row for row in rows if row.get("over_noise_low") is not None]
    better = [row for row in beside if row["over_noise_low"] > 0]
    names = "; ".join(f"{EPSILON} {row['group'][EPSILON]}, {_label(row)}" for row in better) or "none"
    return said + ([f"Better than noise alone: {len(better)} of {len(beside)}: {names}\n"] if beside else [])


def _counted(rows: Sequence[Row]) -> str:
    told = []
    for outcome in OUTCOMES:
        names = [_label(row) for row in rows if row["beats_start"] == outcome]
        told += [f"{len(names)} {outcome} ({'; '.join(names)})"] if names else []
    return f"of {len(rows)} groups against their own start, {', '.join(told)}"


def _label(row: Row) -> str:
    """Name a group but for its epsilon, and its task."""
    return ", ".join([*(value for axis, value in row["group"].items() if axis != EPSILON), row["task"]])


def _group(group: Group, jobs: Sequence[Job], controls: Sequence[Job]) -> list[Row]:
    runs = [read_run(job.folder) for job in jobs]
    tables = [read_scores(run.folder) for run in runs]
    common: Row = {
        "group": dict(group), "seeds": len(jobs),
        "seed_values": [job.values.get(SEED) for job in jobs], **_privacy(runs), **_membership(tables),
        **_proved(runs, tables),
    }  # fmt: skip
    name, tasks = run_name(runs[0]), dict[str, list[str]]()
    for question in tables[0]:
        if question.features == name and all(question in table for table in tables):
            tasks.setdefault(question.task, []).append(question.label)
    noise = [read_scores(read_run(job.folder).folder) for job in controls]
    return [
        common | {"task": task} | _utility(tables, noise, task, labels, name)
        for task, labels in tasks.items()
    ]


def _utility(
    tables: Sequence[Tables], noise: Sequence[Tables], task: str, labels: Sequence[str], name: str
) -> Row:
    """AUROC of the released weights, of the start weights, and the gains, each over all labels of a task."""
    trained = _cells(tables, task, labels, name)
    row = _figures("auroc", level(trained))
    row |= {
        "auroc_of_seeds": [probes.mean_auroc([_model(c, i) for c in trained]) for i in range(len(tables))]
    }
    if other := _cells(noise, task, labels, name):
        row |= _figures("over_noise", probes.seeds_bootstrap(trained, other, REPLICATES, 0))
    if not (begun := _cells(tables, task, labels, START)):
        return row
    row |= _figures(START, level(begun))
    row |= _figures("gain", probes.seeds_bootstrap(trained, begun, REPLICATES, 0))
    return row | {"beats_start": _outcome(row)}


def _cells(tables: Sequence[Tables], task: str, labels: Sequence[str], features: str) -> list[Scored]:
    """Scores of each label, one model a table; nothing where one of them is missing."""
    asked = [Question(task, label, features) for label in labels]
    if not tables or any(question not in table for question in asked for table in tables):
        return []
    return [pooled([table[question] for table in tables]) for question in asked]


def _outcome(row: Row) -> str:
    if row["gain_low"] is None:  # too few films, or all alike
        return NOT_SHOWN
    if row["gain_high"] < 0:
        return WORSE
    if row["gain_low"] <= 0:
        return NOT_SHOWN
    return APART if row["auroc_low"] > row["start_high"] else PAIRED


def level(cells: Sequence[Scored]) -> Interval:
    """Mean AUROC with an interval over patients and models at once: its difference to a blind score."""
    blind = [replace(cell, scores=np.zeros_like(cell.scores)) for cell in cells]
    found = probes.seeds_bootstrap(cells, blind, REPLICATES, 0)
    low, high = (None if end is None else end + 0.5 for end in (found.low, found.high))
    return Interval(found.value + 0.5, low, high, found.skipped)


def _membership(tables: Sequence[Tables]) -> Row:
    """Mean over seeds of the membership scores' AUROC, and what the canaries bound."""
    row: Row = {}
    for name, against in (("membership", SPLIT), ("canaries", CANARIES)):
        question = Question(MEMBERSHIP, against, SCORE)
        cells = [pooled([table[question]]) for table in tables if question in table]
        cells = [cell for cell in cells if np.isfinite(probes.mean_auroc([cell]))]
        row |= _figures(name, probes.bootstrap(cells, REPLICATES, 0)) if cells else {}
    return row


def _privacy(runs: Sequence[Run]) -> Row:
    """What the ledgers promise, of all sites and seeds the worst; nothing where nothing was promised."""
    told = [row for run in runs for row in run.sites if row.get("epsilon") is not None]
    keys = ("epsilon", "delta", "noise_multiplier", "noise_to_signal")
    return {key: max(float(row[key]) for row in told) for key in keys if told and key in told[0]}


def _proved(runs: Sequence[Run], tables: Sequence[Tables]) -> Row:
    """The largest of the runs' audited bounds, each at a confidence at which all hold together."""
    found = []
    for run, table in zip(runs, tables, strict=True):
        told = (read_evaluation(run.folder) or {}).get("membership")
        own = {q: pooled([scores]) for q, scores in table.items() if q.task == MEMBERSHIP}
        one = audited(own, told["delta"], 1 - (1 - CONFIDENCE) / len(runs)) if told else None
        found += [one] if one else []
    if not found:
        return {}
    most = min(one["ceiling"] for one in found)
    return {"epsilon_at_least": max(one["epsilon"] for one in found), "epsilon_ceiling": most}


def _model(cell: Scored, i: int) -> Scored:
    return replace(cell, scores=cell.scores[[i]], weights=np.ones(1))


def _figures(name: str, found: Interval) -> Row:
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def _cell(row: Row, column: Column) -> str:
    _, key, low, high = column
    value = row.get(key)
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    if low is None or high is None:
        return f"{value:.3g}"
    ends = "" if row.get(low) is None else f" [{row[low]:.3f}, {row[high]:.3f}]"
    return f"{value:+.3f}{ends}" if key in ("gain", "over_noise") else f"{value:.3f}{ends}"
