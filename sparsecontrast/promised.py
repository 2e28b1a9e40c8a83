"""What a run promised its patients, for its report: epsilon by hospital, and what it leaves open."""

from collections.abc import Mapping
from typing import Any

from sparsecontrast.charts import Line, line_chart
from sparsecontrast.runs import Run

MEANING = (
    "Epsilon bounds how much anybody who sees all that left a hospital can learn of whether one patient, "
    "with all images, was among its training patients: the odds change by at most a factor of exp(epsilon), "
    "save with probability delta. It holds for all steps of all rounds and of all earlier runs on the same "
    "patients together. For the federation the largest epsilon counts, if no patient is at two hospitals."
)
NOT_COVERED = (
    "Not covered by epsilon: the rounded number of patients that a hospital tells (privacy.public_patients "
    "makes it a constant), how long its answers take, whether it takes part, and all on this page that was "
    "computed from labels or images afterwards: scores, charts and pictures."
)
INSECURE = (
    "privacy.insecure_seed was set: the noise of this run can be repeated by anyone who knows the seed. It "
    "protects nobody. The epsilon below is that of the same run with secret noise."
)
HEAD = ["hospital", "epsilon", "delta", "noise multiplier", "private rounds", "refused for budget"]


def promised(run: Run) -> dict[str, Any] | None:
    """Return the table of hospitals, head first, with warnings; None where no hospital trained privately."""
    private = {r["site"]: r for r in run.sites if "epsilon" in r}  # the last word of each
    if not private:
        return None
    every = dict.fromkeys(r["site"] for r in run.sites)
    lines = [_line(run, site, private.get(site)) for site in every]
    seeded = run.config.privacy.insecure_seed is not None
    return {
        "table": [HEAD, *lines],
        "insecure": INSECURE if seeded or any(r.get("insecure_noise") for r in private.values()) else "",
        "open": [site for site in every if site not in private and _gave(run, site)],
        "chart": line_chart(_curves(run, list(private)), "epsilon by round", "round", "epsilon", zero=True),
        "spent": all(line[-1] != "0" for line in lines),
        "meaning": MEANING,
        "not_covered": NOT_COVERED,
        "price": _price(run),
    }  # fmt: skip


def _price(run: Run) -> str:
    """Say how much of what was learned from can be signal; empty where a site of an older version told none.

    Means shrink noise: over sites of weights w and T steps of each, in which the signal stays, it falls to
    sqrt(sum w^2 / T) / sum w of that in one step. An optimizer that rescales gradients changes both alike.
    """
    rows = [r for r in run.sites if "epsilon" in r and r.get("weight")]
    if not rows or any("noise_to_signal" not in r for r in rows):
        return ""
    noise = sum((r["weight"] * r["noise_to_signal"]) ** 2 * r["steps"] for r in rows) ** 0.5
    mean = noise / sum(r["weight"] * r["steps"] for r in rows)
    steps, sites = sum(r["steps"] for r in rows), len({r["site"] for r in rows})
    ratios = sorted({_two_digits(r["noise_to_signal"]) for r in rows}, key=float)
    times = ratios[0] if len(ratios) == 1 else f"{ratios[0]} to {ratios[-1]}"
    return (
        f"What it costs: in a step, the noise is {times} times as long as the gradients of all its patients "
        f"could be together, if every one pointed the same way. The mean over all {steps:,} steps of "
        f"{sites} {'hospital' if sites == 1 else 'hospitals'} brings that down to {_two_digits(mean)} at "
        f"best. But patients differ, and what their gradients share is smaller, so that it may drown. Fewer "
        f"trained weights, more patients, more hospitals and a larger epsilon help; a larger learning rate "
        f"enlarges noise and signal alike."
    )


def _two_digits(value: float) -> str:
    """Write 139 as 140, and 0.5046 as 0.5: no exponent, which is not for everybody."""
    return f"{float(f'{value:.2g}'):g}"


def _line(run: Run, site: str, last: Mapping[str, Any] | None) -> list[str]:
    rows = [r for r in run.sites if r["site"] == site]
    spent = str(sum(r.get("code") == "budget_spent" for r in rows))
    if last is None:
        return [site, "none", "–", "–", "0", spent]
    done = str(sum("epsilon" in r for r in rows))
    told = [f"{last['epsilon']:.3f}", f"{last['delta']:g}", f"{last['noise_multiplier']:.4g}"]
    return [site, *told, done, spent]


def _curves(run: Run, sites: list[str]) -> list[Line]:
    """Epsilon of each hospital after each round, and the largest."""
    told: dict[str, dict[float, float]] = {site: {} for site in sites}
    for row in run.sites:
        if "epsilon" in row:
            told[row["site"]][float(row["round"])] = float(row["epsilon"])
    rounds = sorted({number for rows in told.values() for number in rows})
    worst = [max(rows[number] for rows in told.values() if number in rows) for number in rounds]
    lines = [Line(site, list(rows), list(rows.values()), "thin", 0) for site, rows in told.items()]
    return [*(lines if len(lines) > 1 else []), Line("largest of all hospitals", rounds, worst, "main", 0)]


def _gave(run: Run, site: str) -> bool:
    return any(r["site"] == site and r.get("status", "ok") == "ok" for r in run.sites)
