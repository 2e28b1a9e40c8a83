"""What sparsity buys: speed and memory of training and inference, against dense timm and against rivals.

    python -m benchmarks.sparsity [--quick] [--json FILE] [--device cpu|cuda] [--compile]
        [--models tiny,small,...] [--sizes 224,384,512] [--batch N] [KEY=VALUE ...]

A training step is forward, InfoNCE, backward and AdamW on two views; for SparseContrast it is the
method's whole step, scorer included. A teacher, where there is one (``selection=attention``), runs in one
step of ``distill_every``: a step with and one without it are timed each, and averaged by share. Inference
is images to embedding, predictor included, one image at a time (``infer_1``) and a batch (``infer_n``).

Every ratio says how many times FASTER than a dense reference, memory shares how much of the
reference's memory; two references:

- ``equal_precision``: dense timm at the row's precision, fused or explicit attention, whichever was faster
  in this very measurement (for memory: whichever needs less); int8 (linear layers alone, dynamic
  quantisation) is for inference on a CPU; of a ResNet with GroupNorm, as ours;
- ``stock_fp32``: dense timm as it comes, fp32 with fused attention, not compiled; ResNet-18 has BatchNorm,
  and lines of its own (``stock``).

``keep`` is what was asked for, ``fine_cells`` and ``token_share`` what that comes to (``shares.py``).

Medians of paired ratios with their 5 % and 95 % quantiles. On a CPU ``cost_ms`` is CPU time of one
thread; on a GPU time between CUDA events. Rivals infer at the share they trained with, though
PatchDropout and FLIP themselves infer dense.
On a CPU a step has few images, so what does not grow with them (AdamW, EMA, weights in the peak) weighs
more than in training. With ``--json`` a killed run continues when the command is given again: what is
finished waits in ``FILE.partial``.
"""

import argparse
import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.alone import Alone, remote_clock
from benchmarks.contenders import (
    OURS,
    Contender,
    Model,
    Workload,
    build_workload,
    is_vit,
    random_batch,
    stock,
)
from benchmarks.memory import training_memory
from benchmarks.record import machine, print_table, write_result
from benchmarks.sparsity_rows import Cell, fold
from benchmarks.stopwatch import Part, cuda_clock, interleave
from sparsecontrast.errors import MethodError
from sparsecontrast.levels import STRIDE

NAMES = {"tiny": "vit_tiny", "small": "vit_small", "base": "vit_base"}
MODELS = ("tiny", "small", "convnext_atto", "convnext_tiny", "resnet18", "resnet50")
LIGHT = ("vit_tiny", "convnext_atto")  # twice the images a step on a CPU
BATCH = {"cpu": {224: 8, 384: 4, 512: 4}, "cuda": {224: 256, 384: 64, 512: 16}}
PRECISIONS = {"cpu": ("fp32", "bf16", "int8"), "cuda": ("fp32", "bf16")}
KEEPS = (1.0, 0.7, 0.5, 0.35, 0.3, 0.25)
TOKEN_RIVALS = ("evit", "evit_one_stage", "dynamic_vit", "tome", "random_drop", "low_resolution")
FEW_RIVALS = ("evit", "tome", "random_drop", "low_resolution")
COMPILED_RIVALS = ("random_drop", "low_resolution")
PHASES = ("train", "infer_1", "infer_n")
TOGETHER = {224: 9, 384: 4, 512: 3}  # contenders at a time on a CPU: their memory adds up
SHOWN = {
    "method": "method", "keep": "keep", "precision": "precision", "attention": "attention",
    "phase": "phase", "cost_ms": "ms", "ratio_equal_precision": "x equal", "ratio_equal_precision_low": "low",
    "ratio_equal_precision_high": "high", "ratio_stock_fp32": "x stock fp32",
    "peak_share_equal_precision": "peak", "saved_share_equal_precision": "saved",
}  # fmt: skip


@dataclass(frozen=True)
class Protocol:
    """How much is measured: shares, repeats (at least, at most), seconds of a phase of a cell."""

    keeps: Sequence[float] = KEEPS
    rival_keeps: Sequence[float] = (0.5,)
    repeats: tuple[int, int] = (5, 15)
    seconds: float = 20.0
    batch: int | None = None
    full: bool = True


QUICK = Protocol(keeps=(0.5, 0.25), repeats=(2, 2), batch=2, full=False)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure cell by cell, print, and write JSON if asked."""
    args = _arguments(argv)
    device = torch.device(args.device)
    protocol = QUICK if args.quick else Protocol()
    protocol = replace(protocol, batch=args.batch or protocol.batch)
    partial = None if args.json is None else args.json.with_name(args.json.name + ".partial")
    rows = _continued(partial, _command(args))
    for cell in cells(args.models, args.sizes, tuple(args.changes), args.compile, args.device):
        key = cell.key()
        if any(all(row.get(name) == value for name, value in key.items()) for row in rows):
            continue
        found = measure(cell, protocol, device)
        told = [{short: row[name] for name, short in SHOWN.items() if name in row} for row in found]
        print_table(" ".join(str(value) for value in key.values()), told)
        rows += found
        if partial is not None:
            write_result("sparsity", _command(args), rows, partial)
    if args.json is not None and partial is not None:
        write_result("sparsity", _command(args), rows, args.json)
        partial.unlink()


def cells(
    models: Sequence[str], sizes: Sequence[int], changes: tuple[tuple[str, Any], ...], compiled: bool,
    device: str,
) -> Iterator[Cell]:  # fmt: skip
    """Give what to measure; CNNs at 224 alone, backbones without a config are told and left out."""
    for name in models:
        for size in sizes:
            model = Model(NAMES.get(name, name), size, changes)
            try:
                vit = is_vit(model)
                if not vit:  # tiles of 32 px, as large as a ViT's cells
                    model = replace(model, changes=(("backbone.tiles", size // STRIDE), *changes))
            except FileNotFoundError:
                print(f"{model.backbone}: not built")
                break
            if vit or size == 224:
                for precision in PRECISIONS[device]:
                    ways = (False, True) if compiled and precision != "int8" else (False,)
                    if precision == "int8" and not vit and model.backbone != "convnext_tiny":
                        continue  # no linear layer to quantise
                    for way in ways:
                        yield Cell(model, precision, way)


def references(cell: Cell, device: torch.device) -> list[Contender]:
    """Name the dense models: stock first, then those at the cell's precision."""
    first = stock(cell.model)
    dense = Contender("dense", precision=cell.precision, compiled=cell.compiled)
    found = [first] if dense == first else [first, dense]
    # CNNs have no attention; in fp32 on a CPU the explicit one only grows slower with the tokens
    hopeless = cell.precision == "fp32" and device.type == "cpu" and cell.model.size > 224
    return found if hopeless or not is_vit(cell.model) else [*found, replace(dense, attention="explicit")]


def contenders(cell: Cell, protocol: Protocol, device: torch.device) -> list[Contender]:
    """Name all but the references: ours, then the rivals that this backbone can have.

    A CPU needs minutes for a table of large images: sizes above 224, and ``--quick``, get fewer lines.
    """
    cpu, vit = device.type == "cpu", is_vit(cell.model)
    # on a CPU the fused kernel's bf16 backward is the slower one, and the trainer avoids it too
    attention = "explicit" if cell.precision == "bf16" and cpu else "fused"
    like = Contender("", precision=cell.precision, attention=attention, compiled=cell.compiled)
    keeps, rivals, rival_keeps = protocol.keeps, TOKEN_RIVALS, protocol.rival_keeps
    few = cpu and (cell.model.size > 224 or not protocol.full)
    if few:
        # a share that only higher levels of cells can reach
        keeps, rivals = ((0.5, 0.25, 0.15) if cell.model.size > 224 else (0.5, 0.25)), FEW_RIVALS
    elif protocol.full and (not cpu or cell.model.backbone == "vit_tiny"):
        rival_keeps = (0.7, 0.5, 0.25)
    rivals = ("low_resolution",) if not vit else COMPILED_RIVALS if cell.compiled else rivals
    found = [replace(like, method=OURS, keep=keep) for keep in keeps]
    found += [replace(like, method=name, keep=keep) for name in rivals for keep in rival_keeps]
    if vit:
        share = 1 / cell.model.configs()[1].cell ** 2
        found.append(replace(like, method="all_coarse", keep=share))
    if vit and not few:
        found.append(replace(like, method="masked", keep=0.5))
    return found


def measure(cell: Cell, protocol: Protocol, device: torch.device) -> list[dict[str, Any]]:
    """Measure one cell: memory of each contender by itself, then the times of all, interleaved.

    On a CPU a few contenders at a time, each in a process of its own (``alone.py``), beside the references.
    """
    dense, others = references(cell, device), contenders(cell, protocol, device)
    size = len(others) if device.type == "cuda" else _of_size(TOGETHER, cell.model)
    rows: list[dict[str, Any]] = []
    for start in range(0, len(others), size):
        found = _measure_group(cell, dense, others[start : start + size], protocol, device)
        rows += found if not start else [r for r in found if r["method"] not in ("dense", "stock")]
    order = {phase: number for number, phase in enumerate(PHASES)}
    return sorted(rows, key=lambda row: order[row["phase"]])


def _measure_group(
    cell: Cell, dense: list[Contender], others: list[Contender], protocol: Protocol, device: torch.device
) -> list[dict[str, Any]]:
    images = {"infer_1": 1, "infer_n": protocol.batch or _batch(cell.model, device)}
    images["train"] = images["infer_n"]
    phases = PHASES[1:] if cell.precision == "int8" else PHASES
    memory: dict[Contender, dict[str, float]] = {}
    works: dict[Contender, Alone | dict[str, list[Part]]] = {}
    alone = device.type == "cpu"
    try:
        for contender in [*dense, *others]:
            try:
                if "train" in phases:
                    memory[contender] = training_memory(contender, cell.model, images["train"], device)
                told = (contender, cell.model, {phase: images[phase] for phase in phases}, device.type)
                works[contender] = Alone(build_parts, *told) if alone else build_parts(*told)
            except MethodError as error:
                print(f"{cell.model.backbone} {contender.method} at {contender.keep}: not built: {error}")
        rows = []
        for phase in phases:
            parts = {c: w.parts(phase) if isinstance(w, Alone) else w[phase] for c, w in works.items()}
            clock = remote_clock if alone else cuda_clock
            times = interleave(parts, dense, clock, protocol.repeats, protocol.seconds)
            rows += fold(cell, phase, images[phase], times, dense, memory if phase == "train" else {})
        return rows
    finally:
        for work in works.values():
            if isinstance(work, Alone):
                work.close()
        gc.collect()


def build_parts(
    contender: Contender, model: Model, images: dict[str, int], device: str
) -> dict[str, list[Part]]:
    """Build a contender and what is timed of it: the parts of each phase, on so many images.

    Raises:
        MethodError: it cannot be had; a share may be refused only at inference.
    """
    work = build_workload(contender, model, torch.device(device))
    work.infer(random_batch(model.size, 1, work.device, 0).first)
    return {phase: _parts(work, model, phase, count) for phase, count in images.items()}


def _parts(work: Workload, model: Model, phase: str, images: int) -> list[Part]:
    if phase != "train":
        batch = random_batch(model.size, images, work.device, 1)
        return [(1.0, lambda: work.infer(batch.first))]
    plain = random_batch(model.size, images, work.device, 1)
    if work.cycle == 1:
        return [(1.0, lambda: work.step(plain))]
    taught = random_batch(model.size, images, work.device, 0)
    return [(1.0, lambda: work.step(taught)), (work.cycle - 1.0, lambda: work.step(plain))]


def _of_size(table: dict[int, int], model: Model) -> int:
    """What a table says of the size next to the model's."""
    return table[min(table, key=lambda size: abs(size - model.size))]


def _batch(model: Model, device: torch.device) -> int:
    """Images a step: enough to fill a GPU, few on a CPU, where more change nothing but the time."""
    images = _of_size(BATCH[device.type], model)
    return images * 2 if device.type == "cpu" and model.backbone in LIGHT else images


def _continued(partial: Path | None, command: str) -> list[dict[str, Any]]:
    """Rows that an earlier run of the same command left on the same machine."""
    if partial is None or not partial.is_file():
        return []
    found, here = json.loads(partial.read_text()), machine()
    same = all(found["machine"].get(name) == here.get(name) for name in ("cpu", "gpu"))
    if found["command"] != command or not same:
        print(f"{partial.name}: of another command or machine, measured anew")
        return []
    return found["rows"]


def _command(args: argparse.Namespace) -> str:
    words = ["python -m benchmarks.sparsity", *(["--quick"] if args.quick else [])]
    words += [f"--device {args.device}", *(["--compile"] if args.compile else [])]
    words += ["--models " + ",".join(args.models), "--sizes " + ",".join(map(str, args.sizes))]
    words += [f"--batch {args.batch}"] if args.batch else []
    return " ".join([*words, *(f"{key}={value}" for key, value in args.changes)])


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ViT-tiny at 224 and few repeats, two minutes")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--compile", action="store_true", help="also compiled: dense, ours, the static rivals"
    )
    parser.add_argument("--models", help="tiny, small, base or names of configs/backbone")
    parser.add_argument("--sizes", help="pixels")
    parser.add_argument("--batch", type=int, help="images a step")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="backbone.KEY or method.KEY")
    args = parser.parse_args(argv)
    args.models = (args.models or ("tiny" if args.quick else ",".join(MODELS))).split(",")
    args.sizes = [int(s) for s in (args.sizes or ("224" if args.quick else "224,384,512")).split(",")]
    pairs = [word.partition("=") for word in args.changes]
    args.changes = [(key, yaml.safe_load(value)) for key, _, value in pairs]
    return args


if __name__ == "__main__":
    main()
