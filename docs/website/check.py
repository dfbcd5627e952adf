"""Finds what is broken in a built site: links that lead nowhere, and what would be loaded from elsewhere."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []  # what a browser fetches by itself

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.anchors.update(values[name] for name in ("id", "name") if name in values)
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if "src" in values:
            self.loaded.append(values["src"])
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.loaded.append(values.get("href", ""))


def broken(folder: Path) -> list[str]:
    """One line for each fault of the HTML files in ``folder``; none if the site stands by itself."""
    pages = {}
    for path in sorted(folder.rglob("*.html")):
        if path.name == "404.html":
            continue  # a server gives it for any path, so its links begin at the root of the server
        reader = _Reader()
        reader.feed(path.read_text(encoding="utf-8"))
        pages[path.resolve()] = reader
    faults = []
    for path, reader in pages.items():
        name = path.relative_to(folder.resolve()).as_posix()
        for target in reader.links + reader.loaded:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if target in reader.loaded and parts.scheme != "data":
                    faults.append(f"{name}: {target} would be loaded from elsewhere")
                continue
            goal = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            goal = goal / "index.html" if goal.is_dir() else goal
            if not goal.is_file():
                faults.append(f"{name}: the link to {target} leads nowhere")
            elif parts.fragment and goal in pages and unquote(parts.fragment) not in pages[goal].anchors:
                faults.append(f"{name}: the link to {target} leads to no heading")
    return faults
