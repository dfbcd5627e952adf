"""The names that the API pages document."""

from __future__ import annotations

import functools
import re

from website.pages import ROOT


@functools.cache
def documented() -> dict[str, str]:
    """Full names by their last part, from the directives in ``docs/api``; of several, the first."""
    found: dict[str, str] = {}
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            found.setdefault(name.rpartition(".")[2], name)
    return found
