"""Is the machine fit: Python, packages, disk, memory, GPU."""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from sparsecontrast.doctor.finding import Finding
from sparsecontrast.site_file import Limits

PYTHON = (3, 11)
GIB = 2**30
DISK = (2 * GIB, 10 * GIB)  # below: FAIL, warn. Local states, the pixel cache, Flower's copies of messages
MEMORY = (1.5 * GIB, 4 * GIB)  # a ViT-tiny's client takes 0.7, what it is forked from 0.5, a SuperNode 0.2
SHARE = 0.75  # of the machine's memory that an answer may well have: the rest is for what else runs here
PROGRAMS = ("flower-supernode", "flower-superexec", "flwr-clientapp")
MEMINFO = Path("/proc/meminfo")


def python() -> Iterator[Finding]:
    """Look at the interpreter."""
    told = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < PYTHON:
        yield Finding("FAIL", "python", told, "install Python 3.11 or newer, and the project into it anew")
    else:
        yield Finding("ok", "python", told)


def packages() -> Iterator[Finding]:
    """Hold what is installed to what the project asks for."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in metadata.requires("sparsecontrast") or []]
    except metadata.PackageNotFoundError:
        yield Finding(
            "FAIL", "packages", "sparsecontrast is not installed", "pip install -c constraints.txt ."
        )
        return
    wrong = []
    for need in wanted:
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{need.name} is missing")
            continue
        if not need.specifier.contains(found, prereleases=True):
            wrong.append(f"{need.name} is {found}, not {need.specifier}")
    here = Path(sys.executable).parent
    wrong += [f"{name} is missing" for name in PROGRAMS if not (shutil.which(name) or (here / name).exists())]
    if wrong:
        yield Finding(
            "FAIL", "packages", "; ".join(wrong), "pip install -c constraints.txt . (in its folder)"
        )
    else:
        yield Finding("ok", "packages", f"{len(wanted)} requirements met")


def disk(state_dir: Path) -> Iterator[Finding]:
    """Look for room, and for leave to write, where the site keeps its state."""
    there = next(p for p in (state_dir, *state_dir.parents) if p.exists())
    free = shutil.disk_usage(there).free
    told = f"{free / GIB:.1f} GiB free for state_dir"
    remedy = "free some space, or move state_dir (never copy its ledger: move it)"
    if not os.access(there, os.W_OK | os.X_OK):
        yield Finding("FAIL", "disk", "state_dir cannot be written", "give it to the user who runs the node")
    elif free < DISK[0]:
        yield Finding("FAIL", "disk", told, remedy)
    elif free < DISK[1]:
        yield Finding("warn", "disk", told, remedy)
    else:
        yield Finding("ok", "disk", told)


def memory() -> Iterator[Finding]:
    """Look for free memory."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", MEMINFO.read_text()) if MEMINFO.exists() else None
    if found is None:
        yield Finding("warn", "memory", "unknown on this system", "a node needs about 4 GiB")
        return
    free = int(found[1]) * 1024
    told, remedy = f"{free / GIB:.1f} GiB available", "end other programs, or lower train.batch_size"
    level = "FAIL" if free < MEMORY[0] else "warn" if free < MEMORY[1] else "ok"
    yield Finding(level, "memory", told, "" if level == "ok" else remedy)


def limits(told: Limits) -> Iterator[Finding]:
    """Look for the site's own limits of an answer; without one of memory the machine's is the only one."""
    time = f"an answer takes at most {told.seconds / 3600:.3g} h"
    if told.memory_gib is not None:
        yield Finding("ok", "limits", f"{time} and {told.memory_gib:g} GiB")
        return
    found = re.search(r"MemTotal:\s+(\d+) kB", MEMINFO.read_text()) if MEMINFO.exists() else None
    share = f"{SHARE * int(found[1]) * 1024 / GIB:.1f}, " if found else ""
    remedy = f"limits.memory_gib in site.yaml, such as {share}{SHARE:.0%} of this machine's"
    yield Finding("warn", "limits", f"{time}, and all memory there is", remedy)


def gpu() -> Iterator[Finding]:
    """Ask torch for a GPU; without one training runs on the CPU."""
    import torch

    if torch.cuda.is_available():
        yield Finding("ok", "gpu", torch.cuda.get_device_name())
    elif Path("/dev/nvidia0").exists():
        remedy = "install a driver that fits this torch, or go on with the CPU"
        yield Finding("warn", "gpu", "there is one, but torch cannot use it", remedy)
    else:
        yield Finding("ok", "gpu", "none, trains on the CPU")
