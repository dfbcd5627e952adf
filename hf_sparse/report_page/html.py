"""A :class:`Document` as one HTML file: nothing is loaded, nothing runs, and it reads without a picture."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from pathlib import Path

from hf_sparse.report_page.charts import Bars, Lines, Points, Ranges
from hf_sparse.report_page.document import (
    Document,
    Figure,
    Headline,
    Note,
    Part,
    Section,
    Table,
    Text,
    capitalised,
)
from hf_sparse.report_page.svg import draw, legend, text_of

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""So that a browser loads and runs nothing, whatever is in the page."""


def write_html(document: Document) -> str:
    """The text of the file."""
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    ids = count(1)
    sections = [_section(one, number, ids) for number, one in enumerate(document.sections, 1)]
    links = "".join(
        f'<li><a href="#section-{number}">{text_of(one.heading)}</a></li>'
        for number, one in enumerate(document.sections, 1)
    )
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f'<meta name="description" content="{text_of(document.summary)}">',
        f"<title>{text_of(document.title)}</title>",
        f"<style>\n{style}</style>",
        "</head>",
        "<body>",
        "<header>",
        f"<h1>{text_of(document.title)}</h1>",
        f"<p>{text_of(document.summary)}</p>",
        f'<nav aria-label="Contents"><ul>{links}</ul></nav>',
        "</header>",
        "<main>",
        *sections,
        "</main>",
        f"<footer><p>{text_of(document.footer)}</p></footer>",
        "</body>",
        "</html>",
    ]
    return "\n".join(lines) + "\n"


def _section(section: Section, number: int, ids: Iterable[int]) -> str:
    name = f"section-{number}"
    parts = [_part(one, ids) for one in section.parts]
    return "\n".join(
        [
            f'<section aria-labelledby="{name}">',
            f'<h2 id="{name}">{text_of(section.heading)}</h2>',
            *parts,
            "</section>",
        ]
    )


def _part(part: Part, ids: Iterable[int]) -> str:
    match part:
        case Text():
            return f"<p>{text_of(part.text)}</p>"
        case Note():
            return f'<p class="note"><strong>Note:</strong> {text_of(part.text)}</p>'
        case Table():
            return _table(part)
        case Headline():
            items = "".join(
                f"<div><dt>{text_of(what)}</dt><dd>{text_of(number)}</dd>"
                + (f'<dd class="beside">{text_of(words)}</dd>' if words else "")
                + "</div>"
                for what, number, words in part.numbers
            )
            return f'<dl class="headline">{items}</dl>'
        case Figure():
            return _figure(part, f"figure-{next(iter(ids))}")


def _figure(figure: Figure, name: str) -> str:
    marks = "".join(f"<li>{swatch} {text_of(what)}</li>" for swatch, what in legend(figure.chart))
    return "\n".join(
        [
            "<figure>",
            f"<h3>{text_of(figure.chart.title)}</h3>",
            f'<ul class="legend">{marks}</ul>' if marks else "",
            draw(figure.chart, name, described(figure.chart)),
            f"<figcaption>{text_of(figure.caption)}</figcaption>",
            "</figure>",
            f"<details><summary>The numbers: {text_of(figure.table.caption)}</summary>",
            _table(figure.table, caption_shown=False),
            "</details>",
        ]
    )


def _table(table: Table, *, caption_shown: bool = True) -> str:
    kind = ' class="words"' if table.words else ""
    hidden = "" if caption_shown else ' class="unseen"'
    caption = text_of(capitalised(table.caption))
    head = "".join(f'<th scope="col">{text_of(one) or _EMPTY}</th>' for one in table.head)
    rows = [
        f'<tr><th scope="row">{text_of(row[0])}</th>'
        + "".join(f"<td>{text_of(cell) or _EMPTY}</td>" for cell in row[1:])
        + "</tr>"
        for row in table.rows
    ]
    return "\n".join(
        [
            # A box that scrolls by itself, and so can be reached with the keyboard.
            f'<div class="scroll" role="region" tabindex="0" aria-label="Table: {caption}">',
            f"<table{kind}><caption{hidden}><span>{caption}</span></caption>",
            f"<thead><tr>{head}</tr></thead>",
            "<tbody>",
            *rows,
            "</tbody></table></div>",
        ]
    )


_EMPTY = '<span class="unseen">none</span>'
"""In a cell without text, for a screen reader."""


def described(chart: object) -> str:
    """What is to be seen in a chart, in words: how many marks, the least and the largest."""
    match chart:
        case Bars():
            parts = [_extent(one.name, one.values, chart.places) for one in chart.series]
            return f"{chart.y_label}, by {chart.x_label}. {' '.join(parts)}"
        case Lines():
            parts = [_extent(one.name, one.values, chart.places) for one in chart.series if one.name]
            return f"{chart.y_label}, by {chart.x_label}. {' '.join(parts)}"
        case Ranges():
            middles = tuple(None if one is None else one[1] for one in chart.values)
            return f"{chart.y_label}, by {chart.x_label}. {_extent('median', middles, chart.places)}"
        case Points():
            marks = "; ".join(f"{one.label}: {one.name}, {one.x:.2f}, {one.y:.4g}" for one in chart.points)
            return f"{chart.y_label} over {chart.x_label}. {marks}."
        case _:
            raise TypeError(f"{type(chart).__name__} is no chart that can be described.")


def _extent(name: str, values: tuple[float | None, ...], places: tuple[str, ...]) -> str:
    known = [(value, place) for value, place in zip(values, places, strict=True) if value is not None]
    of = f"{name}: " if name else ""
    if not known:
        return f"{of}no values."
    (low, at_low), (high, at_high) = min(known), max(known)
    return f"{of}from {low:.2f} ({at_low}) to {high:.2f} ({at_high})."
