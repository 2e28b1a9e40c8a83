"""A disk that is full at each write of server and site, and files that rot: what is whole counts, or nothing.

Three sites, FedYogi, three rounds. The reference is the same run undisturbed; where the server's disk was
full, or a file of its was damaged, ``resume=`` must end with its very bytes.
"""

import contextlib
import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.fault_cases import damage
from benchmarks.fault_cases.case import Case, Found, expect
from benchmarks.fault_cases.disk import Disk
from benchmarks.fault_cases.full_site import PLAN
from benchmarks.fault_cases.wire import Trouble, Wire, nodes, quiet, serve, whole_rounds, words
from sparsecontrast import checkpoint
from sparsecontrast.egress import EgressLog
from sparsecontrast.errors import SparseContrastError, StorageError

SITES, ROUNDS = 3, 3
SITE = "hospital_01"
SUFFIXES = (".safetensors", ".strategy.safetensors", ".json")
YOGI = ("federation.strategy=fedyogi", "federation.options={eta: 0.01}", f"federation.rounds={ROUNDS}")


class PowerCut(BaseException):
    """Ends a run where it stands."""


class Until(Trouble):
    """Ends the run before the messages of a round leave."""

    def __init__(self, number: int):
        self.number = number

    def lost(self, site: str, round_number: int) -> bool:
        """Lose nothing, but end."""
        if round_number == self.number:
            raise PowerCut
        return False


class Bench:
    """A grid, the undisturbed run, one cut after its second round, and what both write.

    Args:
        folder: for all of them.
    """

    def __init__(self, folder: Path):
        self.folder, self.plan = folder, folder / "plan.json"
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[PLAN] = str(self.plan)
        self.wire = Wire(nodes(SITES), 1, "benchmarks.fault_cases.full_site:app")
        with Disk(folder / "whole" / "run").used() as disk:
            serve(self.wire, self.words(folder / "whole"))
        self.writes = list(disk.writes)
        with contextlib.suppress(PowerCut):
            serve(self.wire, self.words(folder / "cut"), Until(ROUNDS))

    def words(self, folder: Path) -> list[str]:
        """Overrides of the run in a folder."""
        return words(folder, SITES, *YOGI, f"data.cache_dir={self.folder / 'cache'}")

    def at_site(self, number: int, folder: Path, full_from: int) -> None:
        """Fill the site's disk in a round, from a write on."""
        told = {"site": SITE, "round": number, "folder": str(folder), "full_from": full_from}
        self.plan.write_text(json.dumps(told))

    def copy(self, folder: Path) -> Path:
        """Copy the run that was cut."""
        return Path(shutil.copytree(self.folder / "cut" / "run", folder / "run"))

    def same(self, run: Path) -> bool:
        """Whether a run's last round is the undisturbed one's, byte for byte."""
        return all(
            checkpoint.round_file(run, ROUNDS, suffix).read_bytes()
            == checkpoint.round_file(self.folder / "whole" / "run", ROUNDS, suffix).read_bytes()
            for suffix in SUFFIXES[:2]
        )


@contextlib.contextmanager
def cases(folder: Path, quick: bool) -> Iterator[list[Case]]:
    """Give the cases; the grid ends with the block."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def bench() -> Bench:
            stack.enter_context(quiet(folder / "server.log"))
            one = Bench(folder / str(time.time_ns()))
            stack.callback(one.wire.close)
            return one

        def of(fault: str, work: Callable[[Bench, Path], Found]) -> Case:
            return Case("storage", fault, lambda where: work(bench(), where))

        yield [
            of("the server's disk is full, at each of its writes", functools.partial(server_full, few=quick)),
            of("a site's disk is full, at each of its writes", functools.partial(site_full, few=quick)),
            *damage.alone(),
            *([] if quick else (of(fault, work) for fault, work in damage.of_runs().items())),
        ]


def server_full(bench: Bench, folder: Path, few: bool) -> Found:
    """Fill the disk at every write in turn: a clear error; with room again, resume= gives the same bytes."""
    numbers = range(1, len(bench.writes) + 1)
    for number in list(numbers)[:: 12 if few else 1]:
        where = folder / str(number)
        run, did = where / "run", bench.writes[number - 1]
        try:
            with Disk(run, number).used():
                serve(bench.wire, bench.words(where))
            expect(False, f"write {number} ({did}) failed and nobody said so")
        except StorageError as error:
            expect("No space left" in str(error), f"write {number} ({did}): {error}")
        done = checkpoint.latest(run)
        begun = (run / "config.yaml").exists()
        serve(bench.wire, [f"resume={run}"] if begun else bench.words(where))
        expect(bench.same(run), f"write {number} ({did}): other weights after round {done}")
        shutil.rmtree(where)
    return {"found": f"{len(list(numbers)[:: 12 if few else 1])} of {len(numbers)} writes: StorageError, "
            "then the same bytes"}  # fmt: skip


def site_full(bench: Bench, folder: Path, few: bool) -> Found:
    """Fill one site's disk at every write of a round in turn: nothing leaves that is not logged."""
    bench.at_site(2, folder / "0", 0)
    serve(bench.wire, bench.words(folder / "0"))
    writes = json.loads(bench.plan.with_suffix(".writes").read_text())
    numbers = list(range(1, len(writes) + 1))[:: 4 if few else 1]
    codes: dict[str, int] = {}
    for number in numbers:
        where = folder / str(number)
        bench.at_site(2, where, number)
        rows = whole_rounds(serve(bench.wire, bench.words(where)))
        did, refused = writes[number - 1], rows[1]["refused"]
        left = sum(r.kind == "train" for r in EgressLog(where / "run" / "sites" / SITE).rows())
        counted = sum(SITE in row["contributors"] for row in rows)
        expect(left >= counted, f"write {number} ({did}): {counted} answers counted, {left} logged")
        expect(refused in ({}, {SITE: "storage"}), f"write {number} ({did}): refused {refused}")
        expect(SITE in rows[2]["contributors"], f"write {number} ({did}): the site does not come back")
        for code in refused.values():
            codes[code] = codes.get(code, 0) + 1
        shutil.rmtree(where)
    bench.plan.unlink()
    told = ", ".join(f"{count} x {code}" for code, count in sorted(codes.items()))
    return {"found": f"{len(numbers)} of {len(writes)} writes: {told}; back in the next round"}


def resumed(bench: Bench, run: Path) -> None:
    """Continue a damaged run to the bytes of the undisturbed one.

    Raises:
        BrokenPromiseError: it ends otherwise.
    """
    serve(bench.wire, [f"resume={run}"])
    expect(bench.same(run), "other weights than those of the undisturbed run")


def refused(bench: Bench, run: Path) -> str:
    """Try to continue; returns the code of the error.

    Raises:
        BrokenPromiseError: it went on.
    """
    try:
        serve(bench.wire, [f"resume={run}"])
    except SparseContrastError as error:
        return error.code
    expect(False, "went on")
    return ""
