"""One run of a site full of names and one that leaks, with all that went over the wire and to the server."""

import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pandas as pd

from benchmarks.fault_cases.transport import copy_of
from simulation.deploy import LET_IN, NAME
from tests.clear_text import ClearText
from tests.federations import MODEL, rows
from tests.leaky_node import CHUNK
from tests.search import canary
from tests.ward import Ward
from tests.wiretap import Tap, messages, objects, pushed

HOSPITAL = canary("name of the hospital").token.lower()  # travels, as it should
RUN = canary("folder of the run").token  # the server's own word, which travels too
CODES = {  # what the server hears of each round; "" for weights
    1: "",  # a table with labels, a broken file, a missing one
    2: "",  # a folder of DICOM with odd names, a torn one
    3: "data_missing",  # the folder is gone
    4: "data_schema",  # an index with a cell that is no label
    5: "internal",  # an index with a box that nobody foresaw
    6: "storage",  # trained, but the state of the run cannot be written
    7: "",  # the newest state and the cache are torn
    8: "limit",  # the site's file allows less than the message asks for
    9: "flower_2",  # and does not name the server's app
    10: "",
}
LEAKY = "leaky"
NOSY = """
[project]
name = "nosy"
version = "1.0.0"
description = "asks what it should not"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "nobody"
fab-include = ["*.py"]
[tool.flwr.app.components]
serverapp = "nosy_server:app"
clientapp = "nosy_server:client"
"""


class Recorded:
    """The federation while it runs, and afterwards what is left of it.

    Args:
        folder: new.
        real: a radiograph in DICOM.
        stack: ends all of it.
    """

    def __init__(self, folder: Path, real: Path, stack: ExitStack):
        self.federation = stack.enter_context(
            ClearText(folder / "coordinator", (HOSPITAL, LEAKY), patients=8)
        )
        self.federation.provision()
        self.ward = Ward(folder / "hospital", HOSPITAL, real)
        self.ward.after = plan(self.ward)
        bind = self.federation.plan.server.bind
        self.tap, self.leak = (stack.enter_context(Tap(bind)) for _ in range(2))
        self.tap.before_pull = self.ward.go_on
        self.run_folder = self.federation.folder / RUN

    def start(self) -> None:
        """Start the SuperLink and both nodes, and return when it knows them."""
        self.federation.start_superlink()
        inside = self.ward("kit folder")
        hospital = copy_of(self.federation, HOSPITAL, inside, SUPERLINK=self.tap.address)
        leaky = copy_of(self.federation, LEAKY, LEAKY, SUPERLINK=self.leak.address)
        for kit in (hospital, leaky):
            with open(kit / "settings.env", "a", encoding="utf-8") as settings:
                settings.write(f"export FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE={CHUNK}\n")
        self.ward.write(hospital)
        (leaky / "bin" / "flower-superexec").write_text(
            '#!/bin/sh\nexec python -P -m tests.leaky_node "$@"\n'
        )
        for name, kit in ((inside, hospital), (LEAKY, leaky)):
            self.federation.launch(name, kit / "supernode.sh")
        for name in (inside, LEAKY):
            self.until(lambda name=name: LET_IN in self.federation.log(name).read_text(errors="replace"))

    def run(self) -> str:
        """Run all rounds; returns Flower's status."""
        words = [*MODEL, f"federation.rounds={len(CODES)}", "federation.min_sites=1"]
        return self.federation.run([*words, f"output_dir='{self.run_folder}'"])

    def ask(self) -> str:
        """Run the server that asks what it should not; returns Flower's status."""
        app = self.federation.folder / "nosy"
        app.mkdir()
        shutil.copy(Path(__file__).with_name("nosy_server.py"), app)
        (app / "pyproject.toml").write_text(NOSY)
        self.federation.tell("flower.sh", "run", str(app), NAME, "--stream")
        return self.federation.status()

    def told(self, name: str) -> dict[int, str]:
        """The code of each round of a site, "" where it was joined."""
        return {r["round"]: r.get("code", "") for r in rows(self.run_folder) if r["site"] == name}

    def of_server(self) -> dict[str, bytes]:
        """All that the server has: its kit with Flower's files, the run, its logs, the database."""
        written = {}
        for folder in (self.federation.kits.server, self.run_folder):
            files = [path for path in folder.rglob("*") if path.is_file()]
            written |= {str(path.relative_to(folder.parent)): path.read_bytes() for path in files}
        log = self.federation.log("superlink").read_bytes()
        return written | {
            "superlink.log": log,
            "the runs' logs": "".join(self.federation.printed).encode(),
            "the database": dump(self.federation.kits.server / "superlink.db"),
        }

    def of_site(self) -> dict[str, bytes]:
        """What stays in the hospital: its folders, its kit, and what its node prints."""
        files = [path for f in (self.ward.folder, self.ward.kit) for path in f.rglob("*") if path.is_file()]
        written = {str(path).encode(errors="surrogateescape"): path.read_bytes() for path in files}
        found = {name.decode(errors="replace"): name + b"\n" + data for name, data in written.items()}
        return found | {"the node's log": self.federation.log(self.ward("kit folder")).read_bytes()}

    def until(self, true: Callable[[], object], seconds: float = 180) -> None:
        """Wait."""
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline
            time.sleep(0.1)


def plan(ward: Ward) -> dict[int, Callable[[], None]]:
    """What happens in the hospital, by the number of answers that have left; the greeting is the first."""
    gone, aside = ward.films.with_name("gone"), ward.state / "aside"

    def block() -> None:
        (run,) = (ward.state / "state").iterdir()
        run.rename(aside)
        run.write_bytes(b"")
        ward.tell(ward.from_films())

    def tear() -> None:
        (run,) = (ward.state / "state").iterdir()
        run.unlink()
        aside.rename(run)
        cached = [path for path in (ward.state / "cache").rglob("*") if path.is_file()]
        for path in (run / "round_0002.safetensors", *cached):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def bring_back() -> None:
        gone.rename(ward.films)
        ward.tell([f"data.index='{ward.index}'", "data.min_images=1"])

    def box() -> None:
        (built,) = ward.state.glob("index-*/index.csv")
        frame = pd.read_csv(built, dtype=str, keep_default_na=False, encoding_errors="surrogateescape")
        told = dict.fromkeys(("label", "x", "y", "w", "h"), ward("box in the index"))
        frame["boxes"] = json.dumps([told])
        file = ward.index.with_name("boxes.csv")
        frame.to_csv(file, index=False, encoding="utf-8", errors="surrogateescape")
        ward.tell([f"data.index='{file}'", "data.min_images=1"])

    return {
        2: lambda: ward.tell(ward.from_films()),
        3: lambda: os.rename(ward.films, gone),
        4: bring_back,
        5: box,
        6: block,
        7: tear,
        8: lambda: ward.tell(ward.from_films(), limits={"max_batch_size": 1}),
        9: lambda: ward.tell(ward.from_films(), app=["0" * 64]),
        10: lambda: ward.tell(ward.from_table()),
    }


def heard(tap: Tap) -> tuple[bytes, bytes]:
    """All that a site sent, and all that it was sent: every head and body, and objects put together."""
    requests = [one for line in tap.lines for one in messages(bytes(line.up))]
    answers = [one for line in tap.lines for one in messages(bytes(line.down))]
    ups, downs = ([part for one in side for part in (one.head, one.body)] for side in (requests, answers))
    return b"\n".join([*ups, *objects(pushed(requests))]), b"\n".join(downs)


def paths(tap: Tap) -> set[str]:
    """What a site called."""
    return {one.path for line in tap.lines for one in messages(bytes(line.up))}


def dump(database: Path) -> bytes:
    """Every cell of a SQLite file, whole: in the file, a long one is cut over pages."""
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    try:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")]
        cells = [c for t in tables for row in connection.execute(f'SELECT * FROM "{t}"') for c in row]
    finally:
        connection.close()
    return b"\n".join(c if isinstance(c, bytes) else str(c).encode() for c in cells)
