"""Is the data path cheap? On one core: loading + augmentation against a ViT-tiny training step.

    python -m benchmarks.data [--quick] [--json FILE]

A pair is one batch loaded from the cache and made into two views, then one step of timm's dense
ViT-tiny on both views (forward, contrastive loss, backward, AdamW), back to back, so that both see
the same machine; the ratio is the median over pairs. The bf16 step is faster on processors with
matrix units, so its ratio is the harder one. Then: phantoms rendered, and files decoded, a second.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.record import print_table, write_result
from sparsecontrast.config import compose
from sparsecontrast.data.cache import Dataset, load_dataset
from sparsecontrast.data.decode import Task, decode
from sparsecontrast.data.phantom import render
from sparsecontrast.data.transforms import two_views
from sparsecontrast.settings import PhantomConfig

BATCH = 32
LIMIT = 0.15  # of a step, for loading + augmentation


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer pairs; a minute instead of three")
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pairs = 5 if arguments.quick else 15
    rows = [row for size in (128, 224) for row in measure_steps(size, pairs)]
    print_table(f"Loading + two views against a ViT-tiny step, batch {BATCH}, one core", rows)
    rates = [phantom_rate(64 if arguments.quick else 256), *decode_rates(32 if arguments.quick else 128)]
    print_table("Images a second on one core", rates)
    worst = max(row["ratio"] for row in rows if row["precision"] == "fp32")
    print(f"worst fp32 ratio {worst:.4f}, limit {LIMIT}: {'met' if worst < LIMIT else 'MISSED'}")
    if arguments.json:
        command = "python -m benchmarks.data" + (" --quick" if arguments.quick else "")
        write_result("data", command, [*rows, *rates], arguments.json)


def measure_steps(size: int, pairs: int) -> list[dict[str, Any]]:
    """Time pairs of (load + views, step) at one image size, in fp32 and in bf16, interleaved."""
    with tempfile.TemporaryDirectory() as folder:
        data = phantoms(size, Path(folder))
        generator = torch.Generator().manual_seed(0)
        step = training_step(size)
        found: dict[str, list[tuple[float, float, float]]] = {"fp32": [], "bf16": []}
        for number in range(pairs + 1):
            for precision, times in found.items():
                load_wall, load_cpu, views = timed(lambda: load(data, generator, size))
                step_wall, step_cpu, _ = timed(lambda v=views, p=precision: step(v[0], v[1], p))
                if number > 0:  # the first of each warms up
                    times.append((load_wall, step_wall, load_cpu / step_cpu))
    return [summary(size, precision, times) for precision, times in found.items()]


def summary(size: int, precision: str, times: list[tuple[float, float, float]]) -> dict[str, Any]:
    """Fold pairs (load s, step s, ratio of CPU seconds) into one row: medians, and quartiles of the ratio."""
    table = np.array(times)
    ratios = table[:, 0] / table[:, 1]
    quarter, median, three_quarters = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    return {
        "size_px": size,
        "precision": precision,
        "load_ms": float(np.median(table[:, 0]) * 1e3),
        "step_ms": float(np.median(table[:, 1]) * 1e3),
        "ratio": median,
        "ratio_q1": quarter,
        "ratio_q3": three_quarters,
        "ratio_cpu": float(np.median(table[:, 2])),
        "batch": BATCH,
        "pairs": len(times),
    }


def phantoms(size: int, folder: Path) -> Dataset:
    """Fill a cache with some hundred phantoms, by the way a site does."""
    config = compose(["data=phantom"])
    few = PhantomConfig(sites=1, patients_per_site=192, images_per_patient=1)
    data = dataclasses.replace(config.data, image_size=size, phantom=few)
    return load_dataset(dataclasses.replace(config, data=data), folder / "cache", folder / "state", False)


def load(data: Dataset, generator: torch.Generator, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what the trainer does for one batch, from the memory map to two normalised views."""
    rows = torch.randperm(len(data), generator=generator)[:BATCH].sort().values.numpy()
    views = two_views(torch.from_numpy(np.asarray(data.images[rows])), generator, size)
    return views.first, views.second


def training_step(size: int) -> Callable[[torch.Tensor, torch.Tensor, str], None]:
    """Build the dense reference: timm's ViT-tiny on both views, in-batch contrast, AdamW."""
    torch.manual_seed(0)  # of the weights; no figure depends on them
    model = timm.create_model("vit_tiny_patch16_224", img_size=size, in_chans=1, num_classes=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(first: torch.Tensor, second: torch.Tensor, precision: str) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            z = F.normalize(model(torch.cat([first, second])).float(), dim=1)
        a, b = z.chunk(2)
        loss = F.cross_entropy(a @ b.T / 0.15, torch.arange(len(a)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def phantom_rate(count: int) -> dict[str, Any]:
    """Render phantoms of ten hospitals at 224 px."""
    render(0, 0, 0, 0, 224)
    wall, cpu, _ = timed(lambda: [render(0, i % 10, i, 0, 224) for i in range(1, count + 1)])
    return {"what": "phantom rendered at 224 px", "images_s_core": count / wall, "images_cpu_s": count / cpu}


def decode_rates(count: int) -> list[dict[str, Any]]:
    """Decode 512 px JPEG files and 16-bit 1024 px PNG files into 224 px squares."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, size, scale, kind in (("jpg", 512, 255, np.uint8), ("png", 1024, 65535, np.uint16)):
            image = (render(0, 0, 0, 0, size).image * scale).astype(kind)
            file = Path(folder) / f"phantom.{name}"
            Image.fromarray(image).save(file)
            task = Task(str(file))
            decode(task, 224)
            wall, cpu, done = timed(lambda t=task: [decode(t, 224) for _ in range(count)])
            assert all(d.pixels is not None for d in done), done[0].reason
            what = f"{kind.__name__} {name} of {size} px decoded into 224 px"
            rows.append({"what": what, "images_s_core": count / wall, "images_cpu_s": count / cpu})
    return rows


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Return (wall seconds, CPU seconds, result)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - wall, time.process_time() - cpu, result


if __name__ == "__main__":
    main()
