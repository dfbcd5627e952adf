"""Which pages the site has, and from which files of the repository they come.

The Markdown stays as it reads best in the repository, with all methods in one file; here it becomes what a
site wants, a page for each method.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from website.markdown_text import headings

ROOT = Path(__file__).resolve().parents[2]
# What lies outside of docs/ and is a page, too.
BESIDE = {"README.md": "readme.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
# Files that become a page for each section of the second level, in a folder.
SPLIT = {"docs/methods.md": "methods"}
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
        text = path.read_text(encoding="utf-8")
        if name in SPLIT:
            yield from _split(name, SPLIT[name], text)
        else:
            yield Page(path.relative_to(docs).as_posix(), name, text)
    for name, target in BESIDE.items():
        yield Page(target, name, (root / name).read_text(encoding="utf-8"))
    for (name, anchor), target in SECTIONS.items():
        _, sections = _sections((root / name).read_text(encoding="utf-8"))
        yield Page(target, name, sections[anchor])


def _split(source: str, folder: str, text: str) -> Iterator[Page]:
    """A page for the beginning of a file, with a list of its sections, and one for each section."""
    head, sections = _sections(text)
    listed = []
    for section in sections.values():
        first, *others = (f"[{heading.text}](#{heading.anchor})" for heading in headings(section))
        listed.append(f"- {first}" + (f": {', '.join(others)}" if others else ""))
    yield Page(f"{folder}/index.md", source, f"{head.rstrip()}\n\n" + "\n".join(listed) + "\n")
    for anchor, section in sections.items():
        yield Page(f"{folder}/{anchor}.md", source, section)


def _sections(text: str) -> tuple[str, dict[str, str]]:
    """What comes before the first heading of level two, and these sections by anchor, raised by one level."""
    lines, found = text.splitlines(), headings(text)
    inner = {heading.line for heading in found if heading.level > 1}
    raised = [line[1:] if number in inner else line for number, line in enumerate(lines)]
    begins = [heading for heading in found if heading.level == 2]
    ends = [heading.line for heading in begins[1:]] + [len(lines)]
    sections = {
        heading.anchor: "\n".join(raised[heading.line : end]).rstrip() + "\n"
        for heading, end in zip(begins, ends, strict=True)
    }
    return "\n".join(lines[: begins[0].line]), sections
