"""Charts as inline SVG text: no script, no font, no file beside the page.

Every function returns ``markupsafe.Markup``; names that come from data are escaped here. Colours are
CSS variables of the page (``--ink``, ``--quiet``, ``--line``, ``--accent``, ``--c0`` ...), so the
charts follow light, dark and print.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH = 720.0
COLOURS = 8  # --c0 .. --c7


@dataclass(frozen=True)
class Line:
    """One curve; ``y`` may hold NaN, which breaks it. ``kind``: main | thin | dashed."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    kind: str = "main"
    colour: int = 0


@dataclass(frozen=True)
class Dot:
    """One value with an interval (None = none known)."""

    name: str
    value: float
    low: float | None
    high: float | None
    strong: bool = False


@dataclass(frozen=True)
class Bar:
    """One stacked bar."""

    name: str
    parts: Sequence[float]


def line_chart(
    lines: Sequence[Line], label: str, x_label: str, y_label: str, height: float = 260,
    percent: bool = False, zero: bool = False,
) -> Markup:  # fmt: skip
    """Draw curves over a common axis; the names of ``main`` and ``dashed`` ones stand in a legend.

    ``percent`` shows shares 0..1 as 0..100 % on a fixed axis; ``zero`` starts the axis at 0.
    """
    points = [(x, y) for s in lines for x, y in zip(s.x, s.y, strict=True) if math.isfinite(y)]
    if not points:
        return Markup("")
    left, right, top, bottom = 56.0, WIDTH - 12, 30.0, height - 40
    y_low, y_high = min(p[1] for p in points), max(p[1] for p in points)
    y_ticks = [0, 0.25, 0.5, 0.75, 1.0] if percent else _ticks(0 if zero else y_low, y_high, 5)
    x_low, x_high = min(p[0] for p in points), max(p[0] for p in points)
    x_ticks = [t for t in _ticks(x_low, x_high, 8) if x_low <= t <= x_high and t == int(t)] or [x_low]
    sx = _scale(x_low, x_high, left + 6, right - 6)
    sy = _scale(y_ticks[0], y_ticks[-1], bottom, top)
    body = [
        _grid_y(y_ticks, sy, left, right, percent),
        _axis_x(x_ticks, sx, bottom, x_label, (left + right) / 2, height),
    ]
    body.append(Markup('<text class="axis" x="{}" y="12">{}</text>').format(0, y_label))
    for line in sorted(lines, key=lambda s: s.kind != "thin"):
        body.append(_curve(line, sx, sy))
    body.append(_legend([(s.name, s.kind, s.colour) for s in lines if s.kind != "thin"], right))
    return _svg(body, height, label)


def dot_chart(
    groups: Sequence[tuple[str, Sequence[Dot]]], label: str, x_label: str, chance: float | None = None,
    low: float | None = None, high: float | None = None,
) -> Markup:  # fmt: skip
    """Draw values with intervals, one row each, under group headings; ``chance`` is a dashed upright."""
    dots = [d for _, rows in groups for d in rows]
    if not dots:
        return Markup("")
    known = [v for d in dots for v in (d.value, d.low, d.high) if v is not None] + (
        [chance] if chance is not None else []
    )
    ticks = _ticks(min(known) if low is None else low, max(known) if high is None else high, 6)
    left, right = 210.0, WIDTH - 96
    sx = _scale(ticks[0], ticks[-1], left, right)
    y, body = 8.0, []
    for title, rows in groups:
        if title:
            y += 18 if y < 10 else 26
            body.append(Markup('<text class="group" x="0" y="{:.0f}">{}</text>').format(y, title))
            y += 4
        for dot in rows:
            y += 19
            body.append(_dot(dot, sx, y, left))
        y += 6
    bottom = y + 6
    if chance is not None:
        mark = '<line class="chance" x1="{0:.1f}" x2="{0:.1f}" y1="4" y2="{1:.0f}"/>'
        body.insert(0, Markup(mark).format(sx(chance), bottom))
    height = bottom + 36
    grid = [
        Markup('<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="4" y2="{1:.0f}"/>').format(sx(t), bottom)
        for t in ticks
    ]
    return _svg(
        [*grid, *body, _axis_x(ticks, sx, bottom, x_label, (left + right) / 2, height)], height, label
    )


def bar_chart(bars: Sequence[Bar], parts: Sequence[str], label: str, x_label: str) -> Markup:
    """Draw stacked horizontal bars, one a site; the total stands at the end of each."""
    if not bars:
        return Markup("")
    left, right, row, top = 170.0, WIDTH - 60, 22.0, 30.0 + 16 * ((len(parts) - 1) // 5)
    ticks = _ticks(0, max(sum(b.parts) for b in bars) or 1, 6)
    sx = _scale(0, ticks[-1], left, right)
    bottom = top + row * len(bars) + 4
    body: list[Markup] = [
        Markup('<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="{2:.0f}" y2="{1:.0f}"/>').format(
            sx(t), bottom, top
        )
        for t in ticks
    ]
    for i, bar in enumerate(bars):
        y, start = top + row * i, 0.0
        body.append(
            Markup('<text class="name" x="{:.0f}" y="{:.1f}">{}</text>').format(
                left - 8, y + 15, _short(bar.name)
            )
        )
        for k, part in enumerate(bar.parts):
            if part > 0:
                rect = '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="15" fill="var(--c{})">'
                rect += "<title>{}: {:g}</title></rect>"
                body.append(
                    Markup(rect).format(
                        sx(start), y + 3.5, sx(start + part) - sx(start), k % COLOURS, parts[k], part
                    )
                )
            start += part
        body.append(
            Markup('<text class="tick" x="{:.1f}" y="{:.1f}">{:g}</text>').format(
                sx(start) + 5, y + 15, start
            )
        )
    body.append(_squares(parts))
    height = bottom + 36
    body.append(_axis_x(ticks, sx, bottom, x_label, (left + right) / 2, height))
    return _svg(body, height, label)


def _svg(body: Sequence[Markup], height: float, label: str) -> Markup:
    opening = Markup('<svg viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">').format(
        WIDTH, height, label
    )
    return opening + Markup("").join(body) + Markup("</svg>")


def _curve(line: Line, sx, sy) -> Markup:
    path, pen_down = [], False
    for x, y in zip(line.x, line.y, strict=True):
        if math.isfinite(y):
            path.append(f"{'L' if pen_down else 'M'}{sx(x):.1f} {sy(y):.1f}")
        pen_down = math.isfinite(y)
    shape = '<path class="curve {}" stroke="var(--c{})" d="{}"><title>{}</title></path>'
    drawn = Markup(shape).format(line.kind, line.colour % COLOURS, " ".join(path), line.name)
    if line.kind == "main" and len(line.x) <= 40:
        dots = '<circle cx="{:.1f}" cy="{:.1f}" r="2.2" fill="var(--c{})"/>'
        for x, y in zip(line.x, line.y, strict=True):
            if math.isfinite(y):
                drawn += Markup(dots).format(sx(x), sy(y), line.colour % COLOURS)
    return drawn


def _dot(dot: Dot, sx, y: float, left: float) -> Markup:
    kind = "strong" if dot.strong else "plain"
    name = Markup('<text class="name {}" x="{:.0f}" y="{:.1f}">{}</text>').format(
        kind, left - 12, y + 4, _short(dot.name, 34)
    )
    whisker = Markup("")
    if dot.low is not None and dot.high is not None:
        shape = '<line class="whisker {}" x1="{:.1f}" x2="{:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        whisker = Markup(shape).format(kind, sx(dot.low), sx(dot.high), y=y)
    mark = Markup('<circle class="mark {}" cx="{:.1f}" cy="{:.1f}" r="4"/>').format(kind, sx(dot.value), y)
    text = f"{dot.value:+.3f}" if dot.value < 0 else f"{dot.value:.3f}"
    return (
        name
        + whisker
        + mark
        + Markup('<text class="value {}" x="{:.0f}" y="{:.1f}">{}</text>').format(kind, WIDTH, y + 4, text)
    )


def _grid_y(ticks: Sequence[float], sy, left: float, right: float, percent: bool) -> Markup:
    out = Markup("")
    for t in ticks:
        text = f"{100 * t:.0f} %" if percent else f"{t:g}"
        out += Markup('<line class="grid" x1="{:.0f}" x2="{:.0f}" y1="{y:.1f}" y2="{y:.1f}"/>').format(
            left, right, y=sy(t)
        )
        out += Markup('<text class="tick end" x="{:.0f}" y="{:.1f}">{}</text>').format(
            left - 6, sy(t) + 4, text
        )
    return out


def _axis_x(ticks: Sequence[float], sx, bottom: float, label: str, middle: float, height: float) -> Markup:
    out = Markup("")
    for t in ticks:
        out += Markup('<text class="tick mid" x="{:.1f}" y="{:.0f}">{:g}</text>').format(
            sx(t), bottom + 15, t
        )
    return out + Markup('<text class="axis mid" x="{:.0f}" y="{:.0f}">{}</text>').format(
        middle, height - 4, label
    )


def _legend(entries: Sequence[tuple[str, str, int]], right: float) -> Markup:
    """Names at the top right, each beside a stroke of its own kind."""
    out, x = Markup(""), right
    for name, kind, colour in reversed(entries):
        x -= 6.6 * len(name) + 34
        stroke = '<line class="curve {}" stroke="var(--c{})" x1="{:.0f}" x2="{:.0f}" y1="8" y2="8"/>'
        out += Markup(stroke).format(kind, colour % COLOURS, x, x + 20)
        out += Markup('<text class="tick" x="{:.0f}" y="12">{}</text>').format(x + 25, name)
    return out


def _squares(names: Sequence[str]) -> Markup:
    out = Markup("")
    for i, name in enumerate(names):
        x, y = 170 + 104 * (i % 5), 4 + 16 * (i // 5)
        square = '<rect x="{}" y="{}" width="10" height="10" fill="var(--c{})"/>'
        out += Markup(square).format(x, y, i % COLOURS)
        out += Markup('<text class="tick" x="{}" y="{}">{}</text>').format(x + 15, y + 9, _short(name, 14))
    return out


def _short(name: str, limit: int = 25) -> Markup:
    return escape(name if len(name) <= limit else name[: limit - 1] + "…")


def _scale(low: float, high: float, start: float, end: float):
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers that cover [low, high]: steps of 1, 2 or 5 times a power of ten."""
    if high - low < 1e-9:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]
