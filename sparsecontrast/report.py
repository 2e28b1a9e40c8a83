"""A run folder -> ``report.html``: one file, no script, nothing loaded from anywhere.

The page takes what there is. A run without ``evaluation.json``, or a server where no image lies,
gets a report whose sections say what is missing and how to make it. No patient id, no path of an
image and no path of the machine is written; the overlays do show images.
"""

import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecontrast import findings, looked, record
from sparsecontrast.charts import Dot, Line, dot_chart, line_chart
from sparsecontrast.checkpoint import latest, read_round
from sparsecontrast.durable import write_bytes
from sparsecontrast.errors import SparseContrastError
from sparsecontrast.evaluation import run_dataset, run_sites, versions
from sparsecontrast.features import load_method
from sparsecontrast.overrides import key_of
from sparsecontrast.promised import promised
from sparsecontrast.runs import PARTITION, Run, read_evaluation, read_run
from sparsecontrast.settings import MethodConfig, MiramConfig

if TYPE_CHECKING:
    from markupsafe import Markup

    from sparsecontrast.data.cache import Dataset

TEMPLATE = "report.html.j2"


def write_report(run_dir: str | Path, overrides: Sequence[str] = (), show: bool = True) -> Path:
    """Write ``<run_dir>/report.html`` and return its path.

    Args:
        run_dir: a run folder; only ``config.yaml`` must be there.
        overrides: on top of the run's own, such as ``evaluation.overlays=0``.
        show: progress on stderr, should images have to be decoded.

    Raises:
        MissingDataError: not a run folder.
        StorageError: the page cannot be written; an older one is intact.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    run = read_run(run_dir, overrides)
    evaluation = read_evaluation(run.folder)
    dataset, absent = _local_data(run, show)
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    ).get_template(TEMPLATE).render(
        **_overview(run, dataset),
        results=_results(evaluation),
        curves=record.curves(run),
        sites=record.hospital_table(run, dataset),
        partition=record.partition(run, dataset),
        quarantine=record.quarantine(run),
        looks=_looks(run, dataset, absent),
        filled=_filled(run, dataset, absent),
        transfer=record.transfer(run),
        privacy=promised(run),
        config=_settings(run),
    )  # fmt: skip
    path = run.folder / "report.html"
    write_bytes(path, page.encode())
    return path


def _local_data(run: Run, show: bool) -> tuple["Dataset | None", str]:
    """Load the images if they are those of the run, else say why not.

    A federation's server has none: its config may name other data than the sites trained on.
    """
    try:
        dataset = run_dataset(run, show)
        sites = run_sites(run, dataset) or dataset.frame["site"].astype(str).tolist()
    except SparseContrastError as error:
        return None, f"The images cannot be read on this machine ({error.code})."
    strange = {str(r["site"]) for r in run.sites} - set(sites)
    if strange and not record.trained_alone(run):
        return None, "The images lie at the sites; none of them is on this machine."
    return dataset, ""


def _overview(run: Run, dataset: "Dataset | None") -> dict[str, Any]:
    sites = {r["site"] for r in run.sites}
    done = [r for r in run.rounds if r.get("round")]
    return {
        "name": run.folder.name,
        "method": run.config.method.name,
        "alone": record.trained_alone(run),
        "phantom": dataset is not None and run.config.data.kind == "phantom",
        "made": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "seed": run.config.seed,
        "rounds": len(done),
        "rounds_planned": run.config.federation.rounds,
        "tiles": [
            ("hospitals", str(len(sites))),
            ("images", f"{len(dataset):,}" if dataset is not None else _examples(run)),
            ("patients", f"{dataset.frame['patient_id'].nunique():,}" if dataset is not None else "–"),
            ("rounds", f"{len(done)} of {run.config.federation.rounds}"),
            ("sent in all", record.megabytes(sum(r.get("bytes_up") or 0 for r in done))),
            ("training time", record.duration(sum(r.get("seconds") or 0 for r in done))),
        ],
        "plateau": record.plateau(run),
        "versions": versions(),
        "command": _command(run),
    }


def _results(evaluation: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    blocks = []
    for question in findings.questions(evaluation):
        blocks.append({
            "title": question.title,
            "chart": _result_chart(evaluation, question),
            "table": findings.headline_table(evaluation, question, findings.LINEAR),
            "reasons": findings.reasons(evaluation, question),
            "differences": findings.difference_table(evaluation, question),
            "labels": findings.label_table(evaluation, question),
            "hospitals": findings.site_table(evaluation, question),
        })  # fmt: skip
    return {
        "sentences": findings.sentences(evaluation),
        "notes": findings.notes(evaluation),
        "blocks": blocks,
        "neighbours": findings.neighbour_table(evaluation),
        "auto": {"sentence": looked.auto_sentence(evaluation), "chart": _auto_chart(evaluation)},
        "selection": evaluation.get("selection"),
        "recall": looked.recall_table(evaluation),
        "watch": looked.selection_words(evaluation),
        "budgets": [
            [findings.name_of(k), str(b["rounds"]), f"{b['images']:,}"]
            for k, b in evaluation["budgets"].items()
        ],
        "round": evaluation["round"],
    }


def _result_chart(evaluation: Mapping[str, Any], question: findings.Question) -> "Markup":
    groups = []
    for fraction in reversed(findings.fractions(evaluation)):
        rows = findings.pick(evaluation["rows"], question, metric=findings.LINEAR, fraction=fraction)
        dots = [
            Dot(
                findings.name_of(r["features"]),
                r["value"],
                r["low"],
                r["high"],
                r["features"] == evaluation["trained"],
            )
            for r in rows
            if r["value"] is not None
        ]
        if dots:
            groups.append((findings.labels_in_words(fraction), dots))
    return dot_chart(groups, f"AUROC of {question.title}", "AUROC", chance=0.5, high=1.0)


def _auto_chart(evaluation: Mapping[str, Any]) -> "Markup | str":
    """Draw what computing less costs: chosen for each image, and the same share for all."""
    auto = (evaluation.get("auto_keep") or {}).get(evaluation["trained"])
    if auto is None or not auto["curve"]:
        return ""
    ways = (("chosen for each image", "curve", "main"), ("the same share for all", "fixed", "dashed"))
    lines = [
        Line(name, [100 * p["share"] for p in auto[key]], [100 * p["risk"] for p in auto[key]], kind, colour)
        for colour, (name, key, kind) in enumerate(ways)
    ]
    allowed = 100 * (1 - auto["confidence"])
    lines.append(Line(f"allowed: {allowed:.3g} %", lines[1].x, [allowed] * len(lines[1].x), "dashed", 2))
    return line_chart(lines, "share computed against risk", "% of the tokens", "% of images off", zero=True)


def _looks(run: Run, dataset: "Dataset | None", absent: str) -> dict[str, Any] | None:
    """Where a method looks; None where it chooses nothing to look at."""
    from sparsecontrast.overlays import overlays

    config = run.config
    if not isinstance(config.method, MethodConfig):
        return None

    def draw(data: "Dataset", method: Any, number: int) -> tuple[list[Any], str]:
        return overlays(method, data, config.evaluation.overlays, config.seed), ""

    pictures, why = _pictures(run, dataset, absent, draw)
    annotated = any(p.kept_of_boxes is not None for p in pictures)
    return {"pictures": pictures, "why": why, "keep": config.method.keep, "annotated": annotated}


def _filled(run: Run, dataset: "Dataset | None", absent: str) -> dict[str, Any] | None:
    """What a method that reconstructs fills in; None where it is another."""
    from sparsecontrast.reconstructions import HEADS, NO_DECODERS, local_decoders, reconstructions

    config = run.config
    if not isinstance(config.method, MiramConfig):
        return None

    def draw(data: "Dataset", method: Any, number: int) -> tuple[list[Any], str]:
        if not (decoders := local_decoders(run, number)):
            return [], NO_DECODERS
        return reconstructions(method, decoders, data, config.evaluation.overlays, config.seed), ""

    pictures, why = _pictures(run, dataset, absent, draw)
    heads = HEADS if config.method.high_weight > 0 else HEADS[:3]
    shown = round(100 * (1 - config.method.mask_ratio))
    return {
        "pictures": pictures, "why": why, "heads": heads, "shown": shown,
        "normalise": config.method.normalise,
    }  # fmt: skip


def _pictures(
    run: Run, dataset: "Dataset | None", absent: str,
    draw: Callable[["Dataset", Any, int], tuple[list[Any], str]],
) -> tuple[list[Any], str]:  # fmt: skip
    """Draw with the newest round's weights; the pictures, or why there are none."""
    if dataset is None or run.config.evaluation.overlays == 0:
        return [], absent or "Left out by evaluation.overlays=0."
    try:
        number = latest(run.folder)
        if not number:
            return [], "No round was trained."
        return draw(dataset, load_method(run.config, read_round(run.folder, number).tensors), number)
    except SparseContrastError as error:
        return [], f"The weights cannot be shown ({error.code})."


def _settings(run: Run) -> list[tuple[str, str]]:
    b, d, f, m, t = (getattr(run.config, n) for n in ("backbone", "data", "federation", "method", "train"))
    parts = f"{b.tiles}x{b.tiles} tiles" if b.tiles else f"patch {b.patch_size}"
    depth = f", depth {b.depth}" if b.depth else ""
    start = ", from pretrained weights" if b.pretrained or run.config.init else ""
    epochs = "1 local epoch" if t.local_epochs == 1 else f"{t.local_epochs} local epochs"
    epochs = epochs if t.steps is None else f"{t.steps} steps a round"
    return [
        ("method", _method_words(m)),
        ("backbone", f"{b.name}, {b.img_size} px, {parts}{depth}{start}"),
        ("data", f"{d.name}, {d.image_size} px"),
        ("federation", f"{f.strategy}, {f.rounds} rounds, fraction {f.fraction:g}, partition {f.partition}"),
        ("local training", f"{t.batch_size} images a batch, {epochs}, learning rate {t.lr:g}, {t.precision}"),
        (
            "privacy",
            "no differential privacy" if run.config.privacy.name == "none" else run.config.privacy.name,
        ),
        ("seed", str(run.config.seed)),
    ]


def _method_words(method: MethodConfig | MiramConfig) -> str:
    if isinstance(method, MethodConfig):
        return f"{method.name}, keep {method.keep:g}, selection {method.selection}"
    high = f", x{method.upsample} by {method.attention}, weight {method.high_weight:g}"
    return f"{method.name}, mask ratio {method.mask_ratio:g}{high if method.high_weight else ''}"


def _command(run: Run) -> str:
    """Write the command that makes this run again; absolute paths are cut to their last part."""
    words = [w for w in run.config.overrides if key_of(w) not in ("output_dir", "resume")]
    # a simulation that cuts the sites itself names the table it has just written
    words = [w for w in words if key_of(w) != "data.index" or PARTITION not in w]
    told = " ".join(_without_folders(w) for w in words)
    tool = "sparsecontrast pretrain" if record.trained_alone(run) else "python -m simulation"
    return f"{tool} {told}".strip()


def _without_folders(word: str) -> str:
    key, sign, value = word.partition("=")
    bare = value.strip("'\"")
    return f"{key}{sign}…/{Path(bare).name}" if bare.startswith(("/", "~")) else word


def _examples(run: Run) -> str:
    latest_of = {r["site"]: r["num_examples"] for r in run.sites if "num_examples" in r}
    return f"{sum(latest_of.values()):,}" if latest_of else "–"
