"""Sites that vanish, are slow, come and go, or die: the run goes on with the rest and names who is missing.

Ten sites on a local grid. What the wire loses is lost for the server too: it waits out its whole time limit,
as it would for a hospital whose line is cut. Each round is held to the mean of the answers that count.
"""

import contextlib
import functools
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from flwr.app import Message

from benchmarks.fault_cases.answers import copy, expect_mean
from benchmarks.fault_cases.case import Case, Found, expect
from benchmarks.fault_cases.wire import Delivery, Trouble, Wire, nodes, quiet, serve, whole_rounds, words
from sparsecontrast import checkpoint
from sparsecontrast.errors import QuorumError

SITES, QUORUM = 10, 5
PATIENCE = 3.0  # a round's time limit, in undisturbed rounds
NAMES = tuple(f"hospital_{i:02d}" for i in range(SITES))
Rounds = Mapping[int, Sequence[str]]


class Sites(Wire):
    """The wire of ten sites; ``timeout`` seconds are a round's limit, measured on this machine, now."""

    def __init__(self) -> None:
        super().__init__(nodes(SITES), 1)
        self.timeout = 600.0

    def measure(self, folder: Path) -> None:
        """Run two undisturbed rounds and set the limit by the slower one."""
        rows = serve(self, words(folder, SITES, "federation.rounds=2"))
        self.timeout = round(5 + PATIENCE * max(row["seconds"] for row in whole_rounds(rows)), 1)


@dataclass
class Patchy(Trouble):
    """A wire with holes.

    Attributes:
        losing: round -> sites that never hear of it.
        slow: round -> sites whose answer comes when they are asked again.
        doubled: round -> sites whose answer comes three times.
        at: called before a site's message leaves.
    """

    losing: Rounds = field(default_factory=dict)
    slow: Rounds = field(default_factory=dict)
    doubled: Rounds = field(default_factory=dict)
    at: Callable[[str, int], None] = lambda site, number: None

    def lost(self, site: str, round_number: int) -> bool:
        """As ``losing`` says."""
        self.at(site, round_number)
        return site in self.losing.get(round_number, ())

    def deliver(self, site: str, round_number: int, reply: Message) -> list[Delivery]:
        """Deliver now, late, or more than once."""
        at_once = site not in self.slow.get(round_number, ())
        times = 3 if site in self.doubled.get(round_number, ()) else 1
        return [(at_once, copy(reply)) for _ in range(times)]


def last(count: int) -> tuple[str, ...]:
    """The last so many sites."""
    return NAMES[SITES - count :]


@contextlib.contextmanager
def cases(folder: Path, quick: bool) -> Iterator[list[Case]]:
    """Give the cases; their workers end with the block."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def wire() -> Sites:
            stack.enter_context(quiet(folder / "server.log"))
            one = Sites()
            stack.callback(one.close)
            one.measure(folder / "undisturbed")
            return one

        def of(fault: str, work: Callable[[Sites, Path], Found]) -> Case:
            return Case("sites", fault, lambda where: work(wire(), where))

        everything = {
            "three answers come three times": partial(
                goes_on, trouble=Patchy(doubled={1: last(3), 2: last(3)}), rounds=2
            ),
            "the process of a site is killed": dies,
        }
        if not quick:
            everything |= _slow_ones()
        yield [of(fault, work) for fault, work in everything.items()]


def _slow_ones() -> dict[str, Callable[[Sites, Path], Found]]:
    """Cases that wait out a round's time limit."""
    found: dict[str, Callable[[Sites, Path], Found]] = {}
    for k in (1, 3, 5):
        holes = {1: last(k), 2: last(k)}
        found[f"{k} of 10 dropped"] = partial(goes_on, trouble=Patchy(losing=holes), rounds=2)
    for k in (6, 10):
        found[f"{k} of 10 dropped, quorum 5"] = partial(stops, missing=k)
    for k in (1, 3, 5):
        slow = Patchy(slow={1: last(k)})
        found[f"{k} of 10 slow: answers come in a later round"] = partial(late, trouble=slow, count=k)
    for k in (2, 4):
        holes = {1: last(k), 3: last(k)}
        found[f"{k} of 10 flapping: there every second round"] = partial(
            goes_on, trouble=Patchy(losing=holes), rounds=4
        )
    turns = {1: NAMES[:3], 2: NAMES[3:6], 3: NAMES[6:9]}
    found["three others missing in each round"] = partial(goes_on, trouble=Patchy(losing=turns), rounds=3)
    return found


def goes_on(wire: Sites, folder: Path, trouble: Patchy, rounds: int) -> Found:
    """Run to the end; every round names exactly who was missing, and is the mean of the others."""
    more = (f"federation.rounds={rounds}", f"federation.min_sites={QUORUM}")
    told = words(folder, SITES, *more, f"federation.round_timeout={wire.timeout}")
    summaries = whole_rounds(serve(wire, told, trouble))
    expect([row["round"] for row in summaries] == [*range(1, rounds + 1)], "rounds are missing or double")
    for row in summaries:
        number = row["round"]
        missing = {*trouble.losing.get(number, ()), *trouble.slow.get(number, ())}
        there = [name for name in NAMES if name not in missing]
        expect(row["silent"] == sorted(missing), f"round {number}: silent {row['silent']}")
        expect(row["contributors"] == there, f"round {number}: made of {row['contributors']}")
        expect_mean(folder / "run", number, [wire.arrived[name, number].content for name in there])
    counts = [len(row["contributors"]) for row in summaries]
    return {"found": f"sites in each round: {', '.join(map(str, counts))}"}


def late(wire: Sites, folder: Path, trouble: Patchy, count: int) -> Found:
    """As ``goes_on``; the late answers arrived, were recognised, and their senders took part again."""
    found = goes_on(wire, folder, trouble, 3)
    expect(wire.unasked == count, f"{wire.unasked} late answers arrived, should be {count}")
    return {"found": f"{found['found']}; {count} late ones not counted"}


def stops(wire: Sites, folder: Path, missing: int) -> Found:
    """Fall below the quorum: the run ends with an error that names all who are missing, and keeps nothing."""
    more = ("federation.rounds=2", f"federation.min_sites={QUORUM}")
    told = words(folder, SITES, *more, f"federation.round_timeout={wire.timeout}")
    try:
        serve(wire, told, Patchy(losing={2: last(missing)}))
    except QuorumError as error:
        expect(f"silent: {list(last(missing))}" in str(error), error)
        expect(checkpoint.latest(folder / "run") == 1, "round 2 was kept")
        rows = serve(wire, [f"resume={folder / 'run'}"])
        expect(whole_rounds(rows)[-1]["contributors"] == list(NAMES), "not all came back")
        return {"found": "stopped and named them; resume= went on with ten"}
    expect(False, "went on below its quorum")
    return {}


def dies(wire: Sites, folder: Path) -> Found:
    """Kill the worker process at its work, with SIGKILL: one site's answer is lost, and the next is not."""
    victim: list[str] = []

    def kill(site: str, number: int) -> None:
        if number == 1 and site == NAMES[1] and not victim:  # the first site is at work now
            victim.append(NAMES[0])
            os.kill(wire.pids[0], signal.SIGKILL)

    told = words(folder, SITES, "federation.rounds=2", f"federation.min_sites={QUORUM}")
    first, second = whole_rounds(serve(wire, told, Patchy(at=kill)))
    expect(first["refused"] == {NAMES[0]: "flower_1"}, f"refused: {first['refused']}")
    expect(first["contributors"] == list(NAMES[1:]), f"made of {first['contributors']}")
    expect(second["contributors"] == list(NAMES), f"round 2 made of {second['contributors']}")
    return {"found": "named, and back in the next round"}
