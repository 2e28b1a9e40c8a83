"""What a site runs: ``sparsecontrast budget`` (spent), ``egress`` (what left it), ``doctor`` (is it fit?)."""

import argparse
import json
from pathlib import Path
from typing import Any

from sparsecontrast.errors import ConfigError
from sparsecontrast.terminal import print_table


def budget_options(budget: argparse.ArgumentParser) -> None:
    """Add the options of ``budget``."""
    budget.add_argument(
        "folders", nargs="*", type=Path, metavar="FOLDER", help="a site's state_dir, or a folder of such"
    )
    budget.add_argument(
        "--plan",
        nargs=3,
        type=_planned,
        metavar=("EPSILON", "ROUNDS", "Q"),
        help="the least noise with which these rounds fit, after what FOLDER's newest cohort has spent",
    )
    budget.add_argument("--steps", type=int, default=1, metavar="N", help="noisy steps a round; default 1")
    budget.add_argument(
        "--delta", type=float, default=1e-5, help="of a plan without FOLDER; below 1/patients; default 1e-5"
    )
    budget.add_argument("--verify", action="store_true", help="prove that no row was changed or taken away")
    budget.add_argument("--noted", metavar="ROW:HASH", help="and that this one, noted before, is still there")
    budget.add_argument(
        "--adopt",
        metavar="REASON",
        help="accept a ledger that was moved to another disk; vouches that the original is gone",
    )
    budget.add_argument("--json", action="store_true", help="print JSON")
    budget.epilog = "Exit status: 0 in order, 2 an error or a broken ledger, 3 no further round fits."


def egress_options(egress: argparse.ArgumentParser) -> None:
    """Add the options of ``egress``."""
    egress.add_argument("action", choices=("verify", "list", "approve", "deny"))
    egress.add_argument("folder", type=Path, metavar="FOLDER", help="a site's state_dir")
    egress.add_argument("release", nargs="?", metavar="RELEASE", help="of approve and deny")
    egress.add_argument(
        "--sha256",
        metavar="HEX",
        help="approve and deny: only if this is what `list` showed, 8 digits or more",
    )
    egress.add_argument("--noted", metavar="ROW:HASH", help="verify: and that this row is still there")


def doctor_options(doctor: argparse.ArgumentParser) -> None:
    """Add the options of ``doctor``."""
    doctor.add_argument("--site", type=Path, required=True, metavar="SITE.YAML", help="of the site's kit")
    doctor.epilog = "Run it as the user who runs the node. Exit status: 1 where a line says FAIL."


def doctor(options: argparse.Namespace) -> int:
    """Run ``doctor``; returns 1 where something failed."""
    from sparsecontrast.doctor.examine import examine

    failed = 0
    for finding in examine(options.site):
        failed += finding.level == "FAIL"
        print(finding, flush=True)
    return 1 if failed else 0


def budget(options: argparse.Namespace) -> int:
    """Run ``budget``; returns 3 where no further round fits."""
    from sparsecontrast import budget as accounts

    if not options.folders and not options.plan:
        raise ConfigError("budget: give a site's state folder, or --plan EPSILON ROUNDS Q")
    ledgers, told = accounts.find_ledgers(options.folders), {}
    if options.adopt is not None:
        for ledger in ledgers:
            ledger.adopt(options.adopt)
    if options.plan:
        epsilon, rounds, q = options.plan
        if not isinstance(rounds, int):
            raise ConfigError(f"--plan: ROUNDS={rounds:g} must be a whole number")
        books = [ledger.read() for ledger in ledgers] or [None]
        told["plans"] = [accounts.plan(epsilon, rounds, q, options.steps, options.delta, b) for b in books]
    elif options.verify or options.noted:
        told["verified"] = [accounts.verify(ledger, options.noted) for ledger in ledgers]
    else:
        told["ledgers"] = [accounts.statement(ledger) for ledger in ledgers]
    if options.json:
        print(json.dumps(told, indent=1))
    else:
        _print_budget(told)
    return 3 if accounts.any_spent(told.get("ledgers", [])) else 0


def _print_budget(told: dict[str, list[dict[str, Any]]]) -> None:
    for p in told.get("plans", []):
        print(
            f"noise_multiplier {p['noise_multiplier']:g}: {p['rounds']} rounds x {p['steps_per_round']} "
            f"steps at sample_rate {p['sample_rate']:g}, on top of epsilon {p['spent']:.3f}, end at "
            f"{p['epsilon']:.3f} of {p['target_epsilon']:g} (delta {p['delta']:g})"
        )
    for v in told.get("verified", []):
        print(f"{v['folder']}: whole. To prove it again later, note: --noted {v['rows']}:{v['hash']}")
    for site in told.get("ledgers", []):
        print(f"{site['folder']}: {site['rows']} rows, head {site['rows']}:{site['hash'][:16]}")
        head = ["cohort", "patients", "epsilon", "of", "delta", "left", "next round", "rounds left"]
        rows = [
            [c["cohort"][:8], str(c["patients"]), f"{c['epsilon']:.3f}", f"{c['target_epsilon']:g}",
             f"{c['delta']:g}", f"{c['left']:.3f}", f"{c['next_round']:.3f}", str(c["rounds_left"])]
            for c in site["cohorts"]
        ]  # fmt: skip
        print_table(head, rows)
        head = ["run", "cohort", "rounds", "charged", "steps", "sigma", "q", "epsilon alone", "last"]
        rows = [
            [r["run"], r["cohort"][:8], str(r["rounds"]), str(r["charged"]), str(r["steps"]),
             _numbers(r["noise_multiplier"]), _numbers(r["sample_rate"]), f"{r['epsilon_alone']:.3f}",
             r["last"]]
            for r in site["runs"]
        ]  # fmt: skip
        print_table(head, rows)
        for adopted in site["adopted"]:
            print(f"adopted {adopted['time']}: {adopted['reason']}")


def egress(options: argparse.Namespace) -> None:
    """Run ``egress``."""
    from sparsecontrast.approval import decide, digest, waiting
    from sparsecontrast.egress import EgressLog

    if options.action == "verify":
        last = EgressLog(options.folder).verify(options.noted)
        print(f"{options.folder}: whole. To prove it again later, note: --noted {last.number}:{last.hash}")
    elif options.action == "list":
        rows = [[str(r.number), r.kind, *_released(r.content)] for r in EgressLog(options.folder).rows()]
        print_table(["row", "answer", "run", "round", "status", "tensors", "bytes", "epsilon", "time"], rows)
        for name, facts in waiting(options.folder).items():
            size = f"{len(facts['tensors'])} tensors, {facts['bytes']} bytes"
            print(f"waits: {name}: {size}, {facts['metrics']}; sha256 {digest(facts)}")
    else:
        if options.release is None:
            raise ConfigError(
                f"egress {options.action}: name the release; `sparsecontrast egress list` shows them"
            )
        decide(options.folder, options.release, options.action == "approve", options.sha256)
        print(f"{options.release}: {'approved' if options.action == 'approve' else 'denied'}")


def _released(told: dict[str, Any]) -> list[str]:
    """One row of the log in words; an error's status is its code."""
    status = told.get("code") or told.get("status") or "–"
    epsilon = "–" if told.get("epsilon") is None else f"{told['epsilon']:.3f}"
    size = f"{told['bytes']:,}" if "bytes" in told else "–"
    run, number = str(told.get("run_key", "–"))[:8], str(told.get("round", "–"))
    return [run, number, str(status), str(len(told.get("tensors", ()))), size, epsilon, told["time"]]


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{v:g}" for v in values)


def _planned(text: str) -> float | int:
    # --plan EPSILON ROUNDS Q mixes both
    return int(text) if text.isdecimal() else float(text)
