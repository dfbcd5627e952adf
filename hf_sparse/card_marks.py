"""Sections of a README that are ours, between two marks; every other byte of it is somebody else's."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

MARK = "<!-- hf_sparse"
"""How every mark begins. Text from elsewhere that has it cannot go into a section."""


@dataclass(frozen=True)
class Section:
    """A section with a mark before and after it. Of a begin without an end nothing is taken for ours."""

    name: str
    says: str
    """What the first mark tells those who read the source."""
    _pattern: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        begin, end = re.escape(f"{MARK}{self.name}: begin"), re.escape(self._end)
        pattern = rf"{begin}[^\n]*?-->(?:(?!{begin}).)*?{end}"
        object.__setattr__(self, "_pattern", re.compile(pattern, re.DOTALL))

    @property
    def _end(self) -> str:
        return f"{MARK}{self.name}: end -->"

    def marked(self, text: str, of: str = "") -> str:
        """``text`` between the marks; ``of`` is kept in the first one."""
        return f"{MARK}{self.name}: begin, {self.says}{of and f', {of}'} -->\n{text.strip()}\n{self._end}"

    def found(self, readme: str) -> str | None:
        """The section in ``readme`` with its marks; None if there is none."""
        match = self._pattern.search(readme)
        return match and match[0]

    def says_of(self, readme: str) -> str | None:
        """What ``of`` was when the section in ``readme`` was written; None if there is no section."""
        found = self.found(readme)
        if found is None:
            return None
        first = found.partition("-->")[0].strip()
        return first.rpartition(", ")[2]

    def put(self, readme: str, section: str, *, before: Iterable[Section] = ()) -> str:
        """``readme`` with ``section`` in the place of the old one; without one, before others, else last."""
        if self.found(readme) is not None:
            return self._pattern.sub(lambda _: section, readme, count=1)
        for other in before:
            if (found := other.found(readme)) is not None:
                head, _, tail = readme.partition(found)
                return f"{head.rstrip()}\n\n{section}\n\n{found}{tail}"
        return f"{readme.rstrip()}\n\n{section}\n"

    def without(self, readme: str) -> str:
        """``readme`` without the section and the empty lines before it."""
        return re.sub(rf"\n*{self._pattern.pattern}\n?", "\n", readme, count=1, flags=re.DOTALL)


PATCH = Section("", "written anew with each save")
"""What was patched and which runtimes get it wrong: follows from the model alone."""

PUSHED = Section(".push_to_hub", "written anew by each call of it")
"""How to load the model, and what was measured. Holds for the patch that its first mark names."""
