"""Federated sparse against dense pretraining on real radiographs of ten sites, three seeds.

    python -m benchmarks.multisite --root ../shared/data/cxr_multisite [--quick] [--json FILE]

Each seed trains ``experiment=multisite_cxr`` twice, sparse and dense, then scores both beside raw
16x16 pixels, a random initialisation, every site alone and centralised training with the same
budget. Disease labels are judged within one source. Runs are kept under ``--out`` and continued
when the command is given again; two run at a time, one thread each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.record import print_table, write_result

ARMS = {"sparse": (), "dense": ("method=dense_contrast",)}
NAMES = {"federated": "federated sparse", "dense": "federated dense"}
QUICK = ("federation.rounds=2", "evaluation.bootstrap=50")


def main(argv: list[str] | None = None) -> None:
    """Run every seed and arm, then print and record the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", default="../shared/data/cxr_multisite", help="folder with index.csv")
    parser.add_argument("--out", default="outputs/multisite", help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="one seed, two rounds")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(argv)
    seeds = args.seeds[:1] if args.quick else args.seeds
    common = (
        "experiment=multisite_cxr",
        f"data.root={Path(args.root).resolve()}",
        f"data.cache_dir={Path(args.out).resolve()}/cache",
        "federation.workers=1",
        *(QUICK if args.quick else ()),
    )
    found = run_all(Path(args.out).resolve(), seeds, common)
    rows = summarise(found)
    print_table("Multi-site chest X-rays: probe AUROC, mean over seeds", rows)
    print_table("Seconds", [seconds for one in found for seconds in one["seconds"]])
    command = f"python -m benchmarks.multisite --root {args.root}{' --quick' if args.quick else ''}"
    if args.json:
        write_result("multisite", command, rows, args.json)


def run_all(out: Path, seeds: list[int], common: tuple[str, ...]) -> list[dict[str, Any]]:
    """Train and score all seeds, two processes at a time; returns one evaluation a seed."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        # the first run builds the cache that all others read
        first = train(out, seeds[0], "sparse", common)
        runs = {(seeds[0], "sparse"): _done(first)}
        for seed in seeds:
            for arm in ARMS:
                if (seed, arm) not in runs:
                    runs[seed, arm] = pool.submit(train, out, seed, arm, common)
        scores = [pool.submit(score, out, seed, [runs[seed, arm] for arm in ARMS]) for seed in seeds]
        return [s.result() for s in scores]


def train(out: Path, seed: int, arm: str, common: tuple[str, ...]) -> dict[str, Any]:
    """Train one arm, continuing a run that was cut short; returns its wall time by round records."""
    folder = out / f"seed{seed}" / arm
    target = ("resume=" if (folder / "rounds").exists() else "output_dir=") + str(folder)
    started = time.perf_counter()
    call("simulation", *common, *ARMS[arm], f"seed={seed}", target, "--no-evaluation")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    local = sum(r.get("seconds", 0.0) for r in records if r["site"] is not None)
    return {
        "seed": seed, "arm": arm, "local training seconds": round(local, 1),
        "wall seconds of this call": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def score(out: Path, seed: int, runs: list[Future]) -> dict[str, Any]:
    """Score both arms of a seed beside the baselines, paired."""
    seconds = [run.result() for run in runs]
    folder = out / f"seed{seed}"
    call("sparsecontrast.cli", "evaluate", str(folder / "sparse"), "--against", str(folder / "dense"))
    call("sparsecontrast.cli", "report", str(folder / "sparse"))
    return {"seconds": seconds, **json.loads((folder / "sparse" / "evaluation.json").read_text())}


def summarise(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a cell: the mean over seeds, each seed's value, the mean of the patient-level intervals."""
    cells: dict[tuple, list[dict[str, Any]]] = {}
    for one in found:
        for row in [*one["rows"], *one["differences"]]:
            if row["value"] is not None and row["label"] in ("macro", "bacterial", "pneumonia"):
                key = (row["task"], row["metric"], row["fraction"], _name(row["features"]))
                cells.setdefault(key, []).append(row)
    return [
        {
            "task": task, "metric": metric, "labels": fraction, "features": name,
            "auroc": round(statistics.mean(r["value"] for r in rows), 4),
            "low": _mean(rows, "low"), "high": _mean(rows, "high"),
            "seeds": [round(r["value"], 4) for r in rows],
        }
        for (task, metric, fraction, name), rows in cells.items()
    ]  # fmt: skip


def call(module: str, *words: str) -> None:
    """Run a module of this project in a process of its own, one thread; its errors end the benchmark."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", module, *words], check=True, env=environment)


def _mean(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [r[key] for r in rows if r[key] is not None]
    return round(statistics.mean(values), 4) if values else None


def _name(features: str) -> str:
    return " - ".join(NAMES.get(part, part) for part in features.split(" - "))


def _done(value: dict[str, Any]) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


if __name__ == "__main__":
    main()
