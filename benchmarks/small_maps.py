"""Convolutions of a kept tile's small maps: matrix products against torch's own, layer by layer.

    python -m benchmarks.small_maps [--quick] [--json FILE]

The layers of ResNet-18 and ConvNeXt-atto as windows of 32 px give them, on as many windows as a training step
has: half and a quarter of the 49 tiles of 8 and of 16 images. ``step`` is forward and backward, ``infer`` is
forward alone; each figure says how many times FASTER the product is, medians of ratios interleaved.
``pixels`` is the side of the map.
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.record import print_table, write_result
from benchmarks.stopwatch import Part, cpu_clock, interleave, ratio
from sparsecontrast.models.small_maps import set_small_maps

LAYERS = (  # network, kernel, channels in and out, groups, stride, side of the map
    ("convnext_atto", 7, 40, 40, 40, 1, 8),
    ("convnext_atto", 7, 80, 80, 80, 1, 4),
    ("convnext_atto", 7, 160, 160, 160, 1, 2),
    ("convnext_atto", 7, 320, 320, 320, 1, 1),
    ("convnext_atto", 1, 160, 640, 1, 1, 2),
    ("resnet18", 3, 256, 256, 1, 1, 2),
    ("resnet18", 3, 256, 512, 1, 2, 2),
    ("resnet18", 3, 512, 512, 1, 1, 1),
)
WINDOWS = {"convnext_atto": 2 * 16 * 12, "resnet18": 2 * 8 * 24}
SECONDS = 3.0


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every layer in both precisions, print and record the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one layer of each network, two repeats")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    layers = LAYERS[3::4] if args.quick else LAYERS
    rows = [
        measure(layer, dtype, (2, 2) if args.quick else (5, 15))
        for layer in layers
        for dtype in (torch.float32, torch.bfloat16)
    ]
    print_table("Small maps: products against convolutions", rows)
    if args.json:
        command = f"python -m benchmarks.small_maps{' --quick' if args.quick else ''}"
        write_result("small_maps", command, rows, args.json)


def measure(layer: tuple[Any, ...], dtype: torch.dtype, repeats: tuple[int, int]) -> dict[str, Any]:
    """Time one layer, forward and backward, then forward alone."""
    network, kernel, into, out, groups, stride, side = layer
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(into, out, kernel, stride, kernel // 2, groups=groups)).to(dtype)
    small = copy.deepcopy(plain)
    set_small_maps(small)
    x = torch.randn(WINDOWS[network], into, side, side).to(dtype).requires_grad_()
    row: dict[str, Any] = {
        "network": network, "kernel": kernel, "channels_in": into, "channels_out": out, "groups": groups,
        "stride": stride, "pixels": side, "windows": len(x), "precision": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    for phase in ("step", "infer"):
        works = {name: [_part(net, x, phase)] for name, net in (("plain", plain), ("small", small))}
        times = interleave(works, ["plain"], cpu_clock, repeats, SECONDS)
        found = ratio(times["plain"], times["small"])
        row |= {f"{phase}_ratio": found.median, f"{phase}_low": found.low, f"{phase}_high": found.high}
    return row


def _part(network: nn.Module, x: torch.Tensor, phase: str) -> Part:
    with torch.no_grad():
        gradient = torch.randn_like(network(x))

    def step() -> None:
        x.grad = None
        network.zero_grad(set_to_none=True)
        network(x).backward(gradient)

    @torch.no_grad()
    def infer() -> None:
        network(x)

    return 1.0, step if phase == "step" else infer


if __name__ == "__main__":
    main()
