"""What a run recorded, as charts and tables: losses, hospitals, data, quarantine, bytes.

Tables are lists of text with the head first; they hold names of hospitals and counts, never a
patient and never a path.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparsecontrast.charts import Bar, Line, bar_chart, line_chart
from sparsecontrast.config import shared_state_dir
from sparsecontrast.runs import QUARANTINE, Run, read_table

if TYPE_CHECKING:
    from sparsecontrast.data.cache import Dataset

UPLOADS = {"weights": "", "delta": ", as updates,", "delta_int8": ", as updates of 8 bits a number,"}
PLATEAU = 0.98  # a contrast loss above this share of its chance level has not left it
MOST_FINDINGS = 7  # parts of one bar with a colour of their own; the eighth is for the rest
_PATH = re.compile(r"(?<![\w.])[~.]{0,2}/[^\s'\",;:]+")


def trained_alone(run: Run) -> bool:
    """Whether one trainer saw all the data, without a federation."""
    return len({r["site"] for r in run.sites}) == 1


def curves(run: Run) -> dict[str, Any]:
    """Loss of every site and of the federation; contrast losses against their chance level; keep."""
    loss = "contrast" if any("contrast" in r for r in run.sites) else "loss"
    lines = [Line(str(s), *_series(rows, loss), "thin", 0) for s, rows in _by_site(run).items()]
    mean, chance = _mean(run, loss), _mean(run, "chance_loss")
    many = len(lines) > 1
    main = [Line("weighted mean of hospitals" if many else "loss", *mean, "main", 0)]
    main += [Line("chance level, ln(1 + negatives)", *chance, "dashed", 1)] if chance[0] else []
    label = "contrastive loss" if loss == "contrast" else "loss"
    keep = Line("share of tokens computed", *_mean(run, "keep"))
    drawn = [*(lines if many else []), *main]
    return {
        "loss": line_chart(drawn, f"{label} by round", "round", label) if mean[0] else "",
        "contrast": loss == "contrast",
        "keep": line_chart([keep], "keep by round", "round", "share kept", 170, True) if keep.x else "",
    }


def _by_site(run: Run) -> dict[str, list[Mapping[str, Any]]]:
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(run.sites, key=lambda r: (str(r["site"]), r["round"])):
        grouped.setdefault(str(row["site"]), []).append(row)
    return grouped


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    return [r["round"] for r in rows], [float(r[key]) if key in r else math.nan for r in rows]


def _mean(run: Run, key: str) -> tuple[list[float], list[float]]:
    """Mean of a metric over the sites of each round, weighted as the weights were."""
    sums: dict[int, tuple[float, float]] = {}
    for row in run.sites:
        if key in row:
            weight = float(row.get("weight", 1.0)) or 1e-12
            total, mass = sums.get(row["round"], (0.0, 0.0))
            sums[row["round"]] = (total + weight * float(row[key]), mass + weight)
    return list(map(float, sorted(sums))), [sums[n][0] / sums[n][1] for n in sorted(sums)]


def plateau(run: Run) -> bool:
    """Whether the contrast loss ended at its chance level, where nothing has been learnt."""
    loss, chance = _mean(run, "contrast")[1], _mean(run, "chance_loss")[1]
    return bool(loss and chance and loss[-1] > PLATEAU * chance[-1])


def hospital_table(run: Run, dataset: "Dataset | None") -> list[list[str]]:
    """One line a hospital: what it holds, what it gave, what failed."""
    head = [
        "hospital",
        "images",
        "patients",
        "rounds",
        "refused",
        "silent",
        "weight",
        "loss",
        "sent",
        "time",
    ]
    lines = []
    for site, rows in _by_site(run).items():
        good = [r for r in rows if r.get("status", "ok") == "ok"]
        counts = [str(good[-1].get("num_examples", "–")) if good else "–", "–"]
        if dataset is not None and not trained_alone(run):
            here = dataset.frame["site"].astype(str) == site
            counts = [f"{int(here.sum()):,}", f"{dataset.frame['patient_id'][here].nunique():,}"]
        refused = [str(r.get("code", "refused")) for r in rows if r.get("status") == "refused"]
        lines.append([
            site, *counts, f"{len(good)} of {len(rows)}",
            f"{len(refused)} ({', '.join(sorted(set(refused)))})" if refused else "0",
            str(sum(r.get("status") == "silent" for r in rows)),
            f"{100 * float(good[-1].get('weight', 1)):.1f} %" if good else "–",
            f"{good[-1]['loss']:.3f}" if good and "loss" in good[-1] else "–",
            megabytes(sum(r.get("bytes_up") or 0 for r in rows)),
            _mean_duration([r["seconds"] for r in good if r.get("seconds")]),
        ])  # fmt: skip
    return [head, *lines] if lines else []


def partition(run: Run, dataset: "Dataset | None") -> dict[str, Any] | None:
    """Who holds what: splits, and the commonest positive labels, by site."""
    if dataset is None:
        return None
    frame = dataset.frame
    cut = "partition" in frame and len(frame) > 0
    sites = sorted(frame["site"].astype(str).unique())
    splits = ("train", "val", "test")
    table = frame.groupby(["site", "split"]).size()
    images = [Bar(s, [float(table.get((s, p), 0)) for p in splits]) for s in sites]
    totals = {n: float((frame[f"label_{n}"] == 1).sum()) for n in dataset.labels}
    common = sorted(totals, key=lambda n: -totals[n])
    labels, rest = common[:MOST_FINDINGS], common[MOST_FINDINGS:]
    found = {n: (frame[f"label_{n}"] == 1).groupby(frame["site"]).sum() for n in common}
    parts = [[n] for n in labels] + ([rest] if rest else [])
    names = labels + (["other findings"] if rest else [])
    positives = [Bar(s, [float(sum(found[n].get(s, 0) for n in part)) for part in parts]) for s in sites]
    return {
        "images": bar_chart(images, splits, "images of each hospital by split", "images"),
        "labels": bar_chart(
            positives,
            names,
            "positive labels of each hospital",
            "images with the finding (an image may have several)",
        ),
        "rule": str(frame["partition"].iloc[0]) if cut else run.config.federation.partition,
        "merged": None if cut else run.config.data.merge_sites_to,
    }


def quarantine(run: Run) -> list[list[str]]:
    """Counts by stage and reason; never a path."""
    tables = [
        t
        for t in (read_table(run.folder, QUARANTINE), read_table(shared_state_dir(run.config), QUARANTINE))
        if t is not None
    ]
    if not tables:
        return []
    table = tables[0]
    pairs = zip(table["stage"].tolist(), (_PATH.sub("…", t) for t in table["reason"].tolist()), strict=True)
    return [[stage, reason, str(count)] for (stage, reason), count in Counter(pairs).most_common()]


def transfer(run: Run) -> dict[str, Any]:
    """Bytes of all messages: a chart by round, totals, and what one hospital sends in one round."""
    rounds = [r for r in run.rounds if "bytes_up" in r]
    numbers = [float(r["round"]) for r in rounds]
    up, down = ([r[key] / 1e6 for r in rounds] for key in ("bytes_up", "bytes_down"))
    lines = [
        Line("from the hospitals", numbers, up, "main", 0),
        Line("to the hospitals", numbers, down, "dashed", 1),
    ]
    first = next((r for r in run.sites if r.get("bytes_up")), {})
    return {
        "chart": line_chart(lines, "megabytes sent by round", "round", "MB", 190, zero=True)
        if rounds
        else "",
        "up": megabytes(sum(r["bytes_up"] for r in rounds)),
        "down": megabytes(sum(r["bytes_down"] for r in rounds)),
        "each": megabytes(first.get("bytes_up") or 0),
        "dtype": run.config.federation.payload_dtype,
        "upload": UPLOADS[run.config.federation.upload],
    }


def _mean_duration(seconds: list[float]) -> str:
    return duration(sum(seconds) / len(seconds)) if seconds else "–"


def megabytes(count: float) -> str:
    """Write a number of bytes: 21.3 MB."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def duration(seconds: float) -> str:
    """Write seconds: 42.0 s, 12.5 min, 3.1 h."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
