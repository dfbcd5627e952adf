"""What a chart shows, as numbers: :mod:`hf_sparse.report_page.svg` draws it, and a table says the same.

Bars begin at zero, for their length is what is read. Points need not, and say where they begin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Style = Literal["main", "other", "faint", "dashed"]
"""How a series looks, never by colour alone: filled, outlined, thin, or dashed."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """Numbers at the places along the horizontal axis; None where there is none."""

    name: str
    """For the legend; empty for a series that has no entry there."""
    values: tuple[float | None, ...]
    style: Style = "main"


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What every chart has."""

    title: str
    """What it shows, in a few words: its name for a screen reader."""
    y_label: str
    """With the unit."""
    x_label: str


@dataclass(frozen=True, kw_only=True)
class Bars(Chart):
    """Columns from zero, several side by side at each place."""

    places: tuple[str, ...]
    """Their names, the whole of them."""
    series: tuple[Series, ...]
    top: float | None = None
    """Where the vertical axis ends; None: a round number above the largest value."""
    numbered: bool = True
    """Whether the axis counts the places from 0 and not their names."""
    reference: float | None = None
    """A line across, such as 1 for as fast as dense."""


@dataclass(frozen=True, kw_only=True)
class Ranges(Chart):
    """At each place a low, a middle and a high share in percent, 0 to 100."""

    places: tuple[str, ...]
    values: tuple[tuple[float, float, float] | None, ...]


@dataclass(frozen=True, kw_only=True)
class Lines(Chart):
    """Shares in percent, 0 to 100, at places of equal distance."""

    places: tuple[str, ...]
    series: tuple[Series, ...]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One mark of :class:`Points`."""

    label: str
    """A letter or number that stands beside it, and in the table."""
    name: str
    x: float
    y: float
    main: bool = False
    """Whether it is what the page is about; it is filled, and the others are not."""


@dataclass(frozen=True, kw_only=True)
class Points(Chart):
    """Marks with a label each, over two axes that need not begin at zero."""

    points: tuple[Point, ...]
    front: tuple[Point, ...] = ()
    """Those that a line joins."""
