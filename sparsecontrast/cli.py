"""The command ``sparsecontrast``, one function each; ``--help`` lists them.

Heavy imports happen inside the commands, so that ``--help`` answers at once. Every error a user can
cause ends as one line on stderr and exit status 2. ``budget`` has one more: 3, nothing is wrong, but what is
left does not pay for another round; ``doctor`` ends with 1 where it found a fault.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sparsecontrast import provision_commands, site_commands
from sparsecontrast.classify import commands as classify_commands
from sparsecontrast.errors import ConfigError, SparseContrastError, StorageError
from sparsecontrast.terminal import print_table

OVERRIDES = "Hydra overrides of configs/, such as data=phantom seed=1"
SHEET_PIXELS = 80_000_000  # above 89 million Pillow takes a picture for a bomb


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 a fault found, 2 a user's error, 3 no budget, 130 interrupted."""
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
    from sparsecontrast.config import compose, shared_state_dir
    from sparsecontrast.data.cache import load_rows
    from sparsecontrast.data.index import build_index, write_index, write_table

    config = compose(options.overrides)
    # where the key of the pseudonyms lies: the site's own folder, or that of the run to come
    state = shared_state_dir(config)
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
    print_table(["site", "train", "val", "test", "patients"], [[*r, str(patients[r[0]])] for r in rows])
    reasons = Counter(zip(quarantine["stage"], quarantine["reason"], strict=True)).most_common()
    if reasons:
        print_table(["stage", "reason", "files left out"], [[s, r, str(n)] for (s, r), n in reasons])
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
    print_table(["file", "max difference from the run", "min cosine"], rows)
    if onnx["latency"]:
        times = [[r["file"], str(r["batch"]), f"{r['ms_per_image']:.2f}"] for r in onnx["latency"]]
        print_table(["onnxruntime, one thread", "batch", "ms per image"], times)
    cells = f"{keep['fine_cells']} of {keep['cells']} cells fine"
    print(f"{options.out}: round {record['round']}, {cells}, every file checked against the run")


def _denoise(options: argparse.Namespace) -> None:
    from sparsecontrast.denoising import denoise_file

    like = Path(options.dicom) if options.dicom else None
    metrics = denoise_file(
        options.file, options.out, options.overrides, dicom=options.dicom is not None, like=like
    )
    head = ["image", "gCNR", "CNR", "speckle SNR", "contrast, dB"]
    keys = ("gcnr", "cnr", "speckle_snr", "contrast_db")
    if metrics["regions"]:
        print_table(head, [[r["image"], *(f"{r[key]:.3g}" for key in keys)] for r in metrics["regions"]])
    if metrics["only_noise"]:
        print("the apertures share next to nothing: this may be noise alone", file=sys.stderr)
    print(f"{options.out / 'report.html'}: {metrics['steps']} steps, {metrics['seconds']:.0f} s")


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

    text = "write a run's backbone for timm and onnxruntime, checked"
    _export_options(_command(commands, "export", _export, text))

    text = "tell cells apart from a few of their pixels: train, and judge"
    classify_commands.classify_options(_command(commands, "classify", None, text))

    text = "denoise one ultrasound acquisition, by itself alone"
    _denoise_options(_command(commands, "denoise", _denoise, text))

    text = "tell what privacy was spent, and plan what may be"
    site_commands.budget_options(_command(commands, "budget", site_commands.budget, text))
    text = "tell what left a site, prove it, and approve what waits"
    site_commands.egress_options(_command(commands, "egress", site_commands.egress, text))
    text = "check a site before its first run"
    site_commands.doctor_options(_command(commands, "doctor", site_commands.doctor, text))
    text = "make certificates, keys and kits of a federation, and change them"
    provision_commands.provision_options(_command(commands, "provision", provision_commands.provision, text))

    phantom = _command(commands, "phantom", _phantom, "draw a contact sheet of procedural radiographs")
    phantom.add_argument("--out", type=Path, required=True, metavar="FILE.png")
    for name, default in (("sites", 5), ("patients", 8), ("size", 224), ("seed", 0)):
        phantom.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    return parser


def _export_options(export: argparse.ArgumentParser) -> None:
    export.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the output_dir of a run")
    export.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new, or empty")
    export.add_argument(
        "--keep",
        type=_share,
        default=None,
        metavar="dense|sparse|NUMBER",
        help="share of the tokens (CNN: of the tiles) in the sparse graph; default sparse, as the run has it "
        "where its method chooses regions",
    )
    export.add_argument("--format", default="timm,onnx", metavar="timm,onnx", help="default both")
    export.add_argument("--int8", action="store_true", help="quantised ONNX graphs besides")


def _denoise_options(denoising: argparse.ArgumentParser) -> None:
    denoising.add_argument("file", type=Path, metavar="FILE.npz", help="sub-aperture images or channel data")
    denoising.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of configs/method/a2a.yaml")
    denoising.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="for images and report.html"
    )
    text = "write denoised.dcm too, for the patient and study of LIKE.dcm, or nobody's"
    denoising.add_argument("--dicom", nargs="?", const="", metavar="LIKE.dcm", help=text)


def _command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    if run is not None:  # else its actions have one each
        command.set_defaults(run=run)
    return command


def _run_folder(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the output_dir of a run")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="on top of the run's own")


if __name__ == "__main__":
    sys.exit(main())
