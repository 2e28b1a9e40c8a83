"""Does private training keep what it promises? An audit of it, and of the same training with known faults.

    python -m benchmarks.audit [--quick] [--seed 0] [--json FILE]

Each row is one run whose claim is (epsilon, delta), and the lower bound of its epsilon at 95 % confidence
from what it released (``sparsecontrast/auditing.py``: Steinke et al. 2023, guesses over a fixed grid of
plans, and up to three attacks, paid for by a union bound). A bound above the claim refutes it; one below
proves nothing. How far below a faultless mechanism comes out, for this audit loses much, is simulated:
coins, sampling and noise alone, ``exact_least`` and ``exact_most`` of ``exact_runs``. A fault can leave
that range and stay below the claim; ``verdict`` tells the two apart:

    refuted     the bound lies above the claim
    too much    below the claim, above all exact runs: less noise, or longer gradients, than is told
    holds       neither

Settings, all white-box: *gradients* (canaries of one coordinate each, the strongest), *images* (canaries of
white noise, by their own gradients; the black box sees only how far their loss fell), *one step* (near-
duplicates and an outlier, played many times, the auditor knows both sums). For power, q is large and steps
are few: amplification by a small q is what such an audit sees least of. delta is 1e-7 because the audit
pays 2 m delta: at 1e-5 and 32,768 canaries no bound could exceed 5.6.

Eight minutes of one core; ``--quick`` half a minute.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import one_step
from benchmarks.audit_runs import Contender, Patients, gradient_run, input_run
from benchmarks.canaries import attacks, exact_run
from benchmarks.record import print_table, write_result
from sparsecontrast.accounting import Charge, calibrate, epsilon
from sparsecontrast.auditing import Audit, audit, ceiling, membership_auroc
from sparsecontrast.probes import Interval
from sparsecontrast.trainer import derive_seed

DELTA = 1e-7
RATIO = "likelihood ratio"
SOUND = Contender("ours", sound=True)
GRADIENTS = (
    SOUND,
    Contender("ours, all in every step", sound=True, sample_rate=1.0),
    Contender("ours, 4 films a patient", sound=True, films=4),
    Contender("4 films, each clipped alone", by_film=True, films=4),
    Contender("all in every step, not told", everyone=True),
    Contender("noise halved", noise=0.5),
    Contender("noise of a tenth", noise=0.1),
    Contender("noise forgotten", noise=0.0),
    Contender("noise of one seed in every step", replayed=True),
)
IMAGES = (SOUND, Contender("noise of a tenth", noise=0.1))
ONE_STEP: dict[str, tuple[Callable[[float, int], one_step.Step], bool]] = {
    "ours": (one_step.ours, True),
    "contrast over the batch, rows clipped": (one_step.naive, False),
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How much is done.

    Attributes:
        claims: epsilons of the gradient runs; the other settings have the first alone, ours all.
        patients: of a gradient run that are no canaries.
        canaries: in the gradients.
        steps: of a gradient run.
        images: canaries of the image runs.
        image_steps: of an image run.
        image_patients: of it that are no canaries: their gradients stand in the auditor's way.
        trials: of the one step.
        exact: simulated runs.
    """

    claims: tuple[float, ...]
    patients: int
    canaries: int
    steps: int
    images: int
    image_steps: int
    image_patients: int
    trials: int
    exact: int


FULL = Scale((2.0, 8.0), 128, 32768, 20, 512, 10, 8, 2000, 100)
QUICK = Scale((2.0,), 8, 2048, 5, 64, 3, 4, 300, 20)


def main(argv: Sequence[str] | None = None) -> int:
    """Audit all contenders; 0 if no sound one is refuted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smaller claim, few canaries and steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    scale, rows = QUICK if args.quick else FULL, []
    for row in measure(scale, args.seed):
        print(
            f"{row['setting']}, {row['contender']}: {row['lower_bound']:.2f} of {row['claim']:.2f}",
            flush=True,
        )
        rows.append(row)
    print_table("Lower bounds of epsilon", [_shown(row) for row in rows])
    if args.json:
        command = f"python -m benchmarks.audit{' --quick' if args.quick else ''} --seed {args.seed}"
        write_result("audit", command, rows, args.json)
    return int(any(row["sound"] and row["verdict"] == "refuted" for row in rows))


def measure(scale: Scale, seed: int) -> Iterator[Row]:
    """Audit every contender of every setting at every claim that the setting can refute."""
    patients = Patients(scale.patients)
    for claim in scale.claims:
        yield from gradients(GRADIENTS, claim, patients, scale, seed)
    patients = Patients(scale.image_patients)
    yield from images(IMAGES, scale.claims[0], patients, scale, seed)
    for claim in scale.claims[1:]:
        yield from images((SOUND,), claim, patients, scale, seed)
    yield from steps(scale.claims[0], scale.trials, scale.exact, seed)


def gradients(
    contenders: Iterable[Contender], claim: float, patients: Patients, scale: Scale, seed: int
) -> Iterator[Row]:
    """Audit with gradient canaries."""
    exact: dict[float, np.ndarray] = {}
    for contender in contenders:
        q, count = contender.sample_rate, scale.canaries
        sigma = calibrate(claim, DELTA, q, scale.steps)
        if q not in exact:
            exact[q] = exact_bounds(q, sigma, scale.steps, count, scale.exact, seed)
        started = time.process_time()
        own = derive_seed(seed, contender.name, claim)
        seen = gradient_run(contender, patients, count, sigma, scale.steps, own)
        told = _told("gradients", contender.name, contender.sound, Charge(sigma, q, scale.steps), started)
        yield told | _judged(seen.scores, seen.included, told["claim"], exact[q])


def images(
    contenders: Iterable[Contender], claim: float, patients: Patients, scale: Scale, seed: int
) -> Iterator[Row]:
    """Audit with input canaries: by their gradients, and by their losses alone."""
    for contender in contenders:
        q = contender.sample_rate
        sigma = calibrate(claim, DELTA, q, scale.image_steps)
        started = time.process_time()
        own = derive_seed(seed, contender.name, claim)
        seen = input_run(contender, patients, scale.images, sigma, scale.image_steps, own)
        assert seen.learned is not None
        for setting, scores in (("images", seen.scores), ("images, black box", {"loss": seen.learned})):
            charge = Charge(sigma, q, scale.image_steps)
            told = _told(setting, contender.name, contender.sound, charge, started)
            yield told | _judged(scores, seen.included, told["claim"])


def steps(claim: float, trials: int, exact: int, seed: int) -> Iterator[Row]:
    """Audit one step on near-duplicates and an outlier."""
    sigma = calibrate(claim, DELTA, 1.0, 1)
    bounds = exact_bounds(1.0, sigma, 1, trials, exact, seed)
    for name, (make, sound) in ONE_STEP.items():
        started = time.process_time()
        step = make(sigma, seed)
        scores, coins = step.play(trials, seed)
        told = _told("one step", name, sound, Charge(sigma, 1.0, 1), started)
        yield told | {"change_in_clips": step.change} | _judged({RATIO: scores}, coins, told["claim"], bounds)


def exact_bounds(
    sample_rate: float, noise_multiplier: float, steps: int, count: int, runs: int, seed: int
) -> np.ndarray:
    """Bounds of ``runs`` simulated mechanisms that do what they claim [runs]; one step has one attack."""
    rng, found = np.random.default_rng([seed, 4]), []
    for _ in range(runs):
        coins = rng.random(count) < 0.5
        seen = exact_run(coins, sample_rate, noise_multiplier, steps, rng)
        scores = attacks(seen, sample_rate, noise_multiplier)
        asked = [scores[RATIO]] if steps == 1 else list(scores.values())
        found.append(audit(np.stack(asked), coins, DELTA).epsilon)
    return np.array(found)


def _told(setting: str, name: str, sound: bool, charge: Charge, started: float) -> Row:
    return {
        "setting": setting, "contender": name, "sound": sound, "claim": epsilon([charge], DELTA),
        "delta": DELTA, "noise_multiplier": charge.noise_multiplier, "sample_rate": charge.sample_rate,
        "steps": charge.steps, "cpu_seconds": round(time.process_time() - started, 1),
    }  # fmt: skip


def _judged(
    scores: dict[str, np.ndarray], coins: np.ndarray, claim: float, exact: np.ndarray | None = None
) -> Row:
    names = list(scores)
    found: Audit = audit(np.stack([scores[name] for name in names]), coins, DELTA)
    area: Interval = membership_auroc(scores[names[0]], coins)
    row = {
        "lower_bound": found.epsilon, "share_of_claim": found.epsilon / claim, "guesses": found.guesses,
        "correct": found.correct, "canaries": found.canaries, "attack": names[found.attack],
        "ceiling": ceiling(found.canaries, DELTA, attacks=len(scores)),
        "auroc": area.value, "auroc_low": area.low, "auroc_high": area.high,
    }  # fmt: skip
    verdict = "refuted" if found.epsilon > claim else "holds"
    if exact is not None:
        row |= {"exact_least": float(exact.min()), "exact_most": float(exact.max())}
        row |= {"exact_median": float(np.median(exact)), "exact_runs": len(exact)}
        if verdict == "holds" and found.epsilon > exact.max():
            verdict = "too much"
    return row | {"verdict": verdict}


def _shown(row: Row) -> Row:
    exact = f"{row['exact_least']:.2f} to {row['exact_most']:.2f}" if "exact_least" in row else ""
    return {
        "setting": row["setting"], "contender": row["contender"], "claim": row["claim"],
        "bound": row["lower_bound"], "correct": f"{row['correct']} of {row['guesses']}", "exact": exact,
        "ceiling": row["ceiling"],
        "AUROC": f"{row['auroc']:.3f}", "verdict": row["verdict"], "CPU s": row["cpu_seconds"],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
