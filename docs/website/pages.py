"""Which pages the site has, and from which files of the repository they come.

The Markdown of docs/ as it is, what a site wants of the files beside it, and sections that are worth a page.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from website.markdown_text import headings

ROOT = Path(__file__).resolve().parents[2]
# What lies outside of docs/ and is a page, too.
BESIDE = {"README.md": "readme.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
# Single sections of files that are a page by themselves, by their anchors.
SECTIONS = {("README.md", "command-line"): "command_line.md"}


@dataclass(frozen=True)
class Page:
    """A page of the site: its path there, and the Markdown, with links as they are in the file ``source``."""

    path: str
    source: str
    text: str


def pages(root: Path) -> Iterator[Page]:
    """All pages; of a file that has several, the first is the one that a link to the file leads to."""
    docs = root / "docs"
    for path in sorted(docs.rglob("*.md")):
        name = path.relative_to(root).as_posix()
        yield Page(path.relative_to(docs).as_posix(), name, path.read_text(encoding="utf-8"))
    for name, target in BESIDE.items():
        yield Page(target, name, (root / name).read_text(encoding="utf-8"))
    for (name, anchor), target in SECTIONS.items():
        yield Page(target, name, _sections((root / name).read_text(encoding="utf-8"))[anchor])


def _sections(text: str) -> dict[str, str]:
    """What is under each heading of level two, by its anchor, with headings raised by one level."""
    lines, found = text.splitlines(), headings(text)
    inner = {heading.line for heading in found if heading.level > 1}
    raised = [line[1:] if number in inner else line for number, line in enumerate(lines)]
    begins = [heading for heading in found if heading.level == 2]
    ends = [heading.line for heading in begins[1:]] + [len(lines)]
    return {
        heading.anchor: "\n".join(raised[heading.line : end]).rstrip() + "\n"
        for heading, end in zip(begins, ends, strict=True)
    }
