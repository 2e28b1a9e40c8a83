"""Does a faster step make a faster epoch? The trainer's whole local epoch, sparse against dense.

    python -m benchmarks.epoch [--quick] [--json FILE] [--size 224]

An epoch is what a site does in a round: batches drawn, read from the cache and made into two views,
then forward, contrast, backward and AdamW, all by ``LocalTrainer``. The same epoch is run again with
its views made beforehand: what is left is its steps. Dense is ``method=dense_contrast``. A repeat runs
every epoch once in random order, dense before and after; ratios are of CPU seconds of one thread (wall
seconds on a GPU), medians over repeats. ``epoch_share`` is the speed-up of the epoch over the speed-up
of its steps: 1 where reading and augmenting cost nothing.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import print_table, write_result
from benchmarks.stopwatch import Part, Ratio, Times, cpu_clock, cuda_clock, interleave, ratio
from sparsecontrast.config import compose
from sparsecontrast.data.cache import load_dataset
from sparsecontrast.methods import build_method
from sparsecontrast.methods.method import Batch
from sparsecontrast.settings import Config, PhantomConfig
from sparsecontrast.trainer import LocalTrainer

DENSE = ("dense_contrast", 1.0)
KEEPS = (0.5, 0.35, 0.25)
BATCH = 16


class Prepared(LocalTrainer):
    """A trainer whose batches were made beforehand, in its first epoch."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.made: dict[int, Batch] = {}

    def _batch(self, images, patients, rows, partners, generator, step) -> Batch:  # type: ignore[no-untyped-def]
        if step not in self.made:
            self.made[step] = super()._batch(images, patients, rows, partners, generator, step)
        return self.made[step]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one block, two batches, two repeats")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--size", type=int, default=224, help="pixels")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [row for precision in ("fp32", "bf16") for row in measure(args.size, precision, args.quick)]
    print_table("A local epoch against dense", rows)
    if args.json:
        command = f"python -m benchmarks.epoch --size {args.size}{' --quick' if args.quick else ''}"
        write_result("epoch", command, rows, args.json)


def measure(size: int, precision: str, quick: bool) -> list[dict[str, Any]]:
    """Time epochs at one precision: one row a kept share."""
    images = 2 * BATCH if quick else 6 * BATCH
    keeps = KEEPS[:1] if quick else KEEPS
    with tempfile.TemporaryDirectory() as folder:
        parts: dict[tuple[str, float, bool], list[Part]] = {}
        for name, keep in (DENSE, *(("sparse_contrast", keep) for keep in keeps)):
            config = _config(name, keep, size, precision, images, quick)
            data = load_dataset(config, Path(folder) / "cache", Path(folder) / "state", False)
            for whole in (True, False):
                parts[name, keep, whole] = [(1.0, _epoch(config, data.images, whole))]
        dense = [(*DENSE, True), (*DENSE, False)]
        clock = cuda_clock if torch.cuda.is_available() else cpu_clock
        times = interleave(parts, dense, clock, (2, 2) if quick else (5, 9), 120.0)
    return [_row(size, precision, keep, times) for keep in keeps]


def _row(
    size: int, precision: str, keep: float, times: dict[tuple[str, float, bool], Times]
) -> dict[str, Any]:
    epoch, steps = (
        ratio(times[*DENSE, whole], times["sparse_contrast", keep, whole]) for whole in (True, False)
    )
    return {
        "size_px": size, "precision": precision, "keep": keep, "batch": BATCH,
        **_spread("epoch_speedup", epoch), **_spread("steps_speedup", steps),
        "epoch_share": epoch.median / steps.median,
        "dense_epoch_s": float(np.median(times[*DENSE, True].cost)),
        "repeats": len(times[*DENSE, True].cost),
    }  # fmt: skip


def _spread(name: str, found: Ratio) -> dict[str, float]:
    return {name: found.median, f"{name}_low": found.low, f"{name}_high": found.high}


def _epoch(config: Config, images: np.ndarray, whole: bool) -> Any:
    """An epoch in the middle of a run, where the share has come down to what the method keeps."""
    trainer = (LocalTrainer if whole else Prepared)(build_method(config), config, "phantom")
    patients = np.arange(len(images))
    return lambda: trainer.run(images, patients, round_number=10, rounds=20)


def _config(name: str, keep: float, size: int, precision: str, images: int, quick: bool) -> Config:
    told = [f"method={name}", f"method.keep={keep}", "method.dense_start=0", "method.dense_end=0",
            "backbone=vit_tiny", f"backbone.img_size={size}", f"train.batch_size={BATCH}",
            f"train.precision={precision}", "data=phantom"]  # fmt: skip
    config = compose([*told, "backbone.depth=1"] if quick else told)
    few = PhantomConfig(sites=1, patients_per_site=images, images_per_patient=1)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, phantom=few))


if __name__ == "__main__":
    main()
