"""What a training step of MIRAM costs beside one of a plain masked autoencoder.

    python -m benchmarks.miram_step [--quick] [--repeats N] [--json FILE]

ViT-tiny at 224 px, 147 of 196 patches hidden, on one thread; ``mae`` reconstructs a patch's pixels with one
decoder, ``miram`` reconstructs at twice its resolution with a second one, of every hidden patch or of a share
(``method.high_share``). Arms step by turns; ``of_mae`` is the median of the ratios of CPU time within a turn.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import print_table, write_result
from sparsecontrast.config import compose
from sparsecontrast.coupling import noise_batch
from sparsecontrast.methods import build_method
from sparsecontrast.trainer import explicit_attention

IMAGES = 8
QUICK = ("backbone.img_size=32", "backbone.patch_size=4", "backbone.depth=1", "method.landmarks=8")
ARMS = {
    "mae": ("method.high_weight=0", "method.upsample=1"),
    **{f"miram, {name}": (f"method.attention={name}",)
       for name in ("nystromformer", "linformer", "performer", "softmax")},
    **{f"miram, softmax, a share of {share:g}": ("method.attention=softmax", f"method.high_share={share}")
       for share in (0.25, 0.125, 0.0625)},
}  # fmt: skip
Arm = tuple[Any, torch.optim.Optimizer]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a toy network, two turns")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = measure(QUICK if args.quick else (), 2 if args.quick else args.repeats)
    print_table(f"A step of {IMAGES} images", rows)
    if args.json:
        told = " --quick" if args.quick else f" --repeats {args.repeats}"
        write_result("miram_step", f"python -m benchmarks.miram_step{told}", rows, args.json)


def measure(words: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """One row an arm and precision."""
    rows = []
    for precision in ("fp32", "bf16"):
        arms = {name: build([*words, *told]) for name, told in ARMS.items()}
        turns = [{name: step(arm, precision) for name, arm in arms.items()} for _ in range(repeats + 1)][1:]
        for name in arms:
            ratios = [turn[name] / turn["mae"] for turn in turns]
            rows.append({
                "precision": precision, "arm": name, "images": IMAGES, "repeats": repeats,
                "cpu_ms": round(1e3 * statistics.median(turn[name] for turn in turns), 1),
                "of_mae": round(statistics.median(ratios), 3),
                "least": round(min(ratios), 3), "most": round(max(ratios), 3),
            })  # fmt: skip
    return rows


def build(words: Sequence[str]) -> Arm:
    """Build a method and its optimizer, as ``LocalTrainer`` has them on a CPU."""
    method = build_method(compose(["method=miram", *words]))
    explicit_attention(method)
    return method, torch.optim.AdamW(method.parameters())


def step(arm: Arm, precision: str) -> float:
    """Train one step; returns its CPU seconds."""
    method, optimizer = arm
    batch = noise_batch(method, IMAGES)
    start = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = method(batch).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return time.process_time() - start


if __name__ == "__main__":
    main()
