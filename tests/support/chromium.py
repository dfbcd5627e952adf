"""A page in a real browser: its console, and what does not fit at several widths."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import escape
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
_SCRIPT = """
const found = [];
addEventListener("load", () => {
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, width = page.documentElement.clientWidth;
    for (const one of page.querySelectorAll("details")) one.open = true;
    const cut = [];
    for (const one of page.querySelectorAll("svg[role] text")) {
      const box = one.getBoundingClientRect();
      if (box.left < 0 || box.right > width) cut.push(one.textContent);
    }
    found.push({width, scroll: page.documentElement.scrollWidth, cut,
                height: page.documentElement.scrollHeight, background:
                frame.contentWindow.getComputedStyle(page.body).backgroundColor});
  }
  document.getElementById("found").textContent = JSON.stringify(found);
});
"""


def chromium() -> str | None:
    """The browser: ``HF_SPARSE_CHROMIUM``, or the first one on the path."""
    named = os.environ.get("HF_SPARSE_CHROMIUM")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


def shown(
    browser: str, html: str, folder: Path, widths: tuple[int, ...], *, dark: bool = False
) -> tuple[list[Any], list[str]]:
    """What ``html`` is in frames of ``widths`` pixels, every ``<details>`` open, and the console's lines."""
    frames = "".join(f'<iframe width="{w}" height="800" srcdoc="{escape(html)}"></iframe>' for w in widths)
    head = '<!DOCTYPE html><meta charset="utf-8"><style>iframe { border: 0 }</style><pre id="found"></pre>'
    page = folder / "frames.html"
    page.write_text(f"{head}<script>{_SCRIPT}</script>{frames}", encoding="utf-8")
    ran = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",  # which root cannot have; the page is our own
            "--disable-gpu",
            "--disable-background-networking",
            f"--user-data-dir={folder / 'profile'}",
            "--enable-logging=stderr",
            "--virtual-time-budget=5000",
            *(["--blink-settings=preferredColorScheme=0"] if dark else []),
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    told = re.search(r'<pre id="found">(.*?)</pre>', ran.stdout, re.DOTALL)
    assert told is not None, ran.stderr[-2000:]
    return json.loads(told[1]), [line for line in ran.stderr.splitlines() if "CONSOLE" in line]
