"""Where the network looked and how much it computed, in words and tables for the report."""

from collections.abc import Mapping
from typing import Any

CALM = (
    "The regions kept in full detail follow the image. One map for all {images} held-out images would "
    "foretell {foretold} % of them beyond chance (chests are alike, so it foretells some), and they lie at "
    "the edge of the film {border} times as often as chance would have it."
)
STAMPED = (
    " To see whether burnt-in text draws the choice, letters of several greys and sizes were stamped near "
    "the corners of {films} of the images: {kept} % of the regions with a letter were kept at the worst grey "
    "and size, {base} % of the same regions without one. Other marks than letters were not tried."
)
ALARMS = {
    "foretold": "Alarm: the model looks at the same places whatever the image shows. One map for all "
    "{images} held-out images foretells {foretold} % of its choice beyond chance, so the choice says nothing "
    "about a patient; do not use it to find anything.",
    "border_share": "Alarm: the model looks at the edge of the film {border} times as often as chance would. "
    "Few findings lie there: it has probably learnt how the film was made, not what it shows.",
    "excluded_share": "Alarm: {excluded_share} % of the regions kept in full detail are black border or "
    "burnt-in text, which should never be kept while any of the patient is left.",
    "marker_pull": "Alarm: burnt-in text draws the model's choice. Letters were stamped near the corners of "
    "{films} held-out films: {kept} % of the regions with a letter were kept in full detail, {base} % of the "
    "same regions without one (the worst of several greys and sizes, {grey} of full white). Blacken or crop "
    "away what is written on the films before training and use.",
}


def auto_sentence(evaluation: Mapping[str, Any]) -> str:
    """Say what ``keep=auto`` computed of the run's images and promised; empty where it was not asked."""
    auto = (evaluation.get("auto_keep") or {}).get(evaluation["trained"])
    if auto is None:
        return ""
    if auto["threshold"] is None:
        return f"All tokens of every image were computed, because {auto['reason']}."
    risk, off = 100 * (1 - auto["confidence"]), f"by more than a cosine distance of {auto['tolerance']:g}"
    return (
        f"{100 * auto['mean_share']:.0f} % of the tokens were computed on average, of each image as few as "
        f"it needs. Calibrated on {auto['patients']} other patients: averaged over such calibrations, at "
        f"most {risk:.3g} % of the images of new patients like them differ from the dense embedding {off}. "
        f"Measured here: {100 * auto['risk']:.1f} % on {auto['scored_patients']} held-out patients (standard "
        f"error {100 * auto['risk_error']:.1f})."
    )


def recall_table(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """Share of the annotated boxes that the kept cells cover, by kind of box, then by size."""
    found = evaluation.get("selection") or {}
    table = [["boxes", "number", "patients", "kept (95 % interval)"]]
    for kind in [*found.get("kinds", []), *found.get("sizes", [])]:
        share = f"{100 * kind['value']:.0f} % ({100 * kind['low']:.0f} to {100 * kind['high']:.0f})"
        table.append([kind["label"], str(kind["n_boxes"]), str(kind["n_patients"]), share])
    return table


def selection_words(evaluation: Mapping[str, Any]) -> tuple[list[str], str]:
    """Say whether the choice of kept regions still follows the image: alarms, or one calm sentence.

    Both are empty where nothing was measured: nothing is chosen, or nothing that was learned.
    """
    spread = (evaluation.get("selection") or {}).get("spread")
    if not spread:
        return [], ""
    fill = {k: f"{100 * spread[k]:.0f}" for k in ("foretold", "excluded_share")}
    fill |= {"border": f"{spread['border_share']:.1f}", "images": str(spread["n_images"])}
    stamped = "marker_pull" in spread  # evaluations of earlier versions did not measure it
    if stamped:
        base, pull = spread["marker_base"], spread["marker_pull"]
        fill |= {"kept": f"{100 * (base + pull):.0f}", "base": f"{100 * base:.0f}"}
        fill |= {"grey": f"{100 * spread['marker_grey']:.0f} %", "films": str(spread["marker_films"])}
    said = [ALARMS[name].format(**fill) for name in spread["alarms"]]
    return said, "" if said else (CALM + STAMPED * stamped).format(**fill)
