"""24 rounds of ten real sites in one run: no process, file, port or folder grows from round to round.

A SuperLink and ten SuperNodes on loopback (TLS, SQLite), four of the nodes without a warm executor. After
every round each process that lives for the whole run is looked at (resident memory, open files), and all of
them (clients that were there a round ago already, zombies, ports), and what lies on the disk, by place. The
first rounds warm up; over the rest the slope, by least squares, may add no more over all rounds than
``GROWTH`` and ``DISK`` say; of what goes up and down between two looks (open connections, a journal), the
slope less two standard errors. ``TMPDIR`` and ``HOME`` of the deployment are folders of its own, so what it
leaves there is seen.
"""

import contextlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.fault_cases.case import Found, expect
from benchmarks.fault_cases.growth import ports, proportional, resident, slope
from simulation.deploy import TINY, Deployment

LONG = ("federation.round_timeout=900", "federation.connect_timeout=900", "federation.update_norm=none")
COLD = 4  # sites that start a process anew for each message, two at a time: a warm one needs more memory
GROWTH = {"memory": 10.0, "files": 4.0, "zombies": 4.0}  # over all rounds: MiB, and numbers, of any process
# KiB over all rounds, by place; what is told for each round stays: a line in a log, a row in a database
DISK = {
    "tmp": 0.0, "home": 0.0, "flower": 64.0, "states": 1024.0, "logs": 4096.0, "superlink.db": 8192.0,
    "kits": 0.0,
}  # fmt: skip
Series = list[float]


@dataclass
class Seen:
    """What was seen, one value a round.

    Attributes:
        rounds: after which it was looked.
        memory: MiB by process, named by site and kind.
        files: open ones, by process.
        ports: on which any process listens.
        zombies: of all.
        stale: client processes that were there a round before.
        disk: KiB by place.
        most: MiB of all processes together between two rounds, shared pages counted once.
    """

    rounds: list[int] = field(default_factory=list)
    memory: dict[str, Series] = field(default_factory=dict)
    files: dict[str, Series] = field(default_factory=dict)
    ports: Series = field(default_factory=list)
    zombies: Series = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    disk: dict[str, Series] = field(default_factory=dict)
    most: float = 0.0


@dataclass(frozen=True)
class Process:
    """One that was found: process id, its parent's, a name by site and kind, and whether it has ended."""

    pid: int
    parent: int
    name: str
    zombie: bool


class Watch:
    """Looks at a deployment after each of a run's rounds, in a thread of its own.

    Args:
        deployment: started.

    Attributes:
        seen: what it saw.
    """

    def __init__(self, deployment: Deployment):
        self.deployment, self.seen = deployment, Seen()
        self._clients: set[int] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        file = self.deployment.folder / "run" / "metrics.jsonl"
        while not self._over.wait(0.3):
            with contextlib.suppress(OSError, ValueError):
                lines = map(json.loads, file.read_text().splitlines())
                done = [row["round"] for row in lines if row["site"] is None]
                if done and (not self.seen.rounds or done[-1] > self.seen.rounds[-1]):
                    self.look(done[-1])

    def look(self, number: int) -> None:
        """Look once, after round ``number``."""
        found, seen = family(self.deployment), self.seen
        seen.rounds.append(number)
        clients = {p.pid for p in found if p.name.endswith(" client")}
        seen.stale += [f"client {pid} after round {number}" for pid in clients & self._clients]
        self._clients = clients
        seen.zombies.append(sum(p.zombie for p in found))
        alive = [p for p in found if not p.zombie]
        for p in alive:
            if not p.name.endswith((" client", " other")):
                with contextlib.suppress(OSError):
                    seen.memory.setdefault(f"{p.name} {p.pid}", []).append(resident(p.pid))
                    seen.files.setdefault(f"{p.name} {p.pid}", []).append(
                        len(os.listdir(f"/proc/{p.pid}/fd"))
                    )
        seen.ports.append(float(len(set().union(*(ports(p.pid) for p in alive)))))
        seen.most = max(seen.most, sum(proportional(p.pid) for p in alive))
        for place, kib in sizes(self.deployment).items():
            seen.disk.setdefault(place, []).append(kib)


def soak(folder: Path, sites: int, rounds: int, warm: int) -> Found:
    """Run rounds, of which the first ``warm`` warm up; then see what grew and what is left."""
    names = tuple(f"hospital-{i:02d}" for i in range(sites))
    with Deployment(folder / "federation", names, patients=8) as deployment:
        deployment.provision()
        for variable in ("TMPDIR", "HOME"):
            place = deployment.folder / variable.lower().removesuffix("dir")
            place.mkdir()
            deployment.environment[variable] = str(place)
        for i, name in enumerate(names[sites - COLD :]):
            _cold(deployment.kits.site(name), deployment.folder / f"turn-{i % 2}")
        deployment.start()
        with Watch(deployment) as watch:
            status = deployment.run([*LONG, f"federation.rounds={rounds}"], base=TINY)
        lines = (deployment.folder / "run" / "metrics.jsonl").read_text().splitlines()
        deployment.stop()
        left = deployment.processes()
    whole = [row for row in map(json.loads, lines) if row["site"] is None]
    (folder / "seen.json").write_text(json.dumps(vars(watch.seen)))
    expect(status == "finished:completed", f"the run is {status}")
    expect([len(row["contributors"]) for row in whole] == [sites] * rounds, "a site was lost")
    expect(not left, f"processes left: {left}")
    return judged(watch.seen, rounds, warm)


def _cold(kit: Path, turn: Path) -> None:
    """Have a site start a process for each message, one at a time of those that share a turn."""
    with open(kit / "settings.env", "a", encoding="utf-8") as settings:
        settings.write("WARM=no\n")
    program = kit / "bin" / "flwr-clientapp"
    held = f"exec 9>'{turn}'\nflock 9\nexec python"  # until that process ends
    program.write_text(program.read_text().replace("exec python", held))


def judged(seen: Seen, rounds: int, warm: int) -> Found:
    """Hold what was seen to the limits; returns the slopes a round.

    Raises:
        BrokenPromiseError: something grows, or is left.
    """
    expect(len(seen.rounds) >= rounds - 2, f"looked after {len(seen.rounds)} of {rounds} rounds")
    expect(not seen.stale, f"still there a round later: {', '.join(seen.stale)}")
    expect(len(set(seen.ports)) == 1, f"ports: {seen.ports}")
    looks = len(seen.rounds)
    # one that was not there at the end of the run, or from its beginning, has died or is one too many
    short = {name: len(s) for name, s in seen.memory.items() if len(s) < looks - 1}
    expect(not short, f"processes not there for the whole run, looks of {looks}: {short}")
    found: dict[str, float] = {}
    for kind, by_process in (("memory", seen.memory), ("files", seen.files)):
        for name, series in by_process.items():
            grown, error = slope(series[warm:])
            sure = grown - (2 * error if kind == "files" else 0.0)
            expect(sure * rounds <= GROWTH[kind], f"{kind} of {name}: {grown:+.3f} a round, {series}")
            role = name.split(" ")[-2]
            found[f"{role}_{kind}"] = max(found.get(f"{role}_{kind}", grown), grown)
    grown, error = slope(seen.zombies[warm:])
    expect((grown - 2 * error) * rounds <= GROWTH["zombies"], f"zombies: {seen.zombies}")
    for place, series in seen.disk.items():
        grown, error = slope(series[warm:])
        found[f"{place}_kib"] = grown
        expect(
            place not in DISK or (grown - 2 * error) * rounds <= DISK[place] + 1e-6,
            f"{place} grows by {grown:.1f} KiB a round: {[round(s) for s in series]}",
        )
    return {"found": told(seen, found), "a_round": {k: round(v, 4) for k, v in found.items()},
            "most_mib": round(seen.most), "processes": len(seen.memory)}  # fmt: skip


def told(seen: Seen, found: Mapping[str, float]) -> str:
    """Say in one line what was found."""
    memory = [
        f"{key.removesuffix('_memory')} {value:+.3f}" for key, value in found.items() if "_memory" in key
    ]
    disk = [
        f"{key.removesuffix('_kib')} {value:+.1f}" for key, value in found.items() if key.endswith("_kib")
    ]
    return (
        f"MiB a round at most: {', '.join(memory)}; KiB a round: {', '.join(disk)}; {len(seen.memory)} "
        f"processes throughout, {seen.ports[-1]:.0f} ports, none left; "
        f"{seen.most / 1024:.1f} GiB between rounds"
    )


def family(deployment: Deployment) -> list[Process]:
    """Every process of a deployment, zombies too, named by the site or SuperLink it is of, and by kind."""
    started = {process.pid: name for name, process in deployment.started.items()}
    stats: dict[int, tuple[str, int, int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            stats[int(folder.name)] = (state, int(parent), int(session))
    found = []
    for pid, (state, parent, session) in sorted(stats.items()):
        owner = pid
        while (
            owner in stats and owner not in started
        ):  # a process may leave its session, an orphan its parent
            owner = stats[owner][1]
        owner = owner if owner in started else session
        if owner in started:
            found.append(Process(pid, parent, f"{started[owner]} {_kind(pid, parent, owner)}", state == "Z"))
    return found


def _kind(pid: int, parent: int, owner: int) -> str:
    """What a process is: by its command, and by its name, which a forked client has of its own."""
    if pid == owner:
        return "program"
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/comm").read_text() + Path(f"/proc/{pid}/cmdline").read_text()
        if "flwr-clientapp" in words or "client.sentinel" in words:
            return "client"
        if "serverapp" in words:
            return "serverapp"
        if "superexec" in words or "client.executor" in words:
            return "executor" if parent == owner else "template"
    return "other"


def sizes(deployment: Deployment) -> dict[str, float]:
    """KiB on the disk by place; of what a deployment writes, the run's own folder apart."""
    places = {
        "tmp": deployment.folder / "tmp", "home": deployment.folder / "home",
        "states": deployment.folder / "states", "run": deployment.folder / "run",
    }  # fmt: skip
    found = {name: size(place) for name, place in places.items()}
    kits = deployment.kits.root
    found["flower"] = sum(size(folder) for folder in kits.rglob("flower") if folder.is_dir())
    found["superlink.db"] = sum(size(file) for file in kits.rglob("superlink.db*"))
    found["kits"] = size(kits) - found["flower"] - found["superlink.db"]
    found["logs"] = sum(size(file) for file in deployment.folder.glob("*.log"))
    return found


def size(place: Path) -> float:
    """KiB of a file, or of all below a folder; each counts a quarter more, so that empty ones are seen."""
    files = [place] if place.is_file() else place.rglob("*")
    total = 0.0
    for file in files:
        with contextlib.suppress(OSError):
            told = file.lstat()
            total += 0.25 + (0.0 if file.is_dir() else told.st_size / 1024)
    return total
