"""Draws charts as inline SVG that fits any width: across in percent, up and down and text in pixels.

So text is as large on a phone as on a desk. Colours and widths are classes of ``style.css``; no script, and
nothing is loaded. What lies left of the axis and under it is drawn beyond the edges, in margins of the style.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise

from hf_sparse.report_page.axes import PERCENT, Axis, around, from_zero
from hf_sparse.report_page.charts import Bars, Chart, Lines, Points, Ranges, Series
from hf_sparse.report_page.document import clean

HEIGHT = 200
"""Of the area between the axes, in pixels."""
_MOST_VALUES = 12
"""Up to so many bars have their values written above them."""
_LABEL_PLACES = ((9, 4, "start"), (-9, 4, "end"), (0, -11, "middle"), (0, 20, "middle"))
"""Where the label of a point may stand: right, left, above, below."""
_NARROW = 260
"""Pixels that a chart is wide on a small phone, for what must not overlap there."""


def draw(chart: Chart, name: str, description: str) -> str:
    """The ``<svg>`` of a chart.

    Args:
        chart: what to draw.
        name: for its ids, each once on a page.
        description: what is to be seen, in words.

    """
    body = {Bars: _bars, Ranges: _ranges, Lines: _lines, Points: _points}[type(chart)](chart)  # type: ignore[operator]
    return "\n".join(
        [
            f'<svg class="plot" role="img" width="100%" height="{HEIGHT}" '
            f'aria-labelledby="{name}-title" aria-describedby="{name}-desc">',
            f'<title id="{name}-title">{text_of(chart.title)}</title>',
            f'<desc id="{name}-desc">{text_of(description)}</desc>',
            *body,
            _label(f"{chart.y_label}", "0", -16, "start", "axis", dx=-40),
            _label(chart.x_label, "50%", HEIGHT + 42, "middle", "axis"),
            "</svg>",
        ]
    )


def legend(chart: Chart) -> list[tuple[str, str]]:
    """Swatches as SVG, and what each means; empty where there is nothing to tell apart."""
    if isinstance(chart, Ranges):
        return [
            (_swatch('<line class="range" x1="10" y1="1" x2="10" y2="15"/>'), "5 % to 95 % of the tokens"),
            (_swatch('<circle class="main" cx="10" cy="8" r="4.5"/>'), "median token"),
        ]
    if isinstance(chart, Points):
        shown = [("main", "this model"), ("other", "other reports")]
        found = [(_swatch(f'<circle class="{c}" cx="10" cy="8" r="5"/>'), name) for c, name in shown]
        front = '<line class="dashed" x1="1" y1="8" x2="19" y2="8"/>'
        return found + ([(_swatch(front), "no other is both sparser and better")] if chart.front else [])
    if isinstance(chart, Bars | Lines):
        named = [one for one in chart.series if one.name]
        bars = isinstance(chart, Bars)
        return [(_swatch(_sample(one, bars)), one.name) for one in named] if len(chart.series) > 1 else []
    raise TypeError(f"{type(chart).__name__} is no chart that can be drawn.")


def text_of(text: str) -> str:
    """``text`` for the inside of an element or a quoted attribute."""
    return escape(clean(text), quote=True)


# ---- charts


def _bars(chart: Bars) -> Iterable[str]:
    values = [v for one in chart.series for v in one.values if v is not None]
    largest = max([*values, chart.reference or 0.0])
    axis = PERCENT if chart.top == 100 else from_zero(max(largest, 1.0))
    yield from _across(axis)
    slot = 100 / len(chart.places)
    width = slot * (0.72 if len(chart.series) > 1 else 0.66) / len(chart.series)
    few = len(chart.places) * len(chart.series) <= _MOST_VALUES
    for index, place in enumerate(chart.places):
        for number, series in enumerate(chart.series):
            value = series.values[index]
            if value is None:
                continue
            x = (index + 0.5) * slot + (number - len(chart.series) / 2) * width
            y = _y(axis, value)
            of = f"{series.name}, {place}" if series.name else place
            told = f"<title>{text_of(of)}: {_short(value, 2)}</title>"
            yield (
                f'<rect class="{series.style}" x="{x:.3f}%" y="{y:.1f}" width="{width * 0.94:.3f}%" '
                f'height="{HEIGHT - y:.1f}">{told}</rect>'
            )
            if few:
                yield _label(
                    _short(value, 2 if axis.high < 10 else 0), f"{x + width * 0.47:.3f}%", y - 5, "middle"
                )
    if chart.reference is not None:
        y = _y(axis, chart.reference)
        for style in ("casing", "reference"):  # so that it shows on bars of any colour
            yield f'<line class="{style}" x1="0" y1="{y:.1f}" x2="100%" y2="{y:.1f}"/>'
    yield from _below(chart.places, slot, numbered=chart.numbered)


def _ranges(chart: Ranges) -> Iterable[str]:
    yield from _across(PERCENT)
    slot = 100 / len(chart.places)
    for index, (place, value) in enumerate(zip(chart.places, chart.values, strict=True)):
        if value is None:
            continue
        low, middle, high = (_y(PERCENT, one) for one in value)
        x = f"{(index + 0.5) * slot:.3f}%"
        numbers = ", ".join(f"{one:.2f}" for one in value)
        yield f"<g><title>{text_of(place)}: {numbers}</title>"
        yield f'<line class="range" x1="{x}" y1="{low:.1f}" x2="{x}" y2="{high:.1f}"/>'
        radius = 4.5 if len(chart.places) <= 40 else 3
        yield f'<circle class="main" cx="{x}" cy="{middle:.1f}" r="{radius}"/></g>'
    yield from _below(chart.places, slot, numbered=True)


def _lines(chart: Lines) -> Iterable[str]:
    yield from _across(PERCENT)
    last = max(1, len(chart.places) - 1)
    order = sorted(chart.series, key=lambda one: ("faint", "dashed", "other", "main").index(one.style))
    for series in order:
        known = [(100 * i / last, v) for i, v in enumerate(series.values) if v is not None]
        yield f"<g><title>{text_of(series.name)}</title>" if series.name else "<g>"
        for begin, end in pairwise((x, _y(PERCENT, v)) for x, v in known):
            yield _segment(begin, end, series.style)
        if series.style in ("main", "other"):
            yield from (
                f'<circle class="{series.style}" cx="{x:.3f}%" cy="{_y(PERCENT, v):.1f}" r="4"/>'
                for x, v in known
            )
        yield "</g>"
        if series.style == "main":
            for i, (x, v) in enumerate(known):
                anchor = "start" if i == 0 else "end" if x > 99 else "middle"
                y = _y(PERCENT, v)
                y += 20 if y < HEIGHT - 30 else -10  # under the line: what is dashed lies above it
                yield _label(f"{v:.0f}", f"{x:.3f}%", y, anchor, "value")
    for i, place in enumerate(chart.places):
        yield _label(place, f"{100 * i / last:.3f}%", HEIGHT + 18, "middle")


def _points(chart: Points) -> Iterable[str]:
    x_axis = around([one.x for one in chart.points], least=0.0, most=100.0)
    y_axis = around([one.y for one in chart.points], least=0.0)
    yield from _across(y_axis)
    for tick in x_axis.ticks:
        at_tick = f"{100 * x_axis.place(tick):.3f}%"
        yield f'<line class="grid" x1="{at_tick}" y1="0" x2="{at_tick}" y2="{HEIGHT}"/>'
        yield _label(_tick(tick), at_tick, HEIGHT + 18, "middle")

    def at(one: tuple[float, float]) -> tuple[float, float]:
        return 100 * x_axis.place(one[0]), _y(y_axis, one[1])

    front = [at((one.x, one.y)) for one in chart.front]
    yield from (_segment(begin, end, "dashed") for begin, end in pairwise(front))
    placed = [(one, *at((one.x, one.y))) for one in chart.points]
    for point, x, y in sorted(placed, key=lambda one: one[0].main):  # what the page is about is on top
        told = f"<title>{text_of(point.name)}: {_short(point.x, 2)}, {point.y:.4g}</title>"
        style = "main" if point.main else "other"
        yield f'<circle class="{style}" cx="{x:.3f}%" cy="{y:.1f}" r="5.5">{told}</circle>'
    taken = [(x * _NARROW / 100, y) for _, x, y in placed]
    for point, x, y in placed:
        dx, dy, anchor = max(_LABEL_PLACES, key=lambda one: _room(x, y, one[0], one[1], taken))
        taken.append((x * _NARROW / 100 + 1.3 * dx, y + dy - 4))
        yield _label(point.label, f"{x:.3f}%", y + dy, anchor, "value", dx=dx)


def _room(x: float, y: float, dx: int, dy: int, taken: Sequence[tuple[float, float]]) -> float:
    """How far a label there is from what is drawn, at most enough for it."""
    px, py = x * _NARROW / 100 + 1.3 * dx, y + dy - 4
    return min([14.0, *(max(abs(px - a), abs(py - b)) for a, b in taken)])


# ---- parts of them


def _across(axis: Axis) -> Iterable[str]:
    """Lines across, each with its number."""
    for tick in axis.ticks:
        y = _y(axis, tick)
        style = "base" if tick == axis.low and tick == 0 else "grid"
        yield f'<line class="{style}" x1="0" y1="{y:.1f}" x2="100%" y2="{y:.1f}"/>'
        yield _label(_tick(tick), "0", y + 4, "end", dx=-8)


def _below(places: Sequence[str], slot: float, *, numbered: bool) -> Iterable[str]:
    count = len(places)
    step = 1 if not numbered else next(s for s in (1, 2, 5, 10, 20, 50, 100, count) if count <= 10 * s)
    for index in range(0, count, step):
        label = str(index) if numbered else places[index]
        yield _label(label, f"{(index + 0.5) * slot:.3f}%", HEIGHT + 18, "middle")


def _label(text: str, x: str, y: float, anchor: str, style: str = "tick", *, dx: float = 0) -> str:
    moved = f' dx="{dx:g}"' if dx else ""
    return f'<text class="{style}" x="{x}" y="{y:.1f}"{moved} text-anchor="{anchor}">{text_of(text)}</text>'


def _segment(begin: tuple[float, float], end: tuple[float, float], style: str) -> str:
    (x1, y1), (x2, y2) = begin, end
    return f'<line class="line {style}" x1="{x1:.3f}%" y1="{y1:.1f}" x2="{x2:.3f}%" y2="{y2:.1f}"/>'


def _swatch(inner: str) -> str:
    return f'<svg class="swatch" width="20" height="16" aria-hidden="true" focusable="false">{inner}</svg>'


def _sample(series: Series, bars: bool) -> str:
    if bars:
        return f'<rect class="{series.style}" x="3" y="2" width="14" height="12"/>'
    line = f'<line class="line {series.style}" x1="1" y1="8" x2="19" y2="8"/>'
    dot = f'<circle class="{series.style}" cx="10" cy="8" r="4"/>'
    return line + (dot if series.style in ("main", "other") else "")


def _y(axis: Axis, value: float) -> float:
    return HEIGHT * (1 - min(max(axis.place(value), 0.0), 1.0))


def _tick(value: float) -> str:
    return f"{value:.6g}" if abs(value) < 1e6 else f"{value:.0e}"


def _short(value: float, digits: int) -> str:
    return f"{value:.{digits}f}"
