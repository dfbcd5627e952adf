"""Writes docs/benchmarks.md from what the benchmarks left in benchmarks/results/.

    python benchmarks/report.py            # write it anew
    python benchmarks/report.py --check    # exit status 1 if it is not what the results say

The page is the sections of ``report_sections.py``, in their order. A new result file needs one section there;
one that no section names is an error, so that none is measured and forgotten.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from report_sections import SECTIONS, Result, Section

BENCHMARKS = Path(__file__).resolve().parent
PAGE = BENCHMARKS.parent / "docs" / "benchmarks.md"


def load(names: tuple[str, ...]) -> dict[str, Result]:
    """Result files by name, ``results/`` being that of the benchmarks unless the name leads elsewhere."""
    found = {}
    for name in names:
        path = (BENCHMARKS / "results" / name).resolve()
        found[name] = Result(json.loads(path.read_text(encoding="utf-8")))
    return found


def page(sections: tuple[Section, ...] = SECTIONS) -> str:
    """The text of docs/benchmarks.md.

    Raises:
        SystemExit: a result file is missing, or is in no section.

    """
    named = {name for section in sections for name in section.results}
    unnamed = sorted({path.name for path in (BENCHMARKS / "results").glob("*.json")} - named)
    if unnamed:
        raise SystemExit(f"{', '.join(unnamed)} in no section; add one to benchmarks/report_sections.py.")
    parts = []
    for section in sections:
        try:
            results = load(section.results)
        except FileNotFoundError as error:
            raise SystemExit(f"{error.filename} is missing, which {section.title!r} shows.") from None
        parts.append(f"{section.heading}\n\n{section.text(*results.values()).strip()}\n")
    return "\n".join(parts)


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; is the page current?")
    check = parser.parse_args().check
    text = page()
    if check:
        if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
            return 0
        print("docs/benchmarks.md is not current: python benchmarks/report.py", file=sys.stderr)
        return 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
