"""``sparsecontrast classify`` train | evaluate: the options, and what is printed."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from sparsecontrast.terminal import print_table

OVERRIDES = "Hydra overrides of configs/classify.yaml, such as cells.root=FOLDER seed=1"


def classify_options(classify: argparse.ArgumentParser) -> None:
    """Add the actions of ``classify``."""
    actions = classify.add_subparsers(required=True, metavar="ACTION")
    text = "train SparseAttnNet on pictures of cells, then judge it"
    one = actions.add_parser("train", help=text, description=f"{text[0].upper()}{text[1:]}.")
    one.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    one.set_defaults(run=train)
    text = "judge a trained run: evaluation.json and report.html"
    one = actions.add_parser("evaluate", help=text, description=f"{text[0].upper()}{text[1:]}.")
    one.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the output_dir of a run")
    one.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the data, on top of the run's own")
    one.set_defaults(run=evaluate)


def train(options: argparse.Namespace) -> None:
    """Run ``classify train``."""
    from sparsecontrast.classify.run import train as train_run
    from sparsecontrast.classify.settings import compose_classify

    judge_run(train_run(compose_classify(options.overrides)))


def evaluate(options: argparse.Namespace) -> None:
    """Run ``classify evaluate``."""
    judge_run(options.run_dir, options.overrides)


def judge_run(folder: Path, overrides: Sequence[str] = ()) -> None:
    """Judge a run, print the scores and write its report."""
    from sparsecontrast.classify import run as runs
    from sparsecontrast.classify.report import write_report

    run = runs.read_trained(folder, overrides)
    found = runs.evaluate(run)
    rows = [
        [one["lab"], str(one["images"]), *(_words(one[key]) for key in ("accuracy", "macro_f1"))]
        for one in found["tested"]
    ]
    print_table(["lab", "images", "accuracy (95 %)", "macro-F1 (95 %)"], rows)
    for lab, tested in found["local_only"].items():
        told = ", ".join(f"{one['lab']} {_words(one['macro_f1'])}" for one in tested)
        print(f"trained at {lab} alone, macro-F1: {told}")
    print(
        f"{100 * found['pixel_share']:.1f} % of the pixels read, {found['parameters']:,} parameters, "
        f"{found['left_out']} pictures left out: {write_report(run, found)}"
    )


def _words(score: dict[str, float]) -> str:
    return f"{score['value']:.3f} ({score['low']:.3f} to {score['high']:.3f})"
