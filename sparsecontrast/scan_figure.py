"""A scan with its axes in millimetres, as an inline SVG: depth downwards, and a bar for a map's own scale."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

TALL = 420.0  # of the picture; SVG units are pixels of the page
LEFT, BELOW, RIGHT, TICK = 48.0, 38.0, 58.0, 5.0
NARROW, WIDE = 0.2, 5.0  # of the height: the width of a picture whose axes are far from one scale


@dataclass(frozen=True)
class Bar:
    """The scale of a picture's greys: from black to white, in ``unit``."""

    black: float
    white: float
    unit: str


def scan_figure(
    uri: str, x: Sequence[float], z: Sequence[float], unit: str, told: str, bar: Bar | None = None
) -> Markup:
    """Draw a picture with lateral and depth axes.

    Args:
        uri: of the picture, ``data:``; rows are depths.
        x: lateral positions of the first and the last column.
        z: depths of the first and the last row.
        unit: of both, ``mm`` or ``pixels``.
        told: what the picture shows, for those who cannot see it.
        bar: of its greys, drawn to its right.
    """
    width = picture_width(x, z)
    total = LEFT + width + (RIGHT if bar else 12.0)
    drawn = [
        f'<svg viewBox="0 0 {total:.0f} {TALL + BELOW:.0f}" width="{total:.0f}" role="img">',
        f"<title>{escape(told)}</title>",
        f'<image href="{escape(uri)}" x="{LEFT:.0f}" y="0" width="{width:.1f}" height="{TALL:.0f}" '
        'preserveAspectRatio="none"/>',
    ]
    for value in ticks(x[0], x[1]):
        at = LEFT + width * (value - x[0]) / (x[1] - x[0])
        drawn.append(_line(at, TALL, at, TALL + TICK))
        drawn.append(_text(at, TALL + 18, f"{value:g}", "mid"))
    for value in ticks(z[0], z[1]):
        at = TALL * (value - z[0]) / (z[1] - z[0])
        drawn.append(_line(LEFT - TICK, at, LEFT, at))
        drawn.append(_text(LEFT - TICK - 3, min(max(at + 4, 9), TALL), f"{value:g}", "end"))
    drawn.append(_text(LEFT + width / 2, TALL + 33, f"lateral, {unit}", "mid"))
    turned = f'transform="rotate(-90 11 {TALL / 2:.0f})"'
    drawn.append(_text(11, TALL / 2, f"depth, {unit}", "mid", turned))
    if bar is not None:
        drawn += _bar(bar, LEFT + width + 10)
    return Markup("".join(drawn) + "</svg>")


def picture_width(x: Sequence[float], z: Sequence[float]) -> float:
    """Give the width at which both axes have one scale, within bounds."""
    return TALL * min(max(abs((x[1] - x[0]) / (z[1] - z[0])), NARROW), WIDE)


def ticks(first: float, last: float, *, most: int = 6) -> list[float]:
    """Give round values between two ends, in either order, at most about ``most``."""
    low, high = min(first, last), max(first, last)
    rough = (high - low) / most
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    return [
        round(step * n, 12) for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def _bar(bar: Bar, at: float) -> list[str]:
    drawn = []
    for number in range(32):  # plain rectangles: a gradient needs an id, and pages hold several figures
        grey = round(255 * (31 - number) / 31)
        place = f'x="{at:.0f}" y="{TALL * number / 32:.1f}" width="10" height="{TALL / 32 + 0.5:.1f}"'
        drawn.append(f'<rect {place} fill="rgb({grey},{grey},{grey})"/>')
    for value in ticks(bar.black, bar.white):
        height = TALL * (bar.white - value) / (bar.white - bar.black)
        drawn.append(_text(at + 14, min(max(height + 4, 9), TALL), f"{value:g} {bar.unit}", "start"))
    return drawn


def _line(x0: float, y0: float, x1: float, y1: float) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" class="grid"/>'


def _text(x: float, y: float, text: str, place: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="tick {place}" {more}>{escape(text)}</text>'
