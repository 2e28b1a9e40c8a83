"""Files that rot on disk: a bit flips, the end is missing, nothing is left, or it is gone.

Of a run: the round before is taken and the same bytes come out. Of a cache: made anew. Of a ledger or a log
of what left: refused, unless what was hit says nothing.
"""

import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fault_cases.case import Case, Found, expect
from sparsecontrast import checkpoint
from sparsecontrast.accounting import Charge, epsilon
from sparsecontrast.cohorts import cohort_of
from sparsecontrast.egress import FILE, HEAD, EgressLog
from sparsecontrast.errors import EgressError, LedgerError
from sparsecontrast.ledger import Ledger
from sparsecontrast.policy import Policy

SPOTS = 40  # places at which a ledger or a log is hit, one after the other
CHARGE, DELTA = Charge(4.0, 1.0, 1), 1e-3


def flip(path: Path, share: float = 0.5) -> None:
    """Flip one bit at a share of the file."""
    data = bytearray(path.read_bytes())
    data[min(int(share * len(data)), len(data) - 1)] ^= 0x10
    path.write_bytes(data)


def cut(path: Path, share: float = 0.6) -> None:
    """Keep the first part."""
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


def empty(path: Path) -> None:
    """Leave nothing in it."""
    path.write_bytes(b"")


def more(path: Path) -> None:
    """Add some bytes."""
    path.write_bytes(path.read_bytes() + b"\x00" * 9)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a bit flipped": flip, "cut short": cut, "empty": empty, "bytes at its end": more, "gone": Path.unlink,
}  # fmt: skip


def of_runs() -> dict[str, Callable[[Any, Path], Found]]:
    """Cases that continue a damaged run; each is given the bench and a folder."""
    found: dict[str, Callable[[Any, Path], Found]] = {}
    for suffix, name in (
        (".safetensors", "weights"), (".strategy.safetensors", "moments"), (".json", "JSON"),
    ):  # fmt: skip
        for what, harm in DAMAGE.items():
            found[f"{name} of the last round: {what}"] = partial(round_before, suffix=suffix, harm=harm)
    found["all rounds cut short"] = nothing_whole
    found["config.yaml cut short"] = partial(no_config, harm=partial(cut, share=0.3))
    found["config.yaml gone"] = partial(no_config, harm=Path.unlink)
    found["metrics.jsonl torn"] = torn_metrics
    found["a site's local state: a bit flipped"] = partial(older_state, harm=flip)
    found["a site's local state cut short"] = partial(older_state, harm=cut)
    return found


def alone() -> list[Case]:
    """Cases without a run."""
    return [
        Case("storage", "the cache is damaged, in each way, in each file", cache),
        Case("storage", f"a bit of the ledger flips, at {SPOTS} places", partial(ledger, harm=flip)),
        Case("storage", f"the ledger is cut, at {SPOTS} places", partial(ledger, harm=cut)),
        Case(
            "storage", f"a bit of the log of what left flips, at {SPOTS} places", partial(egress, harm=flip)
        ),
        Case("storage", f"the log of what left is cut, at {SPOTS} places", partial(egress, harm=cut)),
        Case("storage", "the head of the log of what left is damaged, in each way", egress_head),
        Case("storage", "the head is gone, and the log cut or gone too; a private site", egress_both),
    ]


def round_before(bench: Any, folder: Path, suffix: str, harm: Callable[[Path], None]) -> Found:
    """Damage the last round: it does not count, and the run ends with the same bytes."""
    from benchmarks.fault_cases.storage import resumed

    run = bench.copy(folder)
    # a whole round may have JSON with more behind it only where that is white: nine NUL are none
    harm(checkpoint.round_file(run, 2, suffix))
    expect(checkpoint.latest(run) == 1, f"round {checkpoint.latest(run)} counts as whole")
    resumed(bench, run)
    return {"found": "round 1 was taken; the same bytes"}


def nothing_whole(bench: Any, folder: Path) -> Found:
    """Damage every round."""
    from benchmarks.fault_cases.storage import refused

    run = bench.copy(folder)
    for number in range(3):
        cut(checkpoint.round_file(run, number))
    return {"found": f"refused: {refused(bench, run)}"}


def no_config(bench: Any, folder: Path, harm: Callable[[Path], None]) -> Found:
    """Damage what the run was told."""
    from benchmarks.fault_cases.storage import refused

    run = bench.copy(folder)
    harm(run / "config.yaml")
    return {"found": f"refused: {refused(bench, run)}"}


def torn_metrics(bench: Any, folder: Path) -> Found:
    """Tear the metrics: the rounds' JSON holds them too."""
    from benchmarks.fault_cases.storage import resumed
    from benchmarks.fault_cases.wire import rows

    run = bench.copy(folder)
    cut(run / "metrics.jsonl")
    resumed(bench, run)
    numbers = [row["round"] for row in rows(run) if row["site"] is None]
    expect(numbers == [1, 2, 3], f"rounds in metrics.jsonl: {numbers}")
    return {"found": "made whole; the same bytes"}


def older_state(bench: Any, folder: Path, harm: Callable[[Path], None]) -> Found:
    """Damage a site's newest optimizer state: the one before it is taken, and told."""
    from benchmarks.fault_cases.storage import SITE
    from benchmarks.fault_cases.wire import rows, serve

    run = bench.copy(folder)
    (state,) = (run / "sites" / SITE / "state").glob("*/round_0002.safetensors")
    harm(state)
    serve(bench.wire, [f"resume={run}"])
    (last,) = (row for row in rows(run) if (row["round"], row["site"]) == (3, SITE))
    expect(last["state_round"] == 1, f"state of round {last['state_round']} was taken")
    return {"found": "the state before it was taken, and the row says so"}


def cache(folder: Path) -> Found:
    """Damage a cache: the same pixels come back."""
    from sparsecontrast.data.decode import Task
    from sparsecontrast.data.store import open_pixels

    tasks, count = [Task(f"phantom:0:0:{i}:0") for i in range(3)], 0
    wanted = np.array(open_pixels(tasks, 32, folder).images)
    for name in ("header.json", "pixels.u8"):
        for what, harm in DAMAGE.items():
            (store,) = folder.glob("pixels-*")
            harm(store / name)
            found = open_pixels(tasks, 32, folder).images
            expect(np.array_equal(found, wanted), f"{name} {what}: other pixels")
            count += 1
    return {"found": f"{count} of {count}: made anew, the same pixels"}


def ledger(folder: Path, harm: Callable[..., None]) -> Found:
    """Hit the ledger: it is refused, or says what it said. The write-ahead log is empty: nothing mends it."""
    cohort = cohort_of((f"patient {i}" for i in range(50)), b"k" * 32)
    policy = Policy(epsilon([CHARGE] * 20, DELTA) + 1e-6, DELTA, 1.0, 4)
    whole = Ledger(folder / "site")
    for number in range(1, 9):
        whole.reserve("run", number, cohort, policy, CHARGE)
    told, draw, kept = whole.read().entries, random.Random(0), folder / "kept"
    shutil.copy(whole.path, kept)
    refused = 0
    for _ in range(SPOTS):
        shutil.copyfile(kept, whole.path)  # the same file number: no copy of the ledger
        harm(whole.path, draw.random())
        try:
            whole.verify()
            expect(whole.read().entries == told, "says something else and was believed")
        except LedgerError:
            refused += 1
    shutil.copyfile(kept, whole.path)
    whole.verify()
    return {"found": f"{refused} refused, {SPOTS - refused} hit what says nothing"}


def egress(folder: Path, harm: Callable[..., None]) -> Found:
    """Hit the log: the next answer is refused. A cut within the last line alone is what a crash leaves."""
    log, draw = EgressLog(folder / "site"), random.Random(0)
    for number in range(1, 9):
        log.append("train", {"round": number, "sha256": f"{number:064x}"})
    whole, refused, torn = log.path.read_bytes(), 0, 0
    for _ in range(SPOTS):
        log.path.write_bytes(whole)
        harm(log.path, draw.random())
        try:
            log.append("train", {"round": 9})
            expect(False, "went on over a damaged log")
        except EgressError:
            refused += 1
    log.path.write_bytes(whole)
    log.verify()
    with open(log.path, "ab") as file:
        file.write(b'{"body": "{\\"round')
    log.append("train", {"round": 9})
    torn = sum(row.kind == "torn" for row in log.rows())
    expect(torn == 1, "a torn line was not told")
    return {"found": f"{refused} of {SPOTS} refused; a line torn by a crash was set aside and told"}


def egress_head(folder: Path) -> Found:
    """Damage the head, or take the log away from it: nothing leaves."""
    count = 0
    for name in (HEAD, FILE):
        for what, harm in DAMAGE.items():
            log = EgressLog(folder / f"{name} {what}")
            for number in (1, 2):
                log.append("train", {"round": number})
            harm(log.folder / name)
            try:
                log.append("train", {"round": 3})
                expect((name, what) == (FILE, "bytes at its end"), f"{name} {what}: went on")
            except EgressError:
                count += 1
    return {"found": f"{count} refused; bytes behind the last line set aside"}


def egress_both(folder: Path) -> Found:
    """Take the head away and cut the log, or take both: the ledger of a private site has seen more rows."""
    cohort = cohort_of((f"patient {i}" for i in range(50)), b"k" * 32)
    policy = Policy(epsilon([CHARGE], DELTA) + 1e-6, DELTA, 1.0, 4)
    for kept in range(3):
        log = EgressLog(folder / f"{kept} kept")
        Ledger(log.folder).reserve("run", 1, cohort, policy, CHARGE)
        for number in range(1, 4):
            log.append("train", {"round": number})
        log.head.unlink()
        lines = log.path.read_bytes().splitlines(keepends=True)
        if kept:
            log.path.write_bytes(b"".join(lines[:kept]))
        else:
            log.path.unlink()
        try:
            log.append("train", {"round": 4})
        except EgressError:
            continue
        expect(False, f"{kept} rows and no head: went on")
    return {"found": "refused, with 0, 1 and 2 of 3 rows left"}
