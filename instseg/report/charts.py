"""Small charts as inline SVG, each a figure with its title and legend; all text is plain and is escaped here.

They are drawn for a phone's width, and are readable there and larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from matplotlib.colors import to_hex

from instseg.report.colours import PALETTE

WIDTH = 360.0  # of a chart, in CSS pixels on a phone
COLOURS = tuple(to_hex(PALETTE[index]) for index in (1, 6, 2, 4, 3, 5, 0, 7))  # neighbours are far apart
_LEFT, _RIGHT, _TOP, _BOTTOM = 38.0, 10.0, 8.0, 34.0  # margins of a plot
_HEIGHT = 230.0
_NAMES = 152.0  # width of the column of names beside bars
_MAX_NAME = 24  # characters of a name; its title has all of it


class Axis(NamedTuple):
    """What an axis says and from where to where it goes; `ticks` get a number."""

    title: str
    low: float
    high: float
    ticks: Sequence[float]


class Series(NamedTuple):
    """One curve, or points alone.

    Attributes:
        name: In the legend; "" to be left out of it.
        points: (x, y); those that are not finite are left out.
        colour: As in HTML.
        hollow: Rings without a line, rather than a line.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    hollow: bool = False


class Bars(NamedTuple):
    """One value for each name of a bar chart; NaN has no bar."""

    name: str
    values: Sequence[float]
    colour: str


def lines(title: str, series: Sequence[Series], x: Axis, y: Axis) -> str:
    """Curves over a common pair of axes."""
    plot = _Plot(x, y)
    drawn = "".join(_rings(plot, one) if one.hollow else _curve(plot, one) for one in series)
    legend = [(one.name, one.colour, one.hollow) for one in series if one.name]
    return _figure(title, plot.height, plot.frame() + drawn, legend)


def columns(title: str, heights: Sequence[float], x: Axis, y: Axis, colour: str, diagonal: bool = False) -> str:
    """Upright bars of equal width from one end of the x axis to the other; with a line from corner to corner."""
    plot = _Plot(x, y)
    step = (x.high - x.low) / max(len(heights), 1)
    drawn = ""
    for index, height in enumerate(heights):
        if np.isfinite(height):
            left, right = plot.at_x(x.low + (index + 0.08) * step), plot.at_x(x.low + (index + 0.92) * step)
            top, bottom = plot.at_y(height), plot.at_y(y.low)
            drawn += _rectangle(left, top, right - left, bottom - top, colour, f"{height:.3g}")
    if diagonal:
        ends = [plot.at_x(x.low), plot.at_y(y.low), plot.at_x(x.high), plot.at_y(y.high)]
        drawn += '<line class="guide" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>'.format(*ends)
    return _figure(title, plot.height, plot.frame() + drawn, [])


def bars(title: str, names: Sequence[str], groups: Sequence[Bars], form: str = ".1f") -> str:
    """Lying bars from zero, one of each group beside each name, with their values; negative ones go to the left.

    Args:
        title: Of the chart.
        names: N.
        groups: Of N values each.
        form: Of the numbers, as in a format string.
    """
    thick, gap = (14.0, 8.0) if len(groups) == 1 else (12.0, 9.0)
    values = np.array([group.values for group in groups], np.float64)
    low, high = min(np.nanmin(values, initial=0.0), 0.0), max(np.nanmax(values, initial=0.0), 0.0)
    scale = (WIDTH - _NAMES - 2 * 40.0) / ((high - low) or 1.0)
    zero = _NAMES + 6 - scale * low + (34.0 if low < 0 else 0.0)
    drawn = ""
    for row, name in enumerate(names):
        top = row * (len(groups) * thick + gap) + gap / 2
        middle = top + len(groups) * thick / 2
        drawn += _text(_NAMES, middle + 4, _short(name), "end", "name", name)
        for index, group in enumerate(groups):
            drawn += _bar(zero, top + index * thick, thick - 1, scale, group.values[row], group.colour, form)
    height = len(names) * (len(groups) * thick + gap)
    drawn += f'<line class="axis" x1="{zero:.1f}" y1="0" x2="{zero:.1f}" y2="{height:.1f}"/>'
    legend = [(group.name, group.colour, False) for group in groups] if len(groups) > 1 else []
    return _figure(title, height, drawn, legend)


def matrix(title: str, names: Sequence[str], shares: np.ndarray, colour: str) -> str:
    """An (N, N) matrix of values in 0..1, a row and a column for each name, the darker the larger."""
    cell, edge = 20.0, 12 + 6.2 * max(len(_short(name)) for name in names)
    size = edge + len(names) * cell
    width = max(size, WIDTH)
    drawn = ""
    for index, name in enumerate(names):
        at = edge + (index + 0.5) * cell
        drawn += _text(edge - 5, at + 4, _short(name), "end", "name", name)
        drawn += f'<g transform="translate({at + 4:.0f} {edge - 5:.0f}) rotate(-90)">{_text(0, 0, _short(name))}</g>'
    for row, column in zip(*np.nonzero(shares >= 0.0005), strict=True):
        share, x, y = float(shares[row, column]), edge + column * cell, edge + row * cell
        tip = f"{names[row]} → {names[column]}: {share:.1%}"
        drawn += _rectangle(x, y, cell - 1, cell - 1, colour, tip, 0.06 + 0.94 * share**0.5)
        if share >= 0.005:
            drawn += _text(x + cell / 2 - 0.5, y + 13, f"{100 * share:.0f}", "middle", "name")
    return f'<div class="scroll"><div style="width: {width:.0f}px">{_figure(title, size, drawn, [], width)}</div></div>'


class _Plot:
    """A frame with axes, and where a value lies in it."""

    def __init__(self, x: Axis, y: Axis) -> None:
        self.x, self.y, self.height = x, y, _HEIGHT

    def at_x(self, value: float) -> float:
        return _LEFT + (value - self.x.low) / (self.x.high - self.x.low) * (WIDTH - _LEFT - _RIGHT)

    def at_y(self, value: float) -> float:
        share = (value - self.y.low) / (self.y.high - self.y.low)
        return self.height - _BOTTOM - share * (self.height - _TOP - _BOTTOM)

    def frame(self) -> str:
        left, right, bottom = _LEFT, WIDTH - _RIGHT, self.height - _BOTTOM
        parts = [_text((left + right) / 2, self.height - 3, self.x.title, "middle")]
        parts += [_text(self.at_x(tick), bottom + 14, f"{tick:g}", "middle") for tick in self.x.ticks]
        for tick in self.y.ticks:
            y = self.at_y(tick)
            parts.append(f'<line class="axis" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
            parts.append(_text(left - 5, y + 4, f"{tick:g}", "end"))
        middle = (_TOP + bottom) / 2
        title = _text(0, 0, self.y.title, "middle")
        return "".join([*parts, f'<g transform="translate(10 {middle:.0f}) rotate(-90)">{title}</g>'])


def _curve(plot: _Plot, series: Series) -> str:
    points = " ".join(f"{plot.at_x(x):.1f},{plot.at_y(y):.1f}" for x, y in series.points if np.isfinite([x, y]).all())
    style = f'fill="none" stroke="{series.colour}" stroke-width="2" stroke-linejoin="round"'
    return f'<polyline points="{points}" {style}><title>{escape(series.name)}</title></polyline>'


def _rings(plot: _Plot, series: Series) -> str:
    return "".join(
        f'<circle cx="{plot.at_x(x):.1f}" cy="{plot.at_y(y):.1f}" r="4" fill="none" stroke="{series.colour}" '
        f'stroke-width="1.8"><title>{escape(f"{series.name}: {y:.1f}")}</title></circle>'
        for x, y in series.points
        if np.isfinite([x, y]).all()
    )


def _bar(zero: float, top: float, thick: float, scale: float, value: float, colour: str, form: str) -> str:
    if not np.isfinite(value):
        return _text(zero + 4, top + thick / 2 + 4, "–")
    width = scale * abs(value)
    left, end = (zero, zero + width + 4) if value >= 0 else (zero - width, zero - width - 4)
    number = _text(end, top + thick / 2 + 4, format(value, form), "start" if value >= 0 else "end")
    return _rectangle(left, top, width, thick, colour, format(value, form)) + number


def _rectangle(x: float, y: float, width: float, height: float, colour: str, tip: str, opacity: float = 1.0) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    faint = "" if opacity == 1 else f' fill-opacity="{opacity:.2f}"'
    return f'<rect {place} fill="{colour}"{faint}><title>{escape(tip)}</title></rect>'


def _text(x: float, y: float, content: str, anchor: str = "start", kind: str = "", tip: str = "") -> str:
    whole = f"<title>{escape(tip)}</title>" if tip and tip != content else ""
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(content)}{whole}</text>'


def _short(name: str) -> str:
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 1]}…"


def _figure(
    title: str, height: float, drawn: str, legend: Sequence[tuple[str, str, bool]], width: float = WIDTH
) -> str:
    marks = "".join(
        f'<span><i{" class=hollow" if hollow else ""} style="background: {colour}; border-color: {colour}"></i>'
        f"{escape(name)}</span>"
        for name, colour, hollow in legend
    )
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b></figcaption>'
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">{drawn}</svg>'
        + (f'<div class="legend">{marks}</div>' if marks else "")
        + "</figure>"
    )
