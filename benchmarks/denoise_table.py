"""The tables of ``benchmarks.denoise``."""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.committed import Rows, markdown, rows
from benchmarks.denoise import EQUAL, at_equal_resolution, interval

FILE = "denoise-cpu.json"
IMAGES = {"a2a": "**a2a**", "a2a anatomy": "anatomy", "a2a coherent": "coherent"}
OTHERS = {"compound": "compound", "coherence": "coherence factor", "noise2noise": "Noise2Noise", "nlm": "NLM",
          "bm3d": "BM3D"}  # fmt: skip
GAINS: dict[str, tuple[str, bool]] = {  # of a column: the measure, and whether the gain is a percentage
    "gCNR": ("gcnr", False), "CNR, %": ("cnr", True), "speckle SNR, %": ("speckle_snr", True),
    "SNR to noise-free, dB": ("snr_db", False), "FWHM lateral, %": ("fwhm_lateral_mm", True),
    "axial, %": ("fwhm_axial_mm", True),
}  # fmt: skip


def denoise_gains() -> str:
    """Gains of A2A's three images over the plain compound, paired, and its own bias and CPU seconds."""
    head = ["noise dB", "apertures", "phantoms", "image", *GAINS, "bias dB", "CPU s"]
    body = []
    for setting, mine in _settings().items():
        plain = _of(mine, "compound")
        for name, shown in IMAGES.items():
            ours = _of(mine, name)
            gains = [_gain(ours, plain, *told) for told in GAINS.values()]
            bias, seconds = (sum(r[key] for r in ours.values()) / len(ours) for key in ("bias_db", "seconds"))
            body.append([*setting, str(len(ours)), shown, *gains, f"{bias:+.1f}", f"{seconds:.0f}"])
    return markdown(head, body)


def denoise_equal() -> str:
    """GCNR of A2A less that of each other family's best image that is as sharp."""
    head = ["noise dB", "apertures", *(f"− {name}" for name in OTHERS.values())]
    body = []
    for setting, mine in _settings().items():
        found = {row["against"]: row for row in at_equal_resolution(mine)}
        body.append([*setting, *(_told(found.get(family)) for family in OTHERS)])
    return markdown(head, body)


def denoise_noise() -> str:
    """What is made of pure noise: gCNR of a place where nothing is, and the power that is left."""
    found = [row for row in rows(FILE) if row["noise_alone"]]
    counts = sorted({row["apertures"] for row in found})
    head = [
        "image",
        *(f"{text}, {count} apertures" for count in counts for text in ("gCNR", "power left, dB")),
    ]
    body = []
    for name in dict.fromkeys(row["method"] for row in found):
        cells = []
        for count in counts:
            mine = [r for r in found if (r["method"], r["apertures"]) == (name, count)]
            cells += [f"{_mean(mine, 'gcnr'):.3f}", f"{_mean(mine, 'left_db'):+.1f}"]
        body.append([IMAGES.get(name, name), *cells])
    return markdown(head, body)


def _settings() -> dict[tuple[str, str], Rows]:
    found: dict[tuple[float, int], Rows] = {}
    for row in rows(FILE):
        if not row["noise_alone"]:
            found.setdefault((row["noise_db"], row["apertures"]), []).append(row)
    return {(f"{noise:g}", str(count)): found[noise, count] for noise, count in sorted(found)}


def _of(mine: Rows, method: str) -> dict[str, dict[str, Any]]:
    return {row["phantom"]: row for row in mine if row["method"] == method}


def _gain(ours: dict[str, Any], plain: dict[str, Any], key: str, percent: bool) -> str:
    difference: Callable[[float, float], float] = (
        (lambda a, b: 100 * (a / b - 1)) if percent else (lambda a, b: a - b)
    )
    pairs = [(r[key], plain[name][key]) for name, r in ours.items() if key in r and key in plain[name]]
    form = "{:+.0f}" if percent else "{:+.2f}" if key == "gcnr" else "{:+.1f}"
    return _interval([difference(a, b) for a, b in pairs], form)


def _told(row: dict[str, Any] | None) -> str:
    if row is None or not row["phantoms"]:
        return f"none within {EQUAL:g} of its FWHM"
    return "{difference:+.3f} [{low:+.3f}, {high:+.3f}]".format(**row)


def _interval(values: Sequence[float], form: str) -> str:
    mean, low, high = interval(values)
    return "–" if mean is None else f"{form} [{form}, {form}]".format(mean, low, high)


def _mean(found: Rows, key: str) -> float:
    return sum(row[key] for row in found) / len(found)
