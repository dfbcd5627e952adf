"""What the site and its tests need to know of Markdown: code, headings with their anchors, links, lists."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_FENCE = re.compile(r"^ *(`{3,}|~{3,})")
_ITEM = re.compile(r"^( *)([-*+]|\d+\.)( +)")
_HEADING = re.compile(r"^(#{1,6}) (.+?)(?: \{#([\w-]+)\})?$")
_LINK = re.compile(r"(\]\()([^)\s]+)(\))|(<img [^>]*?src=\")([^\"]+)(\")")
_CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)(?:(?!\n\n).)+?(?<!`)\1(?!`)", re.DOTALL)
_COMMENT = re.compile(r"^[ ]*<!--.*?-->\n+|<!--.*?-->", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Heading:
    """A heading: its level, 1 to 6, its text and the anchor that GitHub and the site give it."""

    level: int
    text: str
    anchor: str
    line: int  # counted from 0


def lines_with_code(text: str) -> Iterator[tuple[str, bool]]:
    """Each line, and whether it belongs to a fenced block, fences included."""
    fence = ""
    for line in text.splitlines():
        found = _FENCE.match(line)
        if fence:
            yield line, True
            if found and found[1].startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
        elif found:
            fence = found[1]
            yield line, True
        else:
            yield line, False


def headings(text: str) -> list[Heading]:
    """The headings outside of code; of equal ones, the second has the anchor ``name-1``, as on GitHub."""
    found: list[Heading] = []
    seen: dict[str, int] = {}
    for number, (line, code) in enumerate(lines_with_code(text)):
        match = None if code else _HEADING.match(line)
        if match is None:
            continue
        title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", match[2]).replace("`", "")
        anchor = match[3] or re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        count = seen.get(anchor, 0)
        seen[anchor] = count + 1
        found.append(Heading(len(match[1]), title, f"{anchor}-{count}" if count else anchor, number))
    return found


def outside_fences(text: str, change: Callable[[str], str]) -> str:
    """``text`` with ``change`` done to every stretch between fenced blocks."""
    changed: list[str] = []
    for code, lines in itertools.groupby(lines_with_code(text), key=lambda pair: pair[1]):
        stretch = "".join(f"{line}\n" for line, _ in lines)
        changed.append(stretch if code else change(stretch))
    return "".join(changed)


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """``text`` with ``change`` done to every stretch that is neither a fenced block nor a code span."""

    def outside_spans(prose: str) -> str:
        changed, at = [], 0
        for span in _CODE_SPAN.finditer(prose):
            changed += [change(prose[at : span.start()]), span[0]]
            at = span.end()
        return "".join([*changed, change(prose[at:])])

    return outside_fences(text, outside_spans)


def links(text: str) -> list[str]:
    """The targets of the links and images outside of code."""
    found: list[str] = []

    def note(target: str) -> str:
        found.append(target)
        return target

    change_links(text, note)
    return found


def change_links(text: str, change: Callable[[str], str]) -> str:
    """``text`` with the target of every link and image outside of code replaced by what ``change`` says."""

    def one(match: re.Match[str]) -> str:
        before, target, after = match.groups()[:3] if match[1] else match.groups()[3:]
        return f"{before}{change(target)}{after}"

    # A code span may stand within the brackets of a link, so the target is what must be outside of code.
    return outside_code(text, lambda prose: _LINK.sub(one, prose))


def without_comments(text: str) -> str:
    """``text`` without HTML comments: what they say is for writers and tests."""
    return outside_fences(text, lambda prose: _COMMENT.sub("", prose))


def indented_by_four(text: str) -> str:
    """``text`` with lists as Python-Markdown wants them: a blank line before, and four columns per level.

    GitHub nests by the width of the bullet and lets a list follow a paragraph; written so, a list is a
    paragraph to the site, and what is nested in it comes apart.
    """
    out: list[str] = []
    offsets: list[int] = []  # the column at which the content of each open item begins
    shift = 0
    after_blank, was_code = True, False
    for line, code in lines_with_code(text):
        if not line.strip():
            out.append("")
            after_blank = True
            continue
        indent = len(line) - len(line.lstrip())
        item = None if code else _ITEM.match(line)
        if not (code and was_code):  # a fenced block moves as one
            if after_blank or item or code:
                while offsets and indent < offsets[-1]:
                    offsets.pop()
            if item and not offsets and out and out[-1] and not _within_list(out):
                out.append("")
            base = offsets[-1] if offsets else 0
            shift = 4 * len(offsets) - base
        if item:
            marker = f"{item[2]} ".ljust(4)
            out.append(" " * (indent + shift) + marker + line[item.end() :])
            offsets.append(item.end())
        else:
            out.append(" " * max(indent + shift, 0) + line.lstrip())
        after_blank, was_code = False, code
    return "\n".join(out) + "\n"


def _within_list(out: list[str]) -> bool:
    """Whether what was written last belongs to a list, so that the next item needs no blank line."""
    for line in reversed(out):
        if not line:
            return False
        if _ITEM.match(line):
            return True
    return False
