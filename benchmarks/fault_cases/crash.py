"""kill -9 of each process of a real federation in each phase of a round, and one command to go on.

Two hospitals on loopback, TLS, registered keys, SQLite; one of them trains privately, with noise that can be
repeated, so that the bits can be compared. FedYogi, three rounds. Each chain is one run whose every
continuation is struck again, always in the second round or behind it, and each time ``resume=`` is given
anew; every checkpoint on the way must be the undisturbed run's, byte for byte. A client process lives from
a message to its answer: in the server's phases there is none to kill.
"""

import contextlib
import functools
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.fault_cases.case import Case, Found, expect
from benchmarks.fault_cases.hook.sitecustomize import found
from simulation.deploy import MARK, NAME, ROOT, TINY, Deployment
from sparsecontrast import checkpoint, overrides
from sparsecontrast.egress import EgressLog
from sparsecontrast.ledger import INSECURE, Ledger

SITES, VICTIM = ("north", "south"), "north"
ROUNDS = 3
PRIVATE = (
    "privacy=dp_sgd", "privacy.insecure_seed=7", "privacy.noise_multiplier=8", "privacy.sample_rate=0.5",
    "privacy.steps_per_round=2", "privacy.target_epsilon=50",
)  # fmt: skip
RUN = (
    "method=patch_contrast", "federation.sites=2", "federation.min_sites=2", f"federation.rounds={ROUNDS}",
    "federation.strategy=fedyogi", "federation.options={eta: 0.01}", "federation.round_timeout=180",
    "federation.connect_timeout=300",
)  # fmt: skip
SERVER, CLIENT = "flwr-serverapp", "client.executor"
PATIENCE = 420.0  # seconds for anything that takes one, on a machine that others use too
SUFFIXES = (".safetensors", ".strategy.safetensors")


def _at(process: str, place: str, when: str, call: int = 1, after: str = "") -> dict[str, Any]:
    module, _, function = place.partition(":")
    return {"of": process, "module": module, "function": function, "when": when, "call": call, "after": after}


PHASES = {
    "before the messages": _at(SERVER, "server.rounds:Rounds._exchange", "enter"),
    "in local training": _at(CLIENT, "sparsecontrast.privacy:PatientSGD.step", "enter", 2),
    "trained, not answered": _at(CLIENT, "client.rounds:KeptRounds.save", "leave"),
    "what leaves is half logged": _at(
        CLIENT, "sparsecontrast.egress:_write", "half", after="client.guard:_training"
    ),
    "aggregated, nothing written": _at(SERVER, "server.strategy:Aggregator.aggregate", "leave"),
    "checkpoint half written": _at(SERVER, "sparsecontrast.checkpoint:write_tensors", "leave"),
    "checkpoint written": _at(SERVER, "sparsecontrast.checkpoint:write_round", "leave"),
}
VICTIMS = {
    "client process": "itself", "ServerApp": [SERVER],
    "SuperNode": ["client.node", f"/{VICTIM}/"], "SuperLink": ["bin/flower-superlink"],
}  # fmt: skip
END = "to the end"


@dataclass(frozen=True)
class Place:
    """A phase and who dies in it."""

    phase: str
    victim: str


def chain(victim: str) -> list[Place]:
    """All phases in which this process can die, in their order."""
    able = [name for name, at in PHASES.items() if victim != "client process" or at["of"] == CLIENT]
    return [Place(name, victim) for name in able]


@contextlib.contextmanager
def cases(folder: Path, quick: bool) -> Iterator[list[Case]]:
    """Give the cases; every process of the federation ends with the block."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def struck() -> "Struck":
            return Struck(folder / str(time.time_ns()), stack)

        def of(place: Place) -> Case:
            fault = f"{place.victim}: {place.phase}"
            return Case("crash", fault, lambda _: struck().strike(place))

        def end(victim: str) -> Case:
            fault = f"{victim}: after all of these, {END}"
            return Case("crash", fault, lambda _: struck().finish(victim))

        victims = list(VICTIMS)
        yield [case for v in victims for case in (*map(of, chain(v)), end(v))]


class Struck:
    """A federation, its undisturbed run, and one that ended after its first round, to begin chains with.

    Args:
        folder: new.
        stack: stops everything when it is closed.
    """

    run_words: tuple[str, ...] = RUN

    def __init__(self, folder: Path, stack: contextlib.ExitStack):
        self.plan, self.runs = folder / "plan.json", dict[str, list[Path]]()
        self.killed = folder / "plan.json.killed"
        self.deployment = stack.enter_context(Deployment(folder / "federation", SITES, patients=12))
        d = self.deployment
        self.begin_private(d)
        d.start()
        self.whole, self.base = d.folder / "whole", d.folder / "base"
        self.submit([overrides.assign("output_dir", self.whole)])
        self.await_end()
        expect(checkpoint.latest(self.whole) == ROUNDS, f"the undisturbed run failed: {d.end('superlink')}")
        self.aim(Place("checkpoint written", "ServerApp"), call=2)
        self.submit([overrides.assign("output_dir", self.base)])
        self.await_end()
        expect(checkpoint.latest(self.base) == 1, "the run to begin with did not end after its first round")
        self.key = str(checkpoint.read_meta(self.base, 1)["run_key"])
        for name in SITES:
            shutil.copytree(self.states(name), d.folder / "kept" / name)

    def begin_private(self, d: Deployment) -> None:
        """Provision; the processes follow the plan, and the victim trains privately."""
        hook = Path(__file__).parent / "hook"
        d.environment |= {
            "FAULTS_PLAN": str(self.plan),
            "PYTHONPATH": f"{hook}:{d.environment['PYTHONPATH']}",
        }
        d.provision()
        file = d.kits.site(VICTIM) / "site.yaml"
        told = yaml.safe_load(file.read_text())
        told["overrides"] += PRIVATE
        file.write_text(yaml.safe_dump(told))

    def states(self, name: str) -> Path:
        """Where a site keeps what it needs from round to round of the run."""
        key = checkpoint.read_meta(self.base, 1)["run_key"]
        return self.deployment.folder / "states" / name / "state" / str(key)

    def run(self, victim: str, going: bool) -> Path:
        """Give a victim's run; a new one where there is none, or where it is to go on and has ended.

        A ServerApp outlives its SuperLink by a few seconds, which is enough for a small run's last round.
        """
        runs = self.runs.setdefault(victim, [])
        if not runs or (going and checkpoint.latest(runs[-1]) == ROUNDS):
            runs.append(self.begin(f"{victim.replace(' ', '-')}-{len(runs)}"))
        return runs[-1]

    def begin(self, name: str) -> Path:
        """Copy the run that has done its first round, and put the sites' states back to that moment."""
        self.plan.unlink(missing_ok=True)
        for site in SITES:
            shutil.rmtree(self.states(site))
            shutil.copytree(self.deployment.folder / "kept" / site, self.states(site))
        return Path(shutil.copytree(self.base, self.deployment.folder / name))

    def strike(self, place: Place) -> Found:
        """Continue the run, kill where it is told, put back what a service manager would, and look."""
        run = self.run(place.victim, going=True)
        before, charged = checkpoint.latest(run) or 0, self.charged()
        self.aim(place)
        self.submit([f"resume={run}"])
        self.until(self.killed.exists, f"never came to: {place.phase}")
        expect(json.loads(self.killed.read_text()), f"{place.phase}: nobody was there to kill")
        dead = time.monotonic()
        self.revive()
        self.await_end()
        seconds = time.monotonic() - dead
        after = self.check(run)
        expect(after >= before, f"round {before} was whole, now {after} is")
        expect(self.charged() >= charged, "the ledger lost a charge")
        return {"found": f"rounds 1 to {after} as undisturbed; the run had ended {seconds:.0f} s after"}

    def finish(self, victim: str) -> Found:
        """Continue to the end; the whole of it is the undisturbed run's, and no round counts twice."""
        run = self.run(victim, going=False)
        self.plan.unlink(missing_ok=True)
        self.submit([f"resume={run}"])
        self.await_end()
        status = self.deployment.status()
        expect(status == "finished:completed", status)
        expect(self.check(run) == ROUNDS, f"ended after round {checkpoint.latest(run)}")
        told = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rows = sorted((row["round"], row["site"] or "") for row in told)
        expect(rows == [(n + 1, s) for n in range(ROUNDS) for s in ("", *SITES)], f"rows: {rows}")
        states = [(row["round"], row["state_round"]) for row in told if row["site"]]
        expect(all(state == number - 1 for number, state in states), f"states taken: {states}")
        return {"found": f"{ROUNDS} rounds, weights and moments as undisturbed, each row once"}

    def check(self, run: Path) -> int:
        """Hold every whole round to the undisturbed run, and what left to what was charged.

        Returns:
            The newest whole round.
        """
        last = checkpoint.latest(run) or 0
        for number in range(last + 1):
            for suffix in SUFFIXES:
                one, two = (checkpoint.round_file(f, number, suffix) for f in (run, self.whole))
                expect(one.exists() == two.exists(), f"{one.name}: there {one.exists()}")
                same = not one.exists() or one.read_bytes() == two.read_bytes()
                expect(same, f"{one.name} is not the undisturbed run's")
            meta = checkpoint.read_meta(run, number)
            expect(not number or meta["contributors"] == list(SITES), f"round {number}: {meta}")
        for name in SITES:
            EgressLog(self.deployment.folder / "states" / name).verify()
        self.charged()
        return last

    def charged(self) -> int:
        """Count charges; each round of each run has as many as were released, at least.

        Raises:
            BrokenPromiseError: something was released that was not charged.
        """
        state = self.deployment.folder / "states" / VICTIM
        ledger = Ledger(state / INSECURE)
        ledger.verify()
        charges = [(entry.run, entry.round) for entry in ledger.read().entries]
        told = [row.content for row in EgressLog(state).rows() if row.kind == "train"]
        released = [(c["run_key"], c["round"]) for c in told if c["status"] == "ok"]
        for one in set(released):
            expect(charges.count(one) >= released.count(one), f"{one}: charged {charges.count(one)}, "
                   f"released {released.count(one)}")  # fmt: skip
        return len(charges)

    def aim(self, place: Place, call: int | None = None) -> None:
        """Write the plan; processes that start from now on follow it."""
        at, mark = PHASES[place.phase], f"{MARK}={self.deployment.mark}"
        process = [at["of"], mark, *([f"/{VICTIM}/"] if at["of"] == CLIENT else [])]
        words = VICTIMS[place.victim]
        victim = words if isinstance(words, str) else [*words, mark]
        told = at | {"call": call or at["call"], "process": process, "victim": victim}
        self.killed.unlink(missing_ok=True)
        self.plan.write_text(json.dumps(told))

    def submit(self, words: list[str]) -> None:
        """Give a run to the SuperLink."""
        resumed = any(word.startswith("resume=") for word in words)
        text = overrides.join(words if resumed else overrides.merge([*TINY, *self.run_words], words))
        self.deployment.tell("flower.sh", "run", str(ROOT), NAME, "--run-config", f'overrides="{text}"')
        self.until(lambda: self.alive(SERVER) or not self.alive("bin/flower-superlink"), "no ServerApp came")

    def revive(self) -> None:
        """Start a SuperLink or SuperNode that is dead, as its service manager would."""
        time.sleep(1)  # it may be dying
        d = self.deployment
        if d.started["superlink"].poll() is not None:
            d.start_superlink()
        for name in SITES:
            if d.started[name].poll() is not None:
                d.let_in(name)

    def await_end(self) -> None:
        """Return when no ServerApp is at work any more."""
        self.until(lambda: not self.alive(SERVER), "the ServerApp does not end")

    def alive(self, word: str) -> bool:
        """Whether such a process of this federation is there."""
        return bool(found([word, f"{MARK}={self.deployment.mark}"]))

    def until(self, true: Any, otherwise: str) -> None:
        """Wait.

        Raises:
            BrokenPromiseError: it did not come about.
        """
        deadline = time.monotonic() + PATIENCE
        while not true():
            expect(time.monotonic() < deadline, otherwise)
            time.sleep(0.2)
