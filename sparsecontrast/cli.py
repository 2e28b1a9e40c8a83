"""``sparsecontrast`` index | pretrain | evaluate | report | export | budget | phantom.

Heavy imports happen inside the commands, so that ``--help`` answers at once. Every error a user can
cause ends as one line on stderr and exit status 2. ``budget`` alone has one more: 3, nothing is wrong, but
what is left does not pay for another round.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsecontrast.errors import ConfigError, SparseContrastError, StorageError

OVERRIDES = "Hydra overrides of configs/, such as data=phantom seed=1"
SHEET_PIXELS = 80_000_000  # above 89 million Pillow takes a picture for a bomb


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its status: 0, 2 a user's error, 3 no budget left, 130 interrupted."""
    parser = _parser()
    options, more = parser.parse_known_args(arguments)
    # overrides may also stand after an option, where argparse no longer expects them
    if more and (not hasattr(options, "overrides") or any(word.startswith("-") for word in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        options.overrides = [*options.overrides, *more]
    try:
        return options.run(options) or 0
    except SparseContrastError as error:
        print(f"error [{error.code}]: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a table went away
        sys.stderr.close()
        return 0


def _index(options: argparse.Namespace) -> None:
    from sparsecontrast.config import anchored, compose
    from sparsecontrast.data.cache import load_rows
    from sparsecontrast.data.index import build_index, write_index, write_table

    config = compose(options.overrides)
    # where the key of the pseudonyms lies: the site's own folder, or that of the run to come
    state = anchored(config.site.state_dir or Path(config.output_dir) / "state")
    told = ""
    if config.data.kind == "phantom" or config.data.index is not None:
        frame, quarantine = load_rows(config.data, state, progress=True)
    else:
        built = build_index(config.data, state)
        frame, quarantine = built.frame, built.quarantine
        told = "; ".join(f"{n} {name.replace('_', ' ')}" for name, n in built.counts.items()) + "\n"
    write_index(frame, options.out / "index.csv")
    write_table(quarantine, options.out / "quarantine.csv")
    counts = frame.groupby(["site", "split"]).size().unstack(fill_value=0)
    rows = [
        [str(site), *(str(row.get(s, 0)) for s in ("train", "val", "test"))]
        for site, row in counts.iterrows()
    ]
    patients = frame.groupby("site")["patient_id"].nunique()
    _table(["site", "train", "val", "test", "patients"], [[*r, str(patients[r[0]])] for r in rows])
    reasons = Counter(zip(quarantine["stage"], quarantine["reason"], strict=True)).most_common()
    if reasons:
        _table(["stage", "reason", "files left out"], [[s, r, str(n)] for (s, r), n in reasons])
    print(f"{told}{len(frame)} images, {len(quarantine)} files left out: {options.out / 'index.csv'}")


def _pretrain(options: argparse.Namespace) -> None:
    from sparsecontrast.config import compose
    from sparsecontrast.pretrain import pretrain

    print(f"run folder: {pretrain(compose(options.overrides))}")


def _evaluate(options: argparse.Namespace) -> None:
    from sparsecontrast.evaluation import evaluate_run
    from sparsecontrast.findings import print_results

    result = evaluate_run(options.run_dir, options.overrides, against=options.against)
    print_results(result)
    print(f"all rows: {Path(options.run_dir) / 'evaluation.json'}")


def _report(options: argparse.Namespace) -> None:
    from sparsecontrast.report import write_report

    print(write_report(options.run_dir, options.overrides))


def _export(options: argparse.Namespace) -> None:
    from sparsecontrast.export import export_run

    record = export_run(options.run_dir, options.out, options.keep, options.format.split(","), options.int8)
    keep, onnx = record["keep"], record.get("onnx", {"checks": {}, "latency": []})
    checks = dict(onnx["checks"])
    if "timm" in record:
        checks[record["timm"]["weights"]] = record["timm"]["check"]
    rows = [
        [name, f"{c['max_abs_difference']:.1e}", f"{c['min_cosine']:.5f}" if "min_cosine" in c else ""]
        for name, c in checks.items()
    ]
    _table(["file", "max difference from the run", "min cosine"], rows)
    if onnx["latency"]:
        times = [[r["file"], str(r["batch"]), f"{r['ms_per_image']:.2f}"] for r in onnx["latency"]]
        _table(["onnxruntime, one thread", "batch", "ms per image"], times)
    cells = f"{keep['fine_cells']} of {keep['cells']} cells fine"
    print(f"{options.out}: round {record['round']}, {cells}, every file checked against the run")


def _budget(options: argparse.Namespace) -> int:
    from sparsecontrast import budget

    if not options.folders and not options.plan:
        raise ConfigError("budget: give a site's state folder, or --plan EPSILON ROUNDS Q")
    ledgers, told = budget.find_ledgers(options.folders), {}
    if options.adopt is not None:
        for ledger in ledgers:
            ledger.adopt(options.adopt)
    if options.plan:
        epsilon, rounds, q = options.plan
        if not isinstance(rounds, int):
            raise ConfigError(f"--plan: ROUNDS={rounds:g} must be a whole number")
        books = [ledger.read() for ledger in ledgers] or [None]
        told["plans"] = [budget.plan(epsilon, rounds, q, options.steps, options.delta, b) for b in books]
    elif options.verify or options.noted:
        told["verified"] = [budget.verify(ledger, options.noted) for ledger in ledgers]
    else:
        told["ledgers"] = [budget.statement(ledger) for ledger in ledgers]
    if options.json:
        print(json.dumps(told, indent=1))
    else:
        _print_budget(told)
    return 3 if budget.any_spent(told.get("ledgers", [])) else 0


def _print_budget(told: dict[str, list[dict[str, Any]]]) -> None:
    for p in told.get("plans", []):
        print(
            f"noise_multiplier {p['noise_multiplier']:g}: {p['rounds']} rounds x {p['steps_per_round']} "
            f"steps at sample_rate {p['sample_rate']:g}, on top of epsilon {p['spent']:.3f}, end at "
            f"{p['epsilon']:.3f} of {p['target_epsilon']:g} (delta {p['delta']:g})"
        )
    for v in told.get("verified", []):
        print(f"{v['folder']}: whole. To prove it again later, note: --noted {v['rows']}:{v['hash']}")
    for site in told.get("ledgers", []):
        print(f"{site['folder']}: {site['rows']} rows, head {site['rows']}:{site['hash'][:16]}")
        head = ["cohort", "patients", "epsilon", "of", "delta", "left", "next round", "rounds left"]
        rows = [
            [c["cohort"][:8], str(c["patients"]), f"{c['epsilon']:.3f}", f"{c['target_epsilon']:g}",
             f"{c['delta']:g}", f"{c['left']:.3f}", f"{c['next_round']:.3f}", str(c["rounds_left"])]
            for c in site["cohorts"]
        ]  # fmt: skip
        _table(head, rows)
        head = ["run", "cohort", "rounds", "charged", "steps", "sigma", "q", "epsilon alone", "last"]
        rows = [
            [r["run"], r["cohort"][:8], str(r["rounds"]), str(r["charged"]), str(r["steps"]),
             _numbers(r["noise_multiplier"]), _numbers(r["sample_rate"]), f"{r['epsilon_alone']:.3f}",
             r["last"]]
            for r in site["runs"]
        ]  # fmt: skip
        _table(head, rows)
        for adopted in site["adopted"]:
            print(f"adopted {adopted['time']}: {adopted['reason']}")


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{v:g}" for v in values)


def _planned(text: str) -> float | int:
    # --plan EPSILON ROUNDS Q mixes both
    return int(text) if text.isdecimal() else float(text)


def _share(text: str) -> str | float:
    # auto is known, and refused by the export with a reason
    return text if text in ("dense", "sparse", "auto") else float(text)


def _phantom(options: argparse.Namespace) -> None:
    import numpy as np
    from PIL import Image

    from sparsecontrast.data.phantom import render

    _check_sheet(options)
    rows = [
        np.concatenate(
            [render(options.seed, s, p, 0, options.size).image for p in range(options.patients)], 1
        )
        for s in range(options.sites)
    ]
    sheet = (np.concatenate(rows, 0) * 255).round().astype(np.uint8)
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet).save(options.out)
    except (OSError, ValueError) as error:
        raise StorageError(f"{options.out}: cannot be written: {error}") from error
    print(f"{options.out}: one row a hospital, one column a patient")


def _check_sheet(options: argparse.Namespace) -> None:
    """Refuse a sheet without films, and one that no viewer would open."""
    from sparsecontrast.ranges import COUNT, PIXELS, SEED, check_range

    bounds = {"sites": COUNT, "patients": COUNT, "size": (1, PIXELS, "[]"), "seed": SEED}
    for name, allowed in bounds.items():
        check_range(f"--{name}", getattr(options, name), allowed)
    films = options.sites * options.patients
    if films * options.size**2 > SHEET_PIXELS:
        raise ConfigError(
            f"--sites, --patients, --size: {films} films of {options.size} x {options.size} pixels, but a "
            f"sheet has at most {SHEET_PIXELS}; ask for fewer or smaller ones"
        )


def _table(head: list[str], rows: list[list[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for i, cell in enumerate(head):
        table.add_column(cell, justify="right" if i and rows and rows[0][i].isdigit() else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparsecontrast",
        description="Federated sparse contrastive pretraining of chest X-ray backbones.",
        epilog="A federation is run by `python -m simulation` on one machine and by `flwr run` on many.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    index = _command(commands, "index", _index, "list the images of a data set, with pseudonyms and splits")
    index.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    index.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="for index.csv and quarantine.csv"
    )

    pretrain = _command(commands, "pretrain", _pretrain, "train at one place, without a federation")
    pretrain.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)

    evaluate = _command(commands, "evaluate", _evaluate, "score the frozen features of a run")
    _run_folder(evaluate)
    evaluate.add_argument(
        "--against",
        type=Path,
        action="append",
        default=[],
        metavar="RUN",
        help="score this run beside it; may be repeated",
    )

    _run_folder(_command(commands, "report", _report, "write report.html of a run"))

    export = _command(commands, "export", _export, "write a run's backbone for timm and onnxruntime, checked")
    export.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the output_dir of a run")
    export.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new, or empty")
    export.add_argument(
        "--keep",
        type=_share,
        default="sparse",
        metavar="dense|sparse|NUMBER",
        help="share of the tokens (CNN: of the tiles) in the sparse graph; default sparse, as the run has it",
    )
    export.add_argument("--format", default="timm,onnx", metavar="timm,onnx", help="default both")
    export.add_argument("--int8", action="store_true", help="quantised ONNX graphs besides")

    _budget_options(
        _command(commands, "budget", _budget, "tell what privacy was spent, and plan what may be")
    )

    phantom = _command(commands, "phantom", _phantom, "draw a contact sheet of procedural radiographs")
    phantom.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    for name, default in (("sites", 5), ("patients", 8), ("size", 224), ("seed", 0)):
        phantom.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    return parser


def _command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.set_defaults(run=run)
    return command


def _budget_options(budget: argparse.ArgumentParser) -> None:
    budget.add_argument(
        "folders", nargs="*", type=Path, metavar="FOLDER", help="a site's state_dir, or a folder of such"
    )
    budget.add_argument(
        "--plan",
        nargs=3,
        type=_planned,
        metavar=("EPSILON", "ROUNDS", "Q"),
        help="the least noise with which these rounds fit, after what FOLDER's newest cohort has spent",
    )
    budget.add_argument("--steps", type=int, default=1, metavar="N", help="noisy steps a round; default 1")
    budget.add_argument(
        "--delta", type=float, default=1e-5, help="of a plan without FOLDER; below 1/patients; default 1e-5"
    )
    budget.add_argument("--verify", action="store_true", help="prove that no row was changed or taken away")
    budget.add_argument("--noted", metavar="ROW:HASH", help="and that this one, noted before, is still there")
    budget.add_argument(
        "--adopt",
        metavar="REASON",
        help="accept a ledger that was moved to another disk; vouches that the original is gone",
    )
    budget.add_argument("--json", action="store_true", help="print JSON")
    budget.epilog = "Exit status: 0 in order, 2 an error or a broken ledger, 3 no further round fits."


def _run_folder(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the output_dir of a run")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="on top of the run's own")


if __name__ == "__main__":
    sys.exit(main())
