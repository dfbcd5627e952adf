"""An HTML page taken apart by the parser of the standard library, which mends nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input", "source", "wbr", "col"}


@dataclass
class Element:
    """A tag with its attributes and all text inside of it."""

    tag: str
    attributes: dict[str, str]
    inside: tuple[str, ...]
    """The tags around it, the outermost first."""
    children: list[Element] = field(default_factory=list)
    text: str = ""

    def find(self, tag: str) -> list[Element]:
        """The elements of this tag in it, at any depth, in the order of the page."""
        found = [self] if self.tag == tag else []
        return found + [one for child in self.children for one in child.find(tag)]

    def all(self) -> list[Element]:
        return [self, *(one for child in self.children for one in child.all())]


class Page(HTMLParser):
    """The elements of ``text``.

    Raises:
        ValueError: a tag is not closed, or closed where it is not open.

    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {}, ())
        self._open = [self.root]
        self.feed(text)
        self.close()
        if len(self._open) > 1:
            raise ValueError(f"<{self._open[-1].tag}> is not closed")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        if len(set(names)) < len(names):
            raise ValueError(f"<{tag}> has an attribute twice: {names}")
        one = Element(tag, {k: v or "" for k, v in attrs}, tuple(e.tag for e in self._open[1:]))
        self._open[-1].children.append(one)
        if tag not in VOID:
            self._open.append(one)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._open[-1].tag != tag:
            raise ValueError(f"</{tag}> closes <{self._open[-1].tag}>")
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for one in self._open:
            one.text += data

    def find(self, tag: str) -> list[Element]:
        return self.root.find(tag)

    def tables(self) -> dict[str, list[list[str]]]:
        """Rows of cells, titles first, by the caption of each table."""
        found = {}
        for table in self.find("table"):
            rows = [[c.text for c in row.children] for row in table.find("tr")]
            found[table.find("caption")[0].text] = rows
        return found

    def row(self, caption: str, name: str) -> dict[str, str]:
        """The cells of the row ``name``, by the titles of a table's columns."""
        head, *rows = self.tables()[caption]
        (cells,) = (row for row in rows if row[0] == name)
        return dict(zip(head, cells, strict=True))
