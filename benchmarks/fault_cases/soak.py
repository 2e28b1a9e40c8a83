"""24 rounds of ten sites in one go: memory stays flat, and nothing is left open or running.

Twice: on a local grid, and with real processes (``soak_processes``). On the grid the server and its workers
are looked at after every round: resident memory, open files, processes, sockets. The first rounds warm up
(imports, caches, compiled kernels); over the rest the slope of memory, by least squares, may add no more than
``GROWTH`` over all 24 rounds.
"""

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path

from benchmarks.fault_cases import soak_processes
from benchmarks.fault_cases.case import Case, Found, expect
from benchmarks.fault_cases.growth import resident, slope
from benchmarks.fault_cases.wire import Trouble, Wire, nodes, quiet, serve, whole_rounds, words

SITES, ROUNDS, WARM = 10, 24, 8
GROWTH = 10.0  # MiB over all rounds, in any process


class Watch(Trouble):
    """Looks at this process and the workers before each round's first message."""

    recorded = False  # 19 MB a round

    def __init__(self, wire: Wire):
        self.wire, self.seen = wire, 0
        self.memory: dict[int, list[float]] = {}
        self.files: dict[int, list[int]] = {}
        self.children: list[int] = []
        self.sockets: list[int] = []

    def lost(self, site: str, round_number: int) -> bool:
        """Lose nothing; look, once a round."""
        if round_number > self.seen:
            self.seen = round_number
            for pid in (os.getpid(), *self.wire.pids):
                self.memory.setdefault(pid, []).append(resident(pid))
                self.files.setdefault(pid, []).append(len(os.listdir(f"/proc/{pid}/fd")))
            self.children.append(len(children()))
            self.sockets.append(sum(listening(pid) for pid in (os.getpid(), *self.wire.pids)))
        return False


@contextlib.contextmanager
def cases(folder: Path, quick: bool) -> Iterator[list[Case]]:
    """Give both cases."""
    yield [
        Case("soak", f"{ROUNDS} rounds of {SITES} sites", soak),
        Case(
            "soak",
            f"{ROUNDS} rounds of {SITES} sites, real processes",
            partial(soak_processes.soak, sites=SITES, rounds=ROUNDS, warm=WARM),
        ),
    ]


def soak(folder: Path) -> Found:
    """Run them, then see what is left when the grid is closed."""
    with quiet(folder / "server.log"):
        resource_tracker.ensure_running()  # Python's own, one for the life of this process
        before = children()
        with Wire(nodes(SITES), 1) as wire:
            assert isinstance(wire, Wire)
            watch = Watch(wire)
            more = (f"federation.rounds={ROUNDS}", "federation.round_timeout=900")
            summaries = whole_rounds(serve(wire, words(folder, SITES, *more), watch))
    expect([len(row["contributors"]) for row in summaries] == [SITES] * ROUNDS, "a site was lost")
    expect(len(watch.memory) == 2, f"{len(watch.memory) - 1} workers in turn: one was lost")
    slopes = [slope(seen[WARM:]) for seen in watch.memory.values()]
    grown = [one * ROUNDS for one, _ in slopes]
    text = ", ".join(
        f"{name} {seen[-1]:.0f} MiB, {one:+.3f} +- {error:.3f} a round"
        for name, seen, (one, error) in zip(("server", "worker"), watch.memory.values(), slopes, strict=True)
    )
    expect(max(grown) <= GROWTH, text)
    for pid, counts in watch.files.items():
        expect(len(set(counts[WARM:])) == 1, f"open files of {pid}: {counts}")
    expect(len(set(watch.children)) == 1, f"processes: {watch.children}")
    expect(set(watch.sockets) == {0}, f"ports: {watch.sockets}")
    expect(children() == before, f"processes left: {children() - before}")
    server, worker = (round(one, 4) for one, _ in slopes)
    found = f"{text}; files, processes and ports as they were"
    return {"found": found, "server_mib_a_round": server, "worker_mib_a_round": worker}


def children() -> set[int]:
    """Processes that this one started and that are there."""
    return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def listening(pid: int) -> int:
    """Count sockets on which a process listens."""
    mine = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()}
    lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    return sum(line.split()[3] == "0A" and f"socket:[{line.split()[9]}]" in mine for line in lines)
