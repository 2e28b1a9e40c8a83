"""Whether something grows: its slope over many looks, and what is looked at."""

import os
from pathlib import Path

import numpy as np


def slope(values: list[float]) -> tuple[float, float]:
    """Least squares: slope a step, and its standard error."""
    y, x = np.array(values), np.arange(len(values), dtype=float)
    x -= x.mean()
    found = float((x * y).sum() / (x * x).sum())
    rest = y - y.mean() - found * x
    return found, float(np.sqrt((rest**2).sum() / (len(y) - 2) / (x * x).sum()))


def resident(pid: int) -> float:
    """Resident memory, MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def proportional(pid: int) -> float:
    """Memory of a process, MiB, each page shared by n processes counted as 1 / n; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def ports(pid: int) -> set[str]:
    """Addresses on which a process listens, as the kernel writes them."""
    try:
        mine = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
        lines = [
            line.split()
            for name in ("tcp", "tcp6")
            for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
        ]
    except OSError:
        return set()
    return {line[1] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in mine}
