"""The tables of ``benchmarks.privacy_sweep``."""

from typing import Any

from benchmarks.committed import markdown, rows

FILE = "privacy-sweep-cpu.json"
GROUP = ("images", "start", "tokens", "task")


def gains() -> str:
    """Gain in probe AUROC over the weights that a group started from, by epsilon."""
    found = rows(FILE)
    epsilons = list(dict.fromkeys(row["epsilon"] for row in found))
    head = [*GROUP, "start AUROC", *map(_named, epsilons)]
    cells = {(*(row[key] for key in GROUP), row["epsilon"]): row for row in found}
    body = []
    for group in dict.fromkeys(key[:-1] for key in cells):
        mine = [cells[*group, epsilon] for epsilon in epsilons]
        begun = f"{mine[0]['start_figure']:.3f} [{mine[0]['start_low']:.3f}, {mine[0]['start_high']:.3f}]"
        body.append([*group, begun, *(_gain(row) for row in mine)])
    return markdown(head, body)


def leaks() -> str:
    """What members and canaries give away at each epsilon: the range over all groups."""
    found = rows(FILE)
    head = ["epsilon", "spent", "noise multiplier", "membership AUROC", "above 0.5", "canaries AUROC",
            "above 0.5", "audited at least", "most provable"]  # fmt: skip
    body = []
    for epsilon in dict.fromkeys(row["epsilon"] for row in found):
        # tasks of one group of runs share the figures of their membership
        mine = list({tuple(r[k] for k in GROUP[:-1]): r for r in found if r["epsilon"] == epsilon}.values())
        body.append([
            _named(epsilon), _most(mine, "epsilon_figure"), _most(mine, "noise_multiplier"),
            _range(mine, "membership"), _above(mine, "membership"), _range(mine, "canaries"),
            _above(mine, "canaries"), _most(mine, "epsilon_at_least"), _most(mine, "epsilon_ceiling"),
        ])  # fmt: skip
    return markdown(head, body)


def _named(epsilon: str) -> str:
    return "none" if epsilon == "inf" else epsilon


def _gain(row: dict[str, Any]) -> str:
    """A gain with its interval; bold where it does not hold zero."""
    text = f"{row['gain']:+.3f} [{row['gain_low']:+.3f}, {row['gain_high']:+.3f}]"
    return f"**{text}**" if row["gain_low"] > 0 or row["gain_high"] < 0 else text


def _range(mine: list[dict[str, Any]], key: str) -> str:
    values = [row[key] for row in mine]
    return f"{min(values):.3f} to {max(values):.3f}"


def _above(mine: list[dict[str, Any]], key: str) -> str:
    """In how many groups the interval lies above guessing."""
    return f"{sum(row[f'{key}_low'] > 0.5 for row in mine)} of {len(mine)}"


def _most(mine: list[dict[str, Any]], key: str) -> str:
    values = [row[key] for row in mine if row.get(key) is not None]
    return f"{max(values):.3g}" if values else "–"
