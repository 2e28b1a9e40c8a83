"""Sites that lie in what the server can read: updates turned round, or many times too long.

Ten labs, dealt from the real blood cells, train one classifier: a task that a few minutes of training are
worth much at, unlike a short pretraining, after which the untrained network is as good. Two labs train
honestly and their update (their weights less the round's) is multiplied on the wire. What is judged is the
classifier in the end: its AUROC over held-out cells of all labs (each kind against the rest, mean of the
kinds) may be at most 0.02 below that of the same strategy without liars. FedAvg has its norm bound alone,
median and Krum are robust by themselves.

The bar means something only where it can be missed. So there are controls that hold where they miss it: the
network that was never trained, and FedAvg without its bound under the worst of the attacks.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message

from benchmarks.fault_cases.answers import copy, flat_of, manifest_of, vector_of
from benchmarks.fault_cases.case import Case, Found, expect
from benchmarks.fault_cases.ten_labs import deal, score
from benchmarks.fault_cases.wire import Delivery, Trouble, Wire, serve, when_used, whole_rounds
from sparsecontrast import overrides, payload

SITES, ALLOWED = 10, 0.02
ROUNDS, LONG = 20, 60  # the long runs, of the first seed alone, tell lies that slow from lies that harm
LIARS = tuple(f"hospital_{i:02d}" for i in range(SITES - 2, SITES))
SEEDS = (0, 1, 2)
BOUND, UNBOUND = "fedavg, norm bound", "fedavg, no norm bound"
STRATEGIES = {
    BOUND: ("federation.strategy=fedavg", "federation.update_norm=auto"),
    "median": ("federation.strategy=median",),
    "krum": ("federation.strategy=krum", f"federation.options={{num_malicious_nodes: {len(LIARS)}}}"),
    UNBOUND: ("federation.strategy=fedavg", "federation.update_norm=none"),
}
WORST = "update turned round, ten times as long"
ATTACKS = {"update turned round": -1.0, "update ten times as long": 10.0, WORST: -10.0}
RUN = (
    "experiment=cells", f"federation.sites={SITES}", "train.local_epochs=5",
    "federation.round_timeout=900", "federation.connect_timeout=900", "evaluation.baselines=[]",
)  # fmt: skip


class Liars(Trouble):
    """Multiplies the updates of some sites.

    Args:
        run: the run's folder, where the weights lie that updates count from.
        liars: names.
        factor: of their updates.
    """

    def __init__(self, run: Path, liars: tuple[str, ...], factor: float):
        self.run, self.liars, self.factor = run, liars, factor

    def deliver(self, site: str, round_number: int, reply: Message) -> list[Delivery]:
        """Let the honest pass."""
        if site in self.liars:
            reply, before = copy(reply), flat_of(self.run, round_number - 1)
            flat = (before + self.factor * (vector_of(reply.content) - before)).astype(np.float32)
            told = manifest_of(reply.content)
            made = payload.manifest_of(dict.fromkeys(told["names"], ()), "fp32", flat)
            reply.content["arrays"] = ArrayRecord({"flat": Array(flat)})
            reply.content["manifest"] = ConfigRecord(told | {"sha256": made["sha256"]})
        return [(True, reply)]


@contextlib.contextmanager
def cases(folder: Path, quick: bool) -> Iterator[list[Case]]:
    """Give the cases; their workers end with the block."""
    root = deal(SITES, folder / "cells")
    with when_used(SITES, folder / "server.log") as wire:

        @functools.cache
        def run(strategy: str, factor: float, seed: int, rounds: int = ROUNDS) -> tuple[float, int]:
            told = [overrides.assign("cells.root", root), f"federation.rounds={rounds}", f"seed={seed}"]
            name = f"{strategy}-{factor:g}-{seed}" + (f"-{rounds}" if rounds != ROUNDS else "")
            return trained(wire(), folder / name, strategy, told, factor)

        def of(strategy: str, attack: str, seed: int, rounds: int = ROUNDS) -> Case:
            def work(_: Path) -> Found:
                clean, _refused = run(strategy, 1.0, seed, rounds)
                found, refused = run(strategy, ATTACKS[attack], seed, rounds)
                text = f"AUROC {found:.3f}, clean {clean:.3f}, {refused} lies refused"
                expect(clean - found <= ALLOWED, text)
                return {"found": text, "auroc": round(found, 4), "clean_auroc": round(clean, 4)}

            of_run = f"seed {seed}" + (f", {rounds} rounds" if rounds != ROUNDS else "")
            return Case("byzantine", f"{strategy}, {of_run}: {attack}, {len(LIARS)} of {SITES}", work)

        def control(name: str, seed: int, told: Callable[[], float]) -> Case:
            return missed(f"control, seed {seed}: {name}", lambda: run(BOUND, 1.0, seed)[0], told)

        found = []
        for seed in SEEDS[:1] if quick else SEEDS:
            first = folder / f"{BOUND}-1-{seed}" / "run"
            found.append(control("the untrained network", seed, functools.partial(score, first, 0)))
            worst = functools.partial(run, UNBOUND, ATTACKS[WORST], seed)
            found.append(
                control(f"{UNBOUND}: {WORST}, {len(LIARS)} of {SITES}", seed, lambda w=worst: w()[0])
            )
            found += [of(s, a, seed) for s in STRATEGIES if s != UNBOUND for a in ATTACKS]
        if not quick:
            turned = [attack for attack, factor in ATTACKS.items() if factor < 0]
            found += [of(s, a, SEEDS[0], LONG) for s in (BOUND, "median") for a in turned]
        yield found


def missed(name: str, clean: Callable[[], float], told: Callable[[], float]) -> Case:
    """Make a control, an AUROC that must not pass the bar; ``told`` may read the run that ``clean`` made."""

    def work(_: Path) -> Found:
        wanted, found = clean(), told()
        text = f"AUROC {found:.3f}, clean {wanted:.3f}"
        expect(wanted - found > ALLOWED, f"{text}: it passes the bar, which therefore shows nothing")
        return {"found": f"{text}: misses the bar", "auroc": round(found, 4), "clean_auroc": round(wanted, 4)}

    return Case("byzantine", name, work)


def trained(wire: Wire, folder: Path, strategy: str, told: Sequence[str], factor: float) -> tuple[float, int]:
    """Train with liars, honest ones at a factor of 1; returns the AUROC, and how many lies were refused."""
    run = folder / "run"
    words = [*RUN, *STRATEGIES[strategy], *told, overrides.assign("output_dir", run)]
    if (run / "config.yaml").exists():
        words = [overrides.assign("resume", run)]
    trouble = Trouble() if factor == 1 else Liars(run, LIARS, factor)
    rows = whole_rounds(serve(wire, words, trouble, run))
    return score(run), sum(len(row["refused"]) for row in rows)
