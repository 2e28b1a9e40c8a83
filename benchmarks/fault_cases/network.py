"""The line to a hospital is cut, silently, and mended: at each stage of a round, in time for it and too late.

A SuperLink with TLS and SQLite on one machine, two SuperNodes on others, each of them a network namespace;
one site trains privately, with noise that can be repeated, so that bits can be compared. No process is ended
and none is started while a line is cut. A site's process is held at a named place until it is, and then goes
on into the void. A node that is to wait at such a place itself is started anew, in peace, before the run.
"""

import contextlib
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.fault_cases.case import BrokenPromiseError, Case, Found, expect
from benchmarks.fault_cases.crash import CLIENT, RUN, SITES, VICTIM, Struck
from benchmarks.fault_cases.namespaces import ADDRESS, Machines
from simulation.deploy import LET_IN, MARK, NAME, START_SECONDS, Deployment
from simulation.processes import wait_until
from sparsecontrast import checkpoint, overrides, payload
from sparsecontrast.durable import write_bytes
from sparsecontrast.egress import EgressLog
from sparsecontrast.errors import FederationError

ROUNDS = 4
IN_TIME, SHORT = 180.0, 35.0  # a round's deadline, seconds; a short one is two undisturbed rounds at least
CUT_SECONDS = 20.0  # in time; well below the minute after which Flower takes a silent node for dead
SLACK = 15.0  # seconds beside a deadline in which the round is put together
BACK = "Connection successful"  # says a node whose request got through after some that did not
OFFLINE = "flower_5"  # Flower's answer in place of a node that missed two heartbeats
OTHER = next(name for name in SITES if name != VICTIM)
NODE, FLEET = "client.node", "flwr.supernode.fleet_http_client"
# process, function, before or behind it, from which other function on
PLACES = {
    "in local training": (CLIENT, "sparsecontrast.privacy:PatientSGD.step", "enter", ""),
    "with its answer logged": (CLIENT, "sparsecontrast.egress:_write", "leave", "client.guard:_training"),
    "amid the weights": (NODE, f"{FLEET}:FleetHttpClient.PullObject", "enter", ""),
    "amid its answer": (NODE, f"{FLEET}:FleetHttpClient.PushObject", "enter", ""),
    "at work": (CLIENT, "client.rounds:KeptRounds.restore", "enter", ""),
}
TRAINING, ANSWER, AT_WORK = "in local training", "amid its answer", "at work"


class Remote(Deployment):
    """A deployment whose sites are on machines of their own.

    Args:
        folder: see ``Deployment``.
        machines: there as long as this is.
    """

    host = ADDRESS

    def __init__(self, folder: Path, machines: Machines):
        super().__init__(folder, SITES, patients=12)
        self.machines = machines

    def command(self, name: str, script: Path) -> list[str]:
        """Run it on the machine that it is for."""
        return [*self.machines.within(name if name in self.sites else None), *super().command(name, script)]

    def provision(self) -> None:
        """As ever; here the SuperLink faces the sites itself, which nothing else can reach."""
        super().provision()
        file = self.kits.server / "settings.env"
        bind, address = (f"BIND={one}\n" for one in (self.plan.server.bind, self.plan.server.address))
        assert bind in file.read_text()
        file.write_text(file.read_text().replace(bind, address))

    def start_superlink(self) -> None:
        """Start the SuperLink, and return when it answers on its own machine."""
        self.launch("superlink", self.kits.server / "superlink.sh")
        server, ca = self.plan.server, str(self.kits.server / "ca.crt")
        self._healthy("superlink", "--https", server.address, "--ca", ca, "--grpc", server.health)

    def await_node(self, name: str) -> None:
        """Return when a node answers on its own machine, and the server let it in."""
        site = self.plan.site(name)
        self._healthy(name, "--http", site.bind, "--grpc", site.health)
        wait_until(lambda: LET_IN in self.log(name).read_text(errors="replace"), START_SECONDS)

    def _healthy(self, name: str, *asked: str) -> None:
        check = [sys.executable, "-m", "sparsecontrast.provision.health", *asked]
        machine = self.machines.within(name if name in self.sites else None)
        done = subprocess.run(
            [*machine, *check, "--wait", str(START_SECONDS)],
            env=self.environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise FederationError(f"{name}: {done.stderr.strip()}: {self.end(name)}")


class Lines(Struck):
    """A federation over lines that can be cut, and its undisturbed run.

    Args:
        folder: new.
        stack: stops everything when it is closed.
        rounds: of every run.
    """

    def __init__(self, folder: Path, stack: contextlib.ExitStack, rounds: int = ROUNDS):
        self.rounds, self.plan = rounds, folder / "plan.json"
        self.run_words = tuple(overrides.merge(list(RUN), ["federation.strategy=fedavg",
            "federation.options={}", f"federation.rounds={rounds}", "federation.min_sites=1"]))  # fmt: skip
        self.machines = stack.enter_context(Machines(SITES))
        self.deployment = stack.enter_context(Remote(folder / "federation", self.machines))
        self.begin_private(self.deployment)
        self.deployment.start()
        self.whole = self.start("whole", IN_TIME)
        self.ended("finished:completed")
        expect(checkpoint.latest(self.whole) == rounds, "the undisturbed run did not come to its end")
        self.check(self.whole)
        rounds_took = (self.summary(self.whole, number)["seconds"] for number in range(1, rounds + 1))
        self.short = max(SHORT, round(2 * max(rounds_took)) + SLACK)

    def judge(self, work: Callable[["Lines"], Found]) -> Found:
        """Do a case's work; whatever comes of it, the next one finds every line whole and no run at work."""
        try:
            return work(self)
        finally:
            for name in SITES:
                self.machines.mend(name)
            with contextlib.suppress(BrokenPromiseError):
                self.await_end()

    def start(self, name: str, deadline: float, *words: str) -> Path:
        """Submit a run with this deadline, seconds, for each round; returns its folder."""
        run = self.deployment.folder / f"{name.replace(' ', '-')}-{time.monotonic_ns():x}"
        told = [overrides.assign("output_dir", run), f"federation.round_timeout={deadline}", *words]
        self.submit(told)
        return run

    def ended(self, status: str) -> None:
        """Await a run's end, which must be this one; all nodes must have lived to see it."""
        self.await_end()
        found = self.deployment.status()
        expect(found == status, f"the run is {found}: {self.deployment.end('superlink')}")
        dead = [name for name, process in self.deployment.started.items() if process.poll() is not None]
        expect(not dead, f"ended: {dead}")

    def told(self, place: str, *sites: str) -> dict[str, Any]:
        """The plan for a process of one of these sites, or of any, to wait at a place."""
        process, function, when, after = PLACES[place]
        module, _, function = function.partition(":")
        words = [process, f"{MARK}={self.deployment.mark}", *(f"/{site}/" for site in sites)]
        return {"process": words, "module": module, "function": function, "when": when, "call": 0,
                "after": after, "victim": "nobody"}  # fmt: skip

    def arm(self, place: str) -> None:
        """Where a node itself is to wait, start it anew: it looks for the plan once, and so for its place."""
        if PLACES[place][0] != NODE:
            return
        self.plan.write_text(json.dumps(self.told(place, VICTIM)))
        self.deployment.end_one(VICTIM)
        self.deployment.let_in(VICTIM)
        self.plan.unlink()

    @contextlib.contextmanager
    def held(self, place: str, *sites: str) -> Iterator[None]:
        """Within, the first process to come to this place stands there; then it goes on."""
        done = Path(f"{self.plan}.done")
        write_bytes(self.plan, json.dumps(self.told(place, *sites)).encode())
        try:
            self.until(done.exists, f"never came to: {place}")
            yield
        finally:
            self.plan.unlink(missing_ok=True)
            done.unlink(missing_ok=True)

    def begin_round(self, place: str, deadline: float, *words: str) -> Path:
        """Start a run and return when its first round is whole: the second is struck, or one behind it."""
        self.arm(place)
        run = self.start(place, deadline, *words)
        self.until(lambda: checkpoint.latest(run), "no first round")
        return run

    def in_time(self, place: str, seconds: float = CUT_SECONDS) -> Found:
        """Cut when the site is at this place, mend before the deadline: all is as if nothing had been."""
        run = self.begin_round(place, IN_TIME)
        with self.held(place, VICTIM):
            number = (checkpoint.latest(run) or 0) + 1
            self.machines.cut(VICTIM)
        time.sleep(seconds)
        self.machines.mend(VICTIM)
        self.ended("finished:completed")
        expect(self.check(run) == self.rounds, f"ended after round {checkpoint.latest(run)}")
        self.once(run)
        return {"found": f"round {number} took {self.summary(run, number)['seconds']:.0f} s; rounds 1 to "
                f"{self.rounds} as undisturbed"}  # fmt: skip

    def late(self, place: str, deadline: float | None = None) -> Found:
        """Cut until the round is over: it is made of the others, and the site is back for a later one.

        The other site waits in the round behind it until this one's node is heard of, as it would train for
        hours; without that, all rounds might be over before.
        """
        deadline = self.short if deadline is None else deadline
        run = self.begin_round(place, deadline)
        before = len(self.log(VICTIM))
        with self.held(place, VICTIM):
            number = (checkpoint.latest(run) or 0) + 1
            self.machines.cut(VICTIM)
        cut = time.monotonic()
        self.until(lambda: (checkpoint.latest(run) or 0) >= number, f"round {number} does not end")
        with self.held(AT_WORK, OTHER):
            self.machines.mend(VICTIM)
            mended = time.monotonic()
            wait_until(lambda: BACK in self.log(VICTIM)[before:], min(deadline / 2, 100))
            back = time.monotonic() - mended
        self.ended("finished:completed")
        found = self.without(run, number, deadline)
        return {"found": f"{found}; cut for {mended - cut:.0f} s, its node got through {back:.0f} s after"}

    def all_lines(self) -> Found:
        """Cut every line: the run ends and names the sites, and is continued after the mending."""
        quorum = f"federation.min_sites={len(SITES)}"
        run = self.begin_round(AT_WORK, self.short, quorum)
        with self.held(AT_WORK):
            for name in SITES:
                self.machines.cut(name)
        self.ended("finished:failed")
        told = self.why()
        expect(all(f"'{name}'" in told for name in SITES), f"not named: {told}")
        for name in SITES:
            self.machines.mend(name)
        last = self.check(run)
        self.submit([f"resume={run}"])
        self.ended("finished:completed")
        expect(self.check(run) == self.rounds, f"ended after round {checkpoint.latest(run)}")
        found = f"ended after round {last}, both named; resume= made all {self.rounds} as undisturbed"
        return {"found": found}

    def without(self, run: Path, number: int, deadline: float) -> str:
        """Hold a run to what must be where the site missed this round and came back; returns what it was."""
        key = checkpoint.read_meta(run, number)["run_key"]
        for one in range(1, number):
            same = [checkpoint.round_file(f, one, ".safetensors").read_bytes() for f in (run, self.whole)]
            expect(same[0] == same[1], f"round {one} is not the undisturbed run's")
        row = self.summary(run, number)
        code = row["refused"].get(VICTIM, "silent" if VICTIM in row["silent"] else "")
        expect(code in ("silent", OFFLINE), f"round {number}: {row}")
        expect(row["contributors"] == [OTHER], f"round {number} is made of {row['contributors']}")
        expect(row["seconds"] < deadline + SLACK, f"round {number} took {row['seconds']:.0f} s")
        tensors = checkpoint.read_tensors(checkpoint.round_file(run, number, ".safetensors"))
        kept = payload.pack(tensors, list(tensors), "fp32").manifest["sha256"]
        left = [r["sha256"] for r in self.left(OTHER) if (r["run_key"], r["round"]) == (key, number)]
        expect(left == [kept], f"round {number} is not what {OTHER} sent")
        whole = [one for one in range(number + 1, self.rounds + 1)
                 if self.summary(run, one)["contributors"] == list(SITES)]  # fmt: skip
        expect(whole, f"never came back in {self.rounds} rounds")
        for name in SITES:
            EgressLog(self.deployment.folder / "states" / name).verify()
        self.charged()
        named = "silent" if code == "silent" else f"offline ({code})"
        return f"round {number} without it, named {named}, {row['seconds']:.0f} s; back in round {whole[0]}"

    def once(self, run: Path) -> None:
        """Each site's log holds each round of a run once: nothing left twice."""
        key = checkpoint.read_meta(run, 1)["run_key"]
        for name in SITES:
            rounds = [row["round"] for row in self.left(name) if row["run_key"] == key]
            expect(rounds == list(range(1, self.rounds + 1)), f"{name} let out: {rounds}")

    def why(self) -> str:
        """What the newest run's server app said last."""
        d = self.deployment
        number = json.loads(d.tell("flower.sh", "list", NAME, "--format", "json"))["runs"][0]["run-id"]
        told = " ".join(d.tell("flower.sh", "log", str(number), NAME, "--show").split())
        return told[told.rfind("valid replies") :][:300]

    def left(self, name: str) -> list[dict[str, Any]]:
        """Rows of a site's log of answers to rounds that hold weights."""
        rows = EgressLog(self.deployment.folder / "states" / name).rows()
        return [row.content for row in rows if row.kind == "train" and row.content["status"] == "ok"]

    def summary(self, run: Path, number: int) -> dict[str, Any]:
        """A round's own row."""
        rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return next(row for row in rows if row["round"] == number and row["site"] is None)

    def log(self, name: str) -> str:
        """What a process said."""
        return self.deployment.log(name).read_text(errors="replace")


@contextlib.contextmanager
def cases(folder: Path, quick: bool) -> Iterator[list[Case]]:
    """Give the cases; every process and every namespace ends with the block."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def lines() -> Lines:
            return Lines(folder / str(time.time_ns()), stack)

        def of(fault: str, work: Callable[[Lines], Found]) -> Case:
            return Case("network", fault, lambda _: lines().judge(work))

        in_time = [of(f"cut {place}, mended in time", functools.partial(Lines.in_time, place=place))
                   for place in PLACES if place != AT_WORK]  # fmt: skip
        late = {
            f"cut {TRAINING} until the round is over": (TRAINING, None),
            f"cut {ANSWER} until the round is over": (ANSWER, None),
            "cut for longer than two heartbeats, the deadline far": (TRAINING, IN_TIME),
        }
        yield [
            *in_time,
            *(of(fault, functools.partial(Lines.late, place=told[0], deadline=told[1]))
              for fault, told in late.items()),
            of("all lines cut at once", Lines.all_lines),
        ]  # fmt: skip
