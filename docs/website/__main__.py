"""Builds the documentation site into build/site, or says what is broken.

    PYTHONPATH=docs python -m website

What Zensical refuses (a page, an anchor or an API name that is not there) fails the build, and so does a link
of the finished pages that leads nowhere.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from website.check import broken
from website.pages import ROOT
from website.staging import BrokenLinkError, staged

STAGED, BUILT = ROOT / "build" / "docs", ROOT / "build" / "site"


def main() -> int:
    """The exit status."""
    try:
        files = staged()
    except BrokenLinkError as error:
        print(error, file=sys.stderr)
        return 1
    for folder in (STAGED, BUILT):
        shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        path = STAGED / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, path)
        else:
            path.write_text(content, encoding="utf-8")
    built = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict", "--clean"], cwd=ROOT)
    if built.returncode:
        return built.returncode
    faults = broken(BUILT)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
