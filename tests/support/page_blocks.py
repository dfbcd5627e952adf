"""The Python blocks of pages, and a process that runs those of a page one after the other, as a reader would.

In a comment before a block a page may say ``run first:`` with code that a reader has in mind (a model that is
there already), or ``not run:`` with the reason.

    python -m support.page_blocks PAGE ...      # prints, as JSON, what went wrong in each
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import textwrap
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BLOCK = re.compile(
    r"(?:^ *<!-- (?P<word>run first|not run):(?P<said>(?:(?!-->).)*?)-->\n\s*)?"
    r"^(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A block of a page, and what its page says of it."""

    line: int  # of its first line of code, counted from 1
    code: str
    first: str = ""  # code to run before it
    not_run: str = ""  # why it is not run


def blocks(text: str) -> list[Block]:
    """The Python blocks of a page, in their order."""
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        said = textwrap.dedent(match["said"] or "").strip()
        kind = {"run first": "first", "not run": "not_run"}.get(match["word"] or "")
        found.append(Block(line, textwrap.dedent(match["code"]), **({kind: said} if kind else {})))
    return found


def run(page: Path) -> None:
    """Run the blocks of a page in one namespace and an empty folder; raises what they raise."""
    names: dict[str, Any] = {"__name__": "__page__"}
    with tempfile.TemporaryDirectory() as folder:
        before = Path.cwd()
        os.chdir(folder)
        try:
            for block in blocks(page.read_text(encoding="utf-8")):
                if block.not_run:
                    continue
                _execute(block.first, f"{page.name}, comment before line {block.line}", names)
                # Tracebacks name the line of the page.
                _execute("\n" * (block.line - 1) + block.code, str(page), names)
        finally:
            os.chdir(before)


def _execute(code: str, place: str, names: dict[str, Any]) -> None:
    # Without what this file has from __future__.
    exec(compile(code, place, "exec", dont_inherit=True), names)


def main() -> None:
    """Run each page that is given, and print what went wrong by page; null if nothing did."""
    import torch

    torch.set_num_threads(1)
    faults: dict[str, str | None] = {}
    for page in sys.argv[1:]:
        torch.manual_seed(0)
        try:
            run(Path(page))
        except Exception:
            faults[page] = traceback.format_exc()
        else:
            faults[page] = None
    print("\n" + json.dumps(faults))


if __name__ == "__main__":
    main()
