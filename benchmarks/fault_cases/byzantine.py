"""Sites that lie in what the server can read: updates turned round, or many times too long.

Ten sites of phantoms, a small ViT. One or two sites train honestly and their update (their weights less the
round's) is multiplied on the wire. What is judged is the backbone in the end: its mean linear-probe AUROC
over the findings may be at most 0.02 below that of the same strategy without liars. FedAvg has its norm
bound alone, median and Krum are robust by themselves.

The bar means something only where it can be missed. So there are controls that hold where they miss it: the
network that was never trained, and FedAvg without its bound under two attacks.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message

from benchmarks.fault_cases.answers import copy, flat_of, manifest_of, vector_of
from benchmarks.fault_cases.case import Case, Found, expect
from benchmarks.fault_cases.wire import Delivery, Trouble, Wire, serve, when_used, whole_rounds, words
from sparsecontrast import payload

SITES, ROUNDS, ALLOWED = 10, 4, 0.02
SEEDS = (0, 1, 2)
NAMES = tuple(f"hospital_{i:02d}" for i in range(SITES))
STRATEGIES = {
    "fedavg, norm bound": ("federation.strategy=fedavg", "federation.update_norm=auto"),
    "median": ("federation.strategy=median",),
    "krum": ("federation.strategy=krum", "federation.options={num_malicious_nodes: 2}"),
}
UNBOUND = {"fedavg, no norm bound": ("federation.strategy=fedavg", "federation.update_norm=none")}
ATTACKS = {
    "update turned round": -1.0, "update ten times as long": 10.0,
    "update turned round, ten times as long": -10.0, "update 300 times as long": 300.0,
}  # fmt: skip
CONTROLS = ("update turned round, ten times as long", "update 300 times as long")
SIZE = (
    "backbone.img_size=64", "backbone.patch_size=8", "backbone.depth=2", "data.phantom.patients_per_site=24",
    "train.batch_size=16", f"federation.rounds={ROUNDS}", "federation.round_timeout=900",
    "evaluation.bootstrap=20", "evaluation.label_fractions=[1.0]", "evaluation.baselines=[random_init]",
    "evaluation.overlays=0",
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
    with when_used(SITES, folder / "server.log") as wire:

        @functools.cache
        def score(strategy: str, count: int, factor: float, seed: int) -> tuple[float, int]:
            return trained(
                wire(), folder / f"{strategy}-{count}-{factor:g}-{seed}", strategy, count, factor, seed
            )

        def of(strategy: str, attack: str, count: int, seed: int) -> Case:
            def work(_: Path) -> Found:
                clean, _refused = score(strategy, 0, 1.0, seed)
                found, refused = score(strategy, count, ATTACKS[attack], seed)
                text = f"AUROC {found:.3f}, clean {clean:.3f}, {refused} lies refused"
                expect(clean - found <= ALLOWED, text)
                return {"found": text, "auroc": round(found, 4), "clean_auroc": round(clean, 4)}

            return Case("byzantine", f"{strategy}, seed {seed}: {attack}, {count} of {SITES}", work)

        def control(name: str, seed: int, told: Callable[[], float]) -> Case:
            clean = functools.partial(score, "fedavg, norm bound", 0, 1.0, seed)
            return missed(f"control, seed {seed}: {name}", lambda: clean()[0], told)

        def untrained(seed: int) -> float:
            return auroc(folder / f"fedavg, norm bound-0-1-{seed}" / "run", "random_init")

        def unbound(strategy: str, attack: str, seed: int) -> float:
            return score(strategy, 2, ATTACKS[attack], seed)[0]

        found = []
        for seed in SEEDS[:1] if quick else SEEDS:
            found.append(control("the untrained network", seed, functools.partial(untrained, seed)))
            found += [
                control(f"{s}: {a}, 2 of {SITES}", seed, functools.partial(unbound, s, a, seed))
                for s in UNBOUND
                for a in CONTROLS
            ]
            found += [of(s, a, count, seed) for count in (2, 1) for s in STRATEGIES for a in ATTACKS]
        yield found


def missed(name: str, clean: Callable[[], float], told: Callable[[], float]) -> Case:
    """Make a control, an AUROC that must not pass the bar; ``told`` may read the run that ``clean`` made."""

    def work(_: Path) -> Found:
        wanted, found = clean(), told()
        text = f"AUROC {found:.3f}, clean {wanted:.3f}"
        expect(wanted - found > ALLOWED, f"{text}: it passes the bar, which therefore shows nothing")
        return {"found": f"{text}: misses the bar", "auroc": round(found, 4), "clean_auroc": round(wanted, 4)}

    return Case("byzantine", name, work)


def trained(
    wire: Wire, folder: Path, strategy: str, count: int, factor: float, seed: int
) -> tuple[float, int]:
    """Train with so many liars; returns the mean AUROC over the findings, and how many lies were refused."""
    liars, run = NAMES[SITES - count :], folder / "run"
    told = words(folder, SITES, *SIZE, *(STRATEGIES | UNBOUND)[strategy], f"seed={seed}")
    if (run / "config.yaml").exists():
        told = [f"resume={run}"]
    rows = whole_rounds(serve(wire, told, Liars(run, liars, factor)))
    return auroc(run), sum(len(row["refused"]) for row in rows)


def auroc(run: Path, features: str = "federated") -> float:
    """Score a run's last round, or its baseline: mean linear-probe AUROC over all findings, every label."""
    from sparsecontrast.evaluation import evaluate_run
    from sparsecontrast.findings import pick, questions

    evaluation = evaluate_run(run, show=False)
    found = [
        row["value"]
        for question in questions(evaluation)
        for row in pick(evaluation["rows"], question, metric="linear_probe_auroc")
        if row["value"] is not None and row["features"] == features
    ]
    return float(np.mean(found))
