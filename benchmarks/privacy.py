"""What privacy costs: a private step against one without, and against plain Opacus on raw timm.

    python -m benchmarks.privacy [--quick] [--json FILE] [--models vit_tiny,...] [--images N] [--no-memory]

A private step is all of it: gradients of each image, regrouped to patients, clipped, summed; cryptographic
noise for every parameter that the loss reaches; AdamW; what follows the weights (patch contrast has no EMA).
The ledger is asked by a callback that books nothing here (``benchmarks.ledger_cost`` measures it).

One step is ``images`` images of two views each. Noise and AdamW are paid once a step, whatever its size: a
larger batch has a smaller share of them. So the stages stand by themselves: ``forward_backward`` (for ours
and Opacus with the gradients of each row), ``clip`` (norms, sum), ``noise``, ``optimizer``. A row with
``pieces`` takes the same step in virtual steps, one with ``films`` has patients of several images.

``of_dense`` is the step's cost over that of the fastest dense step without privacy at this precision (timm's
network with both views as one batch, or ours at keep 1), ``of_own`` over the same step without privacy,
``opacus_ratio`` how many times longer plain Opacus takes at the same share of the tokens (the faster of hooks
and ghost; ``opacus_frozen`` trains fewer parameters and stands apart). Medians of paired ratios with their
5 % and 95 % quantiles; CPU time of one thread. ``peak_mib`` is of two steps in a process of its own, weights,
moments and per-row gradients included; bytes saved for the backward pass are not told, because what hooks
hold autograd does not know.
"""

import argparse
import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.contenders import Model, is_vit
from benchmarks.memory import peak_of
from benchmarks.private_arms import OURS, STAGES, TIMM, Arm, Step, build_step
from benchmarks.record import print_table, write_result
from benchmarks.stopwatch import Part, Times, cpu_clock, interleave, ratio

MODELS = ("vit_tiny", "convnext_atto")
OPACUS = ("opacus_hooks", "opacus_ghost")
KEEPS = (1.0, 0.5, 0.25)
SHOWN = {
    "method": "method", "private": "private", "keep": "keep", "films": "films", "pieces": "pieces",
    "cost_ms": "ms", "of_dense": "of dense", "of_own": "of own", "opacus_ratio": "opacus x",
    **{f"{stage}_ms": stage for stage in STAGES}, "peak_mib": "peak MiB",
}  # fmt: skip


@dataclass(frozen=True)
class Protocol:
    """How much is measured: images of a step, shares, repeats (at least, at most), seconds of a cell."""

    images: int = 16
    keeps: Sequence[float] = KEEPS
    repeats: tuple[int, int] = (7, 15)
    seconds: float = 900.0
    memory: bool = True


QUICK = Protocol(images=4, keeps=(0.5,), repeats=(2, 2))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure cell by cell, print, and write JSON if asked."""
    args = _arguments(argv)
    torch.set_num_threads(1)
    protocol = QUICK if args.quick else Protocol()
    protocol = replace(protocol, images=args.images or protocol.images, memory=not args.no_memory)
    rows: list[dict[str, Any]] = []
    for name in args.models.split(","):
        for precision in ("fp32", "bf16"):
            found = measure(Model(name, args.size, _changes(name, args.size)), precision, protocol)
            told = [{short: row[key] for key, short in SHOWN.items() if key in row} for row in found]
            print_table(f"{name}, {args.size} px, {precision}, {protocol.images} images a step", told)
            rows += found
    if args.json:
        write_result("privacy", _command(args), rows, args.json)


def arms(model: Model, precision: str, protocol: Protocol) -> list[Arm]:
    """Name what is measured together, the dense reference first."""
    like = Arm(OURS, precision=precision)
    found = [replace(like, method=TIMM)]
    for keep in dict.fromkeys((1.0, *protocol.keeps)):
        found += [replace(like, keep=keep, private=private) for private in (False, True)]
    half = replace(like, keep=0.5, private=True)
    found += [replace(half, pieces=4), replace(half, films=2)]
    if is_vit(model):
        found += [
            replace(like, method=way, keep=keep, private=True) for keep in protocol.keeps for way in OPACUS
        ]
        found.append(replace(half, method="opacus_frozen"))
    return found


def measure(model: Model, precision: str, protocol: Protocol) -> list[dict[str, Any]]:
    """Measure one network at one precision: memory of each arm by itself, then all times, interleaved."""
    every = arms(model, precision, protocol)
    peaks = {}
    if protocol.memory:
        peaks = {arm: peak_of(partial(build_step, arm, model, protocol.images)) for arm in every}
    steps = {arm: build_step(arm, model, protocol.images) for arm in every}
    parts: dict[Arm, list[Part]] = {arm: [(1.0, step)] for arm, step in steps.items()}
    times = interleave(parts, every[:1], cpu_clock, protocol.repeats, protocol.seconds)
    rows = [
        {
            "backbone": model.backbone, "size_px": model.size, "precision": precision,
            "images": protocol.images, "method": arm.method, "private": arm.private, "keep": arm.keep,
            "films": arm.films, "pieces": arm.pieces,
            "cost_ms": 1e3 * float(np.median(times[arm].cost)),
            "wall_ms": 1e3 * float(np.median(times[arm].wall)), "repeats": len(times[arm].cost),
            **_shares(arm, times), **_stages(steps[arm]),
            **({"peak_mib": peaks[arm]} if arm in peaks else {}),
        }
        for arm in every
    ]  # fmt: skip
    gc.collect()
    return rows


def _shares(arm: Arm, times: dict[Arm, Times]) -> dict[str, float]:
    """Ratios of an arm's cost: to the fastest dense step, to its own without privacy, and Opacus' to it."""
    dense = [a for a in times if a.keep == 1 and not a.private]
    fastest = max(dense, key=lambda a: ratio(times[dense[0]], times[a]).median)
    found = _spread("of_dense", times[arm], times[fastest])
    if arm.private and arm.method == OURS:
        own = replace(arm, private=False, films=1, pieces=1)
        found |= _spread("of_own", times[arm], times[own])
        rivals = [a for a in times if a.method in OPACUS and a.keep == arm.keep]
        if rivals:
            best = max(rivals, key=lambda a: ratio(times[rivals[0]], times[a]).median)
            found |= _spread("opacus_ratio", times[best], times[arm])
    return found


def _spread(name: str, mine: Times, other: Times) -> dict[str, float]:
    found = ratio(mine, other)
    return {name: found.median, f"{name}_low": found.low, f"{name}_high": found.high}


def _stages(step: Step) -> dict[str, float]:
    return {f"{stage}_ms": 1e3 * float(np.median(seconds)) for stage, seconds in step.spent.items()}


def _changes(name: str, size: int) -> tuple[tuple[str, Any], ...]:
    """Tiles of a CNN are 32 px, as large as a ViT's cells."""
    return () if is_vit(Model(name, size)) else (("backbone.tiles", size // 32),)


def _command(args: argparse.Namespace) -> str:
    words = ["python -m benchmarks.privacy", *(["--quick"] if args.quick else []), f"--models {args.models}"]
    words += [f"--size {args.size}", *([f"--images {args.images}"] if args.images else [])]
    return " ".join([*words, *(["--no-memory"] if args.no_memory else [])])


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ViT-tiny, four images, two repeats")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--models", help="names of configs/backbone")
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--images", type=int, help="of a step; a multiple of four")
    parser.add_argument("--no-memory", action="store_true", help="times alone")
    args = parser.parse_args(argv)
    args.models = args.models or ("vit_tiny" if args.quick else ",".join(MODELS))
    return args


if __name__ == "__main__":
    main()
