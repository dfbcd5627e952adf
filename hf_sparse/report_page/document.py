"""A page as data: sections of text, tables and figures, which HTML and Markdown are written from.

All text is plain: it may come from anywhere, and each writer escapes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from hf_sparse.report_page.charts import Chart


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Note:
    """A paragraph that must not be missed, such as that two numbers do not compare."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells under titles; the first cell of a row names it."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: bool = False
    """Whether the cells are words and not numbers, which are aligned right."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart, what it says in words, and the table of its numbers."""

    chart: Chart
    caption: str
    table: Table


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The few numbers that a reader came for."""

    numbers: tuple[tuple[str, str, str], ...]
    """What, how much, and a few words on it, or none."""


Part: TypeAlias = Text | Note | Table | Figure | Headline


@dataclass(frozen=True, kw_only=True)
class Section:
    """Parts under a heading."""

    heading: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class Document:
    """The whole page."""

    title: str
    summary: str
    """One sentence, for the head of the page."""
    sections: tuple[Section, ...]
    footer: str


def capitalised(text: str) -> str:
    """``text`` as a sentence begins."""
    return text[:1].upper() + text[1:]


def clean(text: str) -> str:
    """``text`` without what a reader cannot see or a file cannot hold, each such character being U+FFFD.

    Names of models and files may have control characters, halves of surrogate pairs, and marks that turn the
    direction of what follows.
    """
    return "".join("\ufffd" if _is_hidden(one) else one for one in " ".join(text.split()))


def _is_hidden(character: str) -> bool:
    code = ord(character)
    turns = code in (0x061C, 0x200E, 0x200F) or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069
    return code < 0x20 or 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000 or turns or code in (0xFFFE, 0xFFFF)
