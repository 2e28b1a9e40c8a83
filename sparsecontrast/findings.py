"""``evaluation.json`` in words and tables, for people who read the result before the method.

Every sentence is decided by an interval: a difference whose 95 % interval holds zero is never
called better or worse.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsecontrast.looked import auto_sentence
from sparsecontrast.scoring import MACRO, METRICS, POOLED

LINEAR, KNN = METRICS
FEW_PATIENTS = 20  # below it an interval of resampled patients says little
THIS = "(this run)"
NAMES = {
    "federated": f"federated {THIS}",
    "pretrained": f"trained at one place {THIS}",
    "pixels": "raw 16 × 16 pixels",
    "random_init": "untrained network",
    "start": "the weights it started from",
    "local_only": "each hospital alone",
    "centralised": "all images in one place",
}
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """A task's headline cells: one label or the macro, where it is judged."""

    task: str
    label: str
    site: str

    @property
    def title(self) -> str:
        """Name it for a heading."""
        return self.task if self.site == POOLED else f"{self.task}, at {self.site}"


def questions(evaluation: Mapping[str, Any]) -> list[Question]:
    """One headline question a task."""
    return [
        Question(t["name"], MACRO if len(t["labels"]) > 1 else t["labels"][0], t["site"] or POOLED)
        for t in evaluation["tasks"]
    ]


def name_of(features: str) -> str:
    """Name a feature set, or a difference of two, in plain words."""
    if " - " in features:
        first, second = features.split(" - ", 1)
        return f"{NAMES.get(first, first).removesuffix(' ' + THIS)} − {NAMES.get(second, second)}"
    return NAMES.get(features, features)


def pick(rows: Sequence[Row], question: Question, **wanted: Any) -> list[Row]:
    """Rows of a question's cells that also match ``wanted``."""
    keys = {"task": question.task, "label": question.label, "site": question.site, **wanted}
    return [r for r in rows if all(r[k] == v for k, v in keys.items())]


def fractions(evaluation: Mapping[str, Any]) -> list[float]:
    """Label fractions, rising."""
    return sorted({r["fraction"] for r in evaluation["rows"]})


def labels_in_words(fraction: float) -> str:
    """Say a label fraction: all labels, 10 % of the labels."""
    return "all labels" if fraction == 1 else f"{100 * fraction:g} % of the labels"


def figure(row: Row | None, signed: bool = False) -> str:
    """Write a cell: 0.831 (0.79 to 0.87), or a dash; the reason stands elsewhere."""
    if row is None or row["value"] is None:
        return "–"
    form = "{:+.3f}" if signed else "{:.3f}"
    if row["low"] is None:
        return form.format(row["value"]).replace("-", "−")
    ends = "{:+.2f} to {:+.2f}" if signed else "{:.2f} to {:.2f}"
    return f"{form} ({ends})".format(row["value"], row["low"], row["high"]).replace("-", "−")


def verdict(row: Row) -> str:
    """Say what a difference shows: better, worse, or not shown either way."""
    if row["value"] is None or row["low"] is None:
        return "cannot be judged"
    if row["low"] > 0:
        return "better"
    return "worse" if row["high"] < 0 else "no difference shown"


def sentences(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the run is worth: (question, paragraph) pairs in words that need no statistics."""
    said = []
    for question in questions(evaluation):
        rows = pick(evaluation["rows"], question, metric=LINEAR)
        for fraction in reversed(fractions(evaluation)):
            here = {r["features"]: r for r in rows if r["fraction"] == fraction}
            main = here.get(evaluation["trained"])
            if main and main["value"] is not None:
                text = f"{_main_sentence(main)} {_comparison(evaluation, question, fraction)}"
                said.append((question.title, text))
                break
        else:
            said.append((question.title, f"{rows[0]['reason'] if rows else 'not asked'}.".capitalize()))
    return said


def reasons(evaluation: Mapping[str, Any], question: Question) -> list[str]:
    """Why some of a question's cells hold no number or no interval."""
    found = {}
    for row in pick(evaluation["rows"], question, metric=LINEAR, features=evaluation["trained"]):
        if row["reason"]:
            parts = [row]
            if row["label"] == MACRO and row["value"] is None:
                keys = {"task": row["task"], "site": row["site"], "fraction": row["fraction"]}
                parts = [
                    r for r in evaluation["rows"] if r["reason"] and all(r[k] == v for k, v in keys.items())
                ]
            why = {
                r["reason"].removeprefix("not computable: ")
                for r in parts
                if r["label"] != MACRO or len(parts) == 1
            }
            found[labels_in_words(row["fraction"])] = "; ".join(sorted(why)) or row["reason"]
    return [f"{where}: {why}" for where, why in found.items()]


def notes(evaluation: Mapping[str, Any]) -> list[str]:
    """How the numbers are to be read; each only where it applies."""
    said = [
        "The number is the AUROC: how often a random positive image is ranked above a random negative one "
        "of the same origin. 0.5 is guessing, 1 is perfect. Only images of one origin are compared, "
        "because telling two hospitals apart is not a diagnosis.",
        f"Intervals are 95 %, from {evaluation['bootstrap']} resamples of patients. They are not corrected "
        "for the number of comparisons, and they do not contain the luck of the training seed.",
    ]
    if evaluation["scored_split"] == "val":
        said.append(
            "The data have no test split, so the validation split was scored; nothing was chosen on it."
        )
    else:
        said.append(
            "The strength of each probe was chosen on the whole validation split, also where few training "
            "labels were used."
        )
    if any(t["folds"] for t in evaluation["tasks"]):
        said.append(
            "Cross-validated tasks hold out patients whose images, without labels, may have been part of "
            "the pretraining."
        )
    if evaluation["keep"] == "dense":
        said.append("All features were read densely: every part of each image was computed.")
    elif evaluation["keep"] == "auto":
        said.append(
            "Features of trained runs were read at keep = auto, each network calibrated by itself; baselines "
            f"were read densely. {auto_sentence(evaluation)}"
        )
    else:
        said.append(
            f"Features were read at keep = {evaluation['keep']}: only the kept parts of each image were "
            "computed in full."
        )
    few = sum(r["value"] is not None and r["n_patients"] < FEW_PATIENTS for r in evaluation["rows"])
    if few:
        said.append(f"{few} cells rest on fewer than {FEW_PATIENTS} patients: read them as anecdotes.")
    return said


def print_results(evaluation: Mapping[str, Any]) -> None:
    """Print the headline tables to stdout."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console = console if console.is_terminal else Console(width=110)
    for question in questions(evaluation):
        head, *rows = headline_table(evaluation, question, LINEAR)
        table = Table(
            title=f"{question.title}: AUROC of a linear probe", title_justify="left", box=SIMPLE_HEAD
        )
        for i, cell in enumerate(head):
            table.add_column(escape(cell), justify="right" if i else "left", no_wrap=bool(i))
        for row in rows:
            table.add_row(*map(escape, row), style="bold" if THIS in row[0] else None)
        console.print(table)
    if sentence := auto_sentence(evaluation):
        console.print(escape(sentence))
    for sentence in membership_sentences(evaluation):
        console.print(escape(sentence))
    console.print(f"95 % intervals over patients; {evaluation['scored_split']} split; 0.5 is guessing")


def membership_sentences(evaluation: Mapping[str, Any]) -> list[str]:
    """Say how well the weights tell who was trained on, and what that proves; nothing where not asked."""
    told = evaluation.get("membership") or {"rows": [], "canaries": None}
    said = [
        f"Membership, {r['members']} patients trained on against {r['others']} others ({r['against']}), "
        f"score {r['score']}: AUROC {figure(r)}"
        for r in told["rows"]
    ]
    if found := told["canaries"]:
        said.append(
            f"Audit of {found['canaries']} canaries: epsilon is at least {found['epsilon']:.2f} at delta "
            f"{found['delta']:g} (confidence {found['confidence']:g}; no more than "
            f"{found['ceiling']:.2f} could be proved)"
        )
    return said


def headline_table(evaluation: Mapping[str, Any], question: Question, metric: str) -> list[list[str]]:
    """Features x label fractions, as text; the first row is the head."""
    rows = pick(evaluation["rows"], question, metric=metric)
    cells = {(r["features"], r["fraction"]): r for r in rows}
    head = ["features", *(labels_in_words(f) for f in fractions(evaluation))]
    return [head] + [
        [name_of(name), *(figure(cells.get((name, f))) for f in fractions(evaluation))]
        for name in evaluation["features"]
    ]


def difference_table(evaluation: Mapping[str, Any], question: Question) -> list[list[str]]:
    """What the run gains over each other feature set, by label fraction, with the verdict."""
    rows = pick(evaluation["differences"], question)
    cells = {(r["features"], r["fraction"]): r for r in rows}
    columns = fractions(evaluation)
    head = [
        "the run minus",
        *(labels_in_words(f) for f in columns),
        "with all labels" if 1.0 in columns else "",
    ]
    table = [head]
    for name in dict.fromkeys(r["features"] for r in rows):
        judged = cells.get((name, columns[-1]))
        texts = [figure(cells.get((name, f)), True) for f in columns]
        table.append(
            [name_of(name.split(" - ", 1)[1]), *texts, verdict(judged) if judged else "cannot be judged"]
        )
    return table if len(table) > 1 else []


def neighbour_table(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """Nearest neighbours with the largest fraction of labels: tasks x features."""
    top, names = fractions(evaluation)[-1], evaluation["features"]
    table = [["task", *map(name_of, names)]]
    for question in questions(evaluation):
        rows = pick(evaluation["rows"], question, metric=KNN, fraction=top)
        cells = {r["features"]: r for r in rows}
        table.append([question.title, *(figure(cells.get(n)) for n in names)])
    return table


def label_table(evaluation: Mapping[str, Any], question: Question) -> list[list[str]]:
    """Labels x features at the largest fraction, for tasks of several labels."""
    top = fractions(evaluation)[-1]
    rows = [
        r for r in evaluation["rows"]
        if (r["task"], r["site"], r["metric"], r["fraction"]) == (question.task, question.site, LINEAR, top)
    ]  # fmt: skip
    return _matrix(rows, "label", evaluation["features"], "label") if question.label == MACRO else []


def site_table(evaluation: Mapping[str, Any], question: Question) -> list[list[str]]:
    """Hospitals x features at the largest fraction, for tasks judged everywhere."""
    top = fractions(evaluation)[-1]
    rows = [
        r for r in evaluation["rows"]
        if (r["task"], r["label"], r["metric"], r["fraction"]) == (question.task, question.label, LINEAR, top)
        and r["site"] != POOLED
    ]  # fmt: skip
    return _matrix(rows, "site", evaluation["features"], "hospital") if question.site == POOLED else []


def _matrix(rows: Sequence[Row], key: str, names: Sequence[str], head: str) -> list[list[str]]:
    """One line a label or hospital, one column a feature set; a reason stands where no number can."""
    cells = {(r[key], r["features"]): r for r in rows}
    table = [[head, "images", "positive", *(name_of(n) for n in names)]]
    for value in dict.fromkeys(r[key] for r in rows):
        first = cells[value, names[0]]
        title, positives = value, str(first["n_positive"])
        if first["label"] == MACRO:
            positives = f"in {first['labels_used']} of {first['labels_asked']} findings"
            title = "mean of the findings" if value == MACRO else value
        texts = [figure(cells.get((value, n))) for n in names]
        if first["value"] is None:
            texts = [(first["reason"] or "").removeprefix("not computable: ")] + [""] * (len(names) - 1)
        table.append([title, f"{first['n_images']} ({first['n_patients']} patients)", positives, *texts])
    return table


def _main_sentence(row: Row) -> str:
    interval = ""
    if row["low"] is not None:
        interval = f" (95 % interval {100 * row['low']:.0f} to {100 * row['high']:.0f})"
    average = ", on average over the findings" if row["label"] == MACRO else ""
    pairs = f"{100 * row['value']:.0f} of 100 pairs"
    return (
        f"With {labels_in_words(row['fraction'])}, a simple classifier on the learned features ranks an "
        f"image with the finding above one without it in {pairs}{interval}{average}; "
        "guessing would give 50."
    )


def _comparison(evaluation: Mapping[str, Any], question: Question, fraction: float) -> str:
    """Name what the run is better or worse than, by how much, and what it could not be told from."""
    groups: dict[str, list[str]] = {}
    for row in pick(evaluation["differences"], question, fraction=fraction):
        other, judged = name_of(row["features"].split(" - ", 1)[1]), verdict(row)
        other = other.replace("untrained", "an untrained")
        size = ""
        if judged in ("better", "worse"):
            ends = sorted(abs(round(100 * row[k])) for k in ("low", "high"))
            size = f" (by {abs(100 * row['value']):.0f} pairs in 100, interval {ends[0]} to {ends[1]})"
        groups.setdefault(judged, []).append(other + size)
    phrases = {
        "better": "That is better than {}.",
        "worse": "That is worse than {}.",
        "no difference shown": "No difference could be shown from {}.",
        "cannot be judged": "It cannot be compared with {}.",
    }
    return " ".join(text.format(_listed(groups[key])) for key, text in phrases.items() if key in groups)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
