"""Charts as SVG, coloured by charts.css, so that they read well in light and in dark: inline in HTML, or as a file.

A chart is some 340 units wide and is shown at about that many pixels, on a phone too: text keeps its size, and a page
puts charts side by side instead of making one wide. Names from a run are escaped here; everything else is a number.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files

from markupsafe import Markup

from ray_pipeline.report.escaping import markup, one_line, short
from ray_pipeline.stats.bootstrap import Interval

WIDTH, HEIGHT = 340, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 36
_ROW = 40  # a row of a dot or bar chart: a line for its name, a line for its marks
_PAD = 14  # around a chart that is a file of its own
#: Maximum number of points of a line: more cannot be distinguished on 284 pixels.
_MOST_POINTS = 400


@dataclass(frozen=True)
class Chart:
    """A drawing of `width` × `height` with its title; `legend` is (CSS class of a colour, name)."""

    title: str
    svg: Markup
    height: int
    legend: Sequence[tuple[str, str]] = ()
    note: str = ""
    width: int = WIDTH


@dataclass(frozen=True)
class Series:
    """Points of a line in the order of x; `marks` are points of it to point out."""

    name: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False
    marks: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Bins:
    """A histogram: `edges` has one more number than `counts`."""

    name: str
    colour: str
    edges: Sequence[float]
    counts: Sequence[float]


@dataclass(frozen=True)
class Dot:
    """An estimate with its interval."""

    name: str
    colour: str
    estimate: Interval


def histogram(title: str, bins: Sequence[Bins], x_title: str, *, shares: bool = False, note: str = "") -> Chart | None:
    """Counts, or with `shares` each histogram as shares of its own sum, so that a small class can be seen.

    None where there is nothing to count.
    """
    bins = [b for b in bins if sum(b.counts) > 0]
    if not bins:
        return None
    heights = [[c / sum(b.counts) if shares else c for c in b.counts] for b in bins]
    low, high = min(b.edges[0] for b in bins), max(b.edges[-1] for b in bins)
    x = _scale(low, high, _LEFT, WIDTH - _RIGHT)
    top = max(map(max, heights)) * 1.05
    y = _scale(0.0, top, HEIGHT - _BOTTOM, _TOP)
    marks = []
    for b, tall in zip(bins, heights, strict=True):
        steps = "".join(f"V{y(h):.1f}H{x(right):.1f}" for h, right in zip(tall, b.edges[1:], strict=True))
        path = f"M{x(b.edges[0]):.1f} {y(0):.1f}{steps}V{y(0):.1f}Z"
        marks.append(f'<path class="area {b.colour}" d="{path}"/>')
    percent = _percent if shares else _plain
    svg = _axes(x, y, _ticks(low, high, 7), _ticks(0, top, 4), x_title, y_text=percent) + Markup("".join(marks))
    legend = [(b.colour, b.name) for b in bins] if len(bins) > 1 else []
    return Chart(title, _svg(HEIGHT, title, svg), HEIGHT, legend, note)


def bars(title: str, values: dict[int, int], ends: tuple[int, int], top: int, x_title: str) -> Chart:
    """How often each whole number from `ends[0]` to `ends[1]` occurs; `top` is the end of the y axis."""
    x = _scale(ends[0] - 0.6, ends[1] + 0.6, _LEFT, WIDTH - _RIGHT)
    y = _scale(0.0, top * 1.05 or 1.0, HEIGHT - _BOTTOM, _TOP)
    drawn = "".join(
        f'<rect class="fill blue" x="{x(value - 0.42):.1f}" y="{y(count):.1f}" '
        f'width="{x(0.84) - x(0):.1f}" height="{y(0) - y(count):.1f}"/>'
        for value, count in values.items()
    )
    numbers = [float(v) for v in range(ends[0], ends[1] + 1) if (ends[1] - ends[0]) <= 12 or v % 10 == 0]
    svg = _axes(x, y, numbers, _ticks(0, top, 4), x_title)
    return Chart(title, _svg(HEIGHT, title, svg + Markup(drawn)), HEIGHT)


def lines(title: str, series: Sequence[Series], x_title: str, *, note: str = "") -> Chart | None:
    """Lines over a shared x; None where no series has a point."""
    series = [_thinned(s) for s in series if len(s.x)]
    if not series:
        return None
    xs, ys = [v for s in series for v in s.x], [v for s in series for v in s.y]
    x = _scale(min(xs), max(xs), _LEFT, WIDTH - _RIGHT)
    pad = (max(ys) - min(ys)) * 0.06
    low, high = min(ys) - pad, max(ys) + pad
    y = _scale(low, high, HEIGHT - _BOTTOM, _TOP)
    drawn = []
    for s in series:
        points = [f"{x(a):.1f},{y(b):.1f}" for a, b in zip(s.x, s.y, strict=True)]
        dashed = ' stroke-dasharray="5 4"' if s.dashed else ""
        drawn.append(f'<polyline class="line {s.colour}"{dashed} points="{" ".join(points)}"/>')
        if len(points) < 30:  # a run of a few steps is a few points: a single one would not show as a line
            for point in points:
                a, b = point.split(",")
                drawn.append(f'<circle class="fill {s.colour}" cx="{a}" cy="{b}" r="2.6"/>')
        drawn += [f'<circle class="fill {s.colour}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="5"/>' for a, b in s.marks]
    svg = _axes(x, y, _ticks(min(xs), max(xs), 5), _ticks(low, high, 5), x_title) + Markup("".join(drawn))
    legend = [(s.colour, s.name) for s in series] if len(series) > 1 else []
    return Chart(title, _svg(HEIGHT, title, svg), HEIGHT, legend, note)


def dots(
    title: str,
    rows: Sequence[tuple[str, Sequence[Dot]]],
    ends: tuple[float, float],
    *,
    shares: bool = True,
    line: tuple[float, str] | None = None,
    note: str = "",
) -> Chart | None:
    """Estimates with intervals, one row per name; `line` marks a value and names it (no change, or the base)."""
    rows = [(name, [d for d in found if d.estimate.mean is not None]) for name, found in rows]
    rows = [(name, found) for name, found in rows if found]
    if not rows:
        return None
    text = _percent if shares else (lambda v: f"{v:.3g}")
    x = _scale(*ends, 12, WIDTH - 46)
    heights = [24 + 15 * len(found) for _, found in rows]
    bottom = sum(heights) + 4
    drawn = [_vertical(x(t), 0, bottom, "grid") + _text(x(t), bottom + 14, text(t), "middle") for t in _ticks(*ends, 5)]
    if line is not None:
        drawn.append(_vertical(x(line[0]), 0, bottom, "mark"))
    place = 0.0
    for (name, found), height in zip(rows, heights, strict=True):
        drawn.append(_text(2, place + 14, short(name, 46), "start", "name"))
        for i, dot in enumerate(found):
            drawn.append(_dot(dot, x, place + 25 + 15 * i, text))
        place += height
    names = {d.name: d.colour for _, found in rows for d in found}
    legend = [(colour, name) for name, colour in names.items()] if len(names) > 1 else []
    if line is not None:
        legend.append(("mark", line[1]))
    height = int(bottom) + 22
    return Chart(title, _svg(height, title, Markup("".join(drawn))), height, legend, note)


def stacked(
    title: str, rows: Sequence[tuple[str, Sequence[tuple[str, float]], Interval]], names: Sequence[tuple[str, str]]
) -> Chart | None:
    """Shares that add up to one, one bar per row, with a dot and its interval above; `names` are the legend's."""
    if not rows:
        return None
    x = _scale(0.0, 1.0, 8, WIDTH - 20)
    bottom = (_ROW + 14) * len(rows) + 2
    drawn = [_vertical(x(t), 0, bottom, "grid") + _text(x(t), bottom + 14, _percent(t), "middle") for t in _fifths()]
    for i, (name, parts, score) in enumerate(rows):
        top, left = (_ROW + 14) * i, 0.0
        drawn.append(_text(2, top + 13, short(name, 46), "start", "name"))
        for colour, share in parts:
            wide = x(share) - x(0)
            drawn.append(
                f'<rect class="fill {colour}" x="{x(left):.1f}" y="{top + 30}" width="{wide:.1f}" height="18"/>'
            )
            if share >= 0.1:  # a smaller part has no room for its number
                drawn.append(_text(x(left) + wide / 2, top + 43, f"{share:.0%}", "middle", f"on {colour}"))
            left += share
        if score.mean is not None:
            drawn.append(_dot(Dot("", "ink", score), x, top + 23, None))
    drawn.append(_vertical(x(0.5), 0, bottom, "mark"))
    return Chart(title, _svg(bottom + 22, title, Markup("".join(drawn))), bottom + 22, names)


def heat_map(
    title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[tuple[float | None, str, str] | None]]]
) -> Chart:
    """Cells of (value from −1 to 1 or None, text, smaller text below), coloured by their value; None is left out."""
    left, head, wide, tall = 132, 70, 74, 34
    drawn = []
    for place, column in enumerate(columns):
        x = left + wide * (place + 0.4)
        turned = f'transform="rotate(-25 {x:.1f} {head - 6})"'
        drawn.append(_text(x, head - 6, short(column, 24), "start", "name").replace("<text", f"<text {turned}", 1))
    for down, (name, cells) in enumerate(rows):
        y = head + tall * down
        drawn.append(_text(left - 6, y + 20, short(name, 20), "end", "name"))
        for across, cell in enumerate(cells):
            if cell is None:
                continue
            value, text, below = cell
            x = left + wide * across
            colour = "grey" if value is None else "vermilion" if value < 0 else "blue"
            strength = 0.1 if value is None else 0.55 * min(1.0, abs(value))
            box = f'x="{x + 1}" y="{y + 1}" width="{wide - 2}" height="{tall - 2}" rx="4"'
            drawn.append(f'<rect class="fill {colour}" fill-opacity="{strength:.2f}" {box}/>')
            drawn.append(_text(x + wide / 2, y + (15 if below else 21), text, "middle", "name"))
            if below:
                drawn.append(_text(x + wide / 2, y + 28, short(below, 15), "middle", "small"))
    width, height = left + wide * len(columns) + 70, head + tall * len(rows) + 4
    return Chart(title, _svg(height, title, Markup("".join(drawn)), width), height, width=width)


def standalone(chart: Chart) -> str:
    """The chart as an SVG file: title above, legend and note below, with colours and ground of its own."""
    width = chart.width + 2 * _PAD
    title = textwrap.wrap(one_line(chart.title), chart.width // 7, max_lines=3, placeholder="…")
    top = _PAD + 16 * len(title)
    drawn = [_text(_PAD, _PAD + 6 + 16 * i, line, "start", "title") for i, line in enumerate(title)]
    place = f'x="{_PAD}" y="{top}" width="{chart.width}" height="{chart.height}"'
    drawn.append(str(chart.svg).replace("<svg ", f"<svg {place} ", 1))  # Markup.replace would escape
    y, x = top + chart.height + 14, _PAD
    for colour, name in chart.legend:
        text = short(name, 48)
        taken = 20 + 6.2 * len(text)
        if x > _PAD and x + taken > width - _PAD:
            x, y = _PAD, y + 16
        drawn += [_swatch(colour, x, y), _text(x + 14, y, text, "start")]
        x += int(taken)
    y += 16 if chart.legend else 0
    for line in textwrap.wrap(one_line(chart.note), chart.width // 6):
        drawn.append(_text(_PAD, y, line, "start"))
        y += 14
    height = y - 6
    style = files("ray_pipeline.report").joinpath("charts.css").read_text(encoding="utf-8")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f"font-family=\"system-ui, 'DejaVu Sans', sans-serif\">\n<style>\n{style}</style>\n"
        f'<rect class="fill card" width="{width}" height="{height}" rx="8"/>\n{"".join(drawn)}\n</svg>\n'
    )


def _swatch(colour: str, x: float, y: float) -> str:
    if colour == "mark":
        return _vertical(x + 5, y - 9, y + 1, "mark")
    if colour == "ink":
        return f'<circle class="fill ink" cx="{x + 5}" cy="{y - 4}" r="4"/>'
    return f'<rect class="fill {colour}" x="{x}" y="{y - 9}" width="9" height="9" rx="2"/>'


# --- parts ------------------------------------------------------------------------------------------------------------


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """A linear map of [low, high] to [start, end]; a single value lies in the middle."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 round numbers within [low, high]."""
    if high <= low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 2.5, 5, 10):
        if (high - low) / (step * factor) <= most:
            step *= factor
            break
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) + 0.0 for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _fifths() -> list[float]:
    return [0.0, 0.25, 0.5, 0.75, 1.0]


def _axes(
    x: Callable[[float], float],
    y: Callable[[float], float],
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_title: str,
    y_text: Callable[[float], str] | None = None,
) -> Markup:
    y_text = y_text or _plain
    drawn = []
    for tick in y_ticks:
        drawn.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        drawn.append(_text(_LEFT - 5, y(tick) + 3.5, y_text(tick), "end"))
    drawn += [_text(x(tick), HEIGHT - _BOTTOM + 14, _plain(tick), "middle") for tick in x_ticks]
    drawn.append(_text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 6, x_title, "middle"))
    return Markup("".join(drawn))


def _dot(dot: Dot, x: Callable[[float], float], y: float, text: Callable[[float], str] | None) -> str:
    found = dot.estimate
    assert found.mean is not None
    drawn = ""
    end = x(found.mean)
    if found.low is not None and found.high is not None:
        low, high = x(found.low), x(found.high)
        end = max(end, high)
        drawn = (
            f'<path class="line {dot.colour}" d="M{low:.1f} {y - 4}v8M{low:.1f} {y}H{high:.1f}M{high:.1f} {y - 4}v8"/>'
        )
    drawn += f'<circle class="fill {dot.colour}" cx="{x(found.mean):.1f}" cy="{y}" r="4"/>'
    return drawn + (_text(end + 7, y + 3.5, text(found.mean), "start") if text else "")


def _vertical(x: float, top: float, bottom: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text{name} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{markup(text)}</text>'


def _svg(height: int, title: str, inner: Markup, width: int = WIDTH) -> Markup:
    label = markup(one_line(title))
    return Markup(f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{inner}</svg>')


def _plain(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value / 1000:.3g}k"
    return f"{value:.3g}"


def _percent(value: float) -> str:
    shown = f"{100 * value:.1f}".rstrip("0").rstrip(".")
    return f"{shown}%"


def _thinned(series: Series) -> Series:
    """Every n-th point and the last, so that a run of 100,000 steps does not weigh on the page."""
    step = -(-len(series.x) // _MOST_POINTS)
    keep = sorted({*range(0, len(series.x), step), len(series.x) - 1})
    return replace(series, x=[series.x[i] for i in keep], y=[series.y[i] for i in keep])
