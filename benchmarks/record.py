"""How every benchmark tells its figures: a table on the terminal, and JSON to commit."""

import datetime
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "timm", "flwr", "opacus", "dp-accounting",
    "numpy", "pandas", "scikit-learn", "pillow", "pydicom",
)  # fmt: skip
Row = Mapping[str, Any]


def write_result(name: str, command: str, rows: Sequence[Row], path: Path | str) -> None:
    """Write figures with all that is needed to judge and to repeat them.

    Args:
        name: of the benchmark.
        command: as typed, without paths of one machine.
        rows: flat mappings of plain values; every figure names its unit in its key.
        path: of the JSON file; written whole or not at all, folders are made.

    Raises:
        ValueError: nothing was measured, or a value is not finite or not plain.
    """
    if not rows:
        raise ValueError(f"benchmark {name}: no row was measured, nothing is written")
    result = {
        "name": name,
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rows": [dict(row) for row in rows],
    }
    text = json.dumps(result, indent=1, allow_nan=False, default=_refuse) + "\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text)
    part.replace(path)


def kept_rows(path: Path, command: str) -> list[dict[str, Any]]:
    """Read what a killed run of the same command had measured, as ``write_result`` kept it.

    Args:
        path: of the JSON file; where there is none, nothing was kept.
        command: of this run.

    Raises:
        ValueError: the rows are those of another command, say of a ``--quick`` one.
    """
    if not path.exists():
        return []
    kept = json.loads(path.read_text())
    if kept["command"] != command:
        raise ValueError(
            f"{path}: kept by {kept['command']!r}, not {command!r}; remove it, or name another file"
        )
    return list(kept["rows"])


def print_table(title: str, rows: Sequence[Row]) -> None:
    """Print rows as a table: floats with three significant digits, columns in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # a machine lent for its GPU has torch and little else
        lines = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
        print(title, *("\t".join(line) for line in lines), sep="\n")
        return
    table = Table(title=title)
    for column in columns:
        numbers = all(isinstance(row.get(column, 0), int | float) for row in rows)
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a file has no edge to fold at
    console.print(table)


def machine() -> dict[str, Any]:
    """Describe this machine: processor, cores this process may use, memory, system, GPU if one is usable.

    ``load_5_min`` is the mean number of runnable processes: far above the benchmark's own, others
    were at work, and wall times mean less than ratios and CPU seconds.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = {"cpu": _cpu(), "cores": cores, "memory_gib": round(memory, 1), "os": platform.platform()}
    found["load_5_min"] = round(os.getloadavg()[1], 1)
    gpu = _gpu()
    return {**found, "gpu": gpu} if gpu else found


def versions() -> dict[str, str]:
    """Name Python and every installed package that a figure may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    """Model name and what tells virtual processors of one name apart: family, model, matrix units."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if unit in flags]
    name = facts.get("model name", platform.machine())
    return (
        f"{name} (family {facts.get('cpu family', '?')}, model {facts.get('model', '?')}; {' '.join(units)})"
    )


def _gpu() -> str | None:
    """Ask torch only where the benchmark already loaded it."""
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


def _refuse(value: Any) -> Any:
    raise ValueError(f"a row holds {type(value).__name__} {value!r}: convert it to a plain value first")
