"""A :class:`Document` as Markdown: charts become the tables of their numbers."""

from __future__ import annotations

import re
from html import escape

from hf_sparse.markdown_table import markdown_table
from hf_sparse.report_page.document import (
    Document,
    Figure,
    Headline,
    Note,
    Part,
    Table,
    Text,
    capitalised,
    clean,
)

_MARKS = re.compile(r"([\\`*_{}\[\]#|~])")
_LINKED = re.compile(r"(?i)(?<=http):|(?<=https):|(?<=ftp):|(?<=mailto):|(?<=xmpp):|(?<=www)\.|@")


def write_markdown(document: Document) -> str:
    """The text of the file."""
    parts = [f"# {_plain(document.title)}", _plain(document.summary)]
    for section in document.sections:
        parts.append(f"## {_plain(section.heading)}")
        parts += [_part(one) for one in section.parts]
    parts.append(f"*{_plain(document.footer)}*")
    return "\n\n".join(parts) + "\n"


def _part(part: Part) -> str:
    match part:
        case Text():
            return _plain(part.text)
        case Note():
            return f"**Note:** {_plain(part.text)}"
        case Table():
            return _table(part)
        case Headline():
            return "\n".join(
                f"- {_plain(what)}: **{_plain(number)}**" + (f" ({_plain(words)})" if words else "")
                for what, number, words in part.numbers
            )
        case Figure():
            title = f"### {_plain(part.chart.title)}"
            return f"{title}\n\n{_plain(part.caption)}\n\n{_table(part.table)}"


def _table(table: Table) -> str:
    cells = [[_plain(cell) for cell in row] for row in (table.head, *table.rows)]
    return (
        f"{_plain(capitalised(table.caption))}:\n\n{markdown_table(cells[0], cells[1:], words=table.words)}"
    )


def _plain(text: str) -> str:
    """``text`` as itself: no mark of Markdown, tag, entity or link in it works."""
    told = _MARKS.sub(r"\\\1", escape(clean(text), quote=False))
    # GitHub makes links of bare addresses and names, which no backslash keeps from it.
    return _LINKED.sub(lambda found: f"&#{ord(found[0])};", told)
