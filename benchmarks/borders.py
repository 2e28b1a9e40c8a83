"""How wrong are tiles for their borders, and what does a halo cost? Kept tiles against the dense network.

    python -m benchmarks.borders [--quick] [--json FILE]

A CNN computes a kept tile in a window of its own, whose edges pad with zeros what the dense network
sees; in ResNets, GroupNorm sees one window instead of the image. ``error`` is the relative L2 error
of a tile's features, ``of_spread`` the same over how far the tiles of an image lie from their mean,
which is what tells them apart: means over tiles, phantoms and seeds, ``worst_seed`` of the seeds.
``work`` are the multiply-adds at a quarter of the tiles, overview included, over dense: above 1
nothing is saved. Weights are of a random start with every residual branch open, for timm starts them
closed, which would hide what they do. Nothing is timed.
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.record import print_table, write_result
from sparsecontrast.data.phantom import render
from sparsecontrast.data.transforms import evaluation_view
from sparsecontrast.models import tiles
from sparsecontrast.models.sparse_cnn import SparseCNN, build_sparse_cnn
from sparsecontrast.settings import BackboneConfig

NETWORKS = ("convnext_atto", "convnext_tiny", "resnet18", "resnet50_gn")
LAYOUTS = ((224, 7), (256, 4))
HALOS = (0, 32, 64)
FILMS = 2  # of each seed
SHARE = 0.25
CLOSED, OPEN = 1e-5, 0.5  # scales of a residual branch: timm starts at 0 or at 1e-6


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every network at every size and halo, print and record the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the two small networks at 128 px, two seeds")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    networks, layouts, seeds = NETWORKS, LAYOUTS, range(5)
    if args.quick:
        networks, layouts, seeds = NETWORKS[::2], ((128, 4),), range(2)
    rows = [
        measure(BackboneConfig(name, size, False, tiles=count, halo=halo), seeds)
        for size, count in layouts
        for name in networks
        for halo in HALOS
        if size // count + 2 * halo <= size
    ]
    print_table("Tiles against the dense network", rows)
    if args.json:
        command = f"python -m benchmarks.borders{' --quick' if args.quick else ''}"
        write_result("borders", command, rows, args.json)


def measure(config: BackboneConfig, seeds: Sequence[int]) -> dict[str, Any]:
    """Give the row of one network, layout and halo; each seed has its weights and its phantoms."""
    found = [errors(open_network(config, seed), phantoms(config.img_size, seed)) for seed in seeds]
    error, of_spread = np.array(found).T
    model = open_network(config, 0)
    return {
        "network": config.name, "size": config.img_size, "tiles": config.tiles, "halo": config.halo,
        "window": model.window, "seeds": len(seeds), "films": FILMS,
        "error": round(float(error.mean()), 4), "worst_seed": round(float(error.max()), 4),
        "of_spread": round(float(of_spread.mean()), 4), "work": round(work(model), 3),
    }  # fmt: skip


def open_network(config: BackboneConfig, seed: int) -> SparseCNN:
    """Build a backbone with the weights of a seed, the same at every halo, its residual branches open."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_sparse_cnn(config).eval()
    with torch.no_grad():
        for name, scale in model.named_parameters():
            if name.endswith((".gamma", ".weight")) and scale.abs().max() < CLOSED:
                scale.fill_(OPEN)
    return model


def phantoms(size: int, seed: int) -> Tensor:
    """Normalised radiographs [FILMS, 1, size, size], each from another hospital."""
    shown = np.stack([render(seed, i, i, 0, size).image for i in range(FILMS)])
    return evaluation_view(torch.from_numpy((shown * 255).round().astype(np.uint8)), size)


@torch.no_grad()
def errors(model: SparseCNN, images: Tensor) -> tuple[float, float]:
    """Relative error of all tiles' features, and their error over the spread of the dense ones."""
    every = torch.arange(model.num_cells).expand(len(images), -1)
    found, wanted = model.fine_cells(images, every), model.fine_cells(images)
    spread = (wanted - wanted.mean(1, keepdim=True)).flatten(1).norm(dim=1)
    of_spread = (found - wanted).flatten(1).norm(dim=1) / spread
    return float(tiles.relative_error(found, wanted).mean()), float(of_spread.mean())


def work(model: SparseCNN) -> float:
    """Multiply-adds of an image at ``SHARE`` of its tiles over those of the dense pass, only counted."""
    model = copy.deepcopy(model).to("meta")
    image = torch.empty(1, 1, model.img_size, model.img_size, device="meta")
    kept = torch.arange(model.kept_cells(SHARE), device="meta")[None]
    counts = []
    for choice in (kept, None):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(image, choice)
        counts.append(counter.get_total_flops())
    return counts[0] / counts[1]


if __name__ == "__main__":
    main()
