"""The files that Zensical builds from: pages whose links lead to pages, and source files that became pages.

A link of the repository may lead to a source file, which a site does not have. So each one that is linked to
becomes a page that shows it. A link that leads nowhere is an error that names the file.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from website.markdown_text import change_links, headings, indented_by_four, outside_code, without_comments
from website.pages import ROOT, Page, pages

LANGUAGES = {".py": "python", ".h": "cpp", ".cpp": "cpp", ".yaml": "yaml", ".toml": "toml", ".sh": "bash"}
COPIED = {".css", ".js", ".json", ".png", ".svg"}
_BY_FILE = re.compile(r"\[[\w./-]+\.md\](\(([^)\s]+)\))")
_ARXIV = re.compile(r"(?<![/\d])((?:arXiv )?(\d\d(?:0[1-9]|1[0-2])\.\d{5}))(?!\d)")


class BrokenLinkError(Exception):
    """A link of a page that leads to no file, or to no heading of it."""


def staged(root: Path = ROOT) -> dict[str, str | Path]:
    """Everything that the site is built from, by its path there: the text of a page, or a file to copy.

    Raises:
        BrokenLinkError: a link leads nowhere; the message says which, and where it is.
    """
    return _Staging(root).files()


class _Staging:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.pages = list(pages(root))
        # (file of the repository, anchor or "") -> (page, anchor or "")
        self.places: dict[tuple[str, str], tuple[str, str]] = {}
        self.sources: list[str] = []  # files and folders of the repository that pages link to
        for page in self.pages:
            for number, heading in enumerate(headings(page.text)):
                self.places[page.source, heading.anchor] = (page.path, heading.anchor if number else "")
            self.places.setdefault((page.source, ""), (page.path, ""))

    def files(self) -> dict[str, str | Path]:
        found: dict[str, str | Path] = {page.path: self._finished(page) for page in self.pages}
        docs = self.root / "docs"
        for path in docs.rglob("*"):
            if path.suffix in COPIED:
                found[path.relative_to(docs).as_posix()] = path
        for name in self.sources:  # grows by what a folder lists
            found[_place(self.root / name, name)] = self._source(name)
        return found

    def _finished(self, page: Page) -> str:
        text = outside_code(
            page.text, lambda prose: _BY_FILE.sub(lambda link: self._titled(page, link), prose)
        )
        text = change_links(text, lambda target: self._target(page, target))
        return indented_by_four(outside_code(without_comments(text), _with_arxiv_links))

    def _titled(self, page: Page, link: re.Match[str]) -> str:
        """A link whose text is the name of a file, with the title of the page that the file has become."""
        to, _ = self.places.get(_meant(page, link[2]), ("", ""))
        titles = [headings(one.text)[0].text for one in self.pages if one.path == to]
        return f"[{titles[0]}]{link[1]}" if titles else link[0]

    def _target(self, page: Page, target: str) -> str:
        """A link of ``page`` as it has to be on the site."""
        if re.match(r"[a-z]+:", target):
            return target
        name, anchor = _meant(page, target)
        if place := self.places.get((name, anchor)):
            to, anchor = place
            if to == page.path:
                return f"#{anchor or headings(page.text)[0].anchor}"
            return _relative(to, page.path) + (f"#{anchor}" if anchor else "")
        if anchor or name.startswith("..") or not (self.root / name).exists():
            raise BrokenLinkError(f"{page.source}: the link to {target} leads nowhere; mend it there.")
        if name.startswith("docs/") and name.endswith(tuple(COPIED)):
            return _relative(name.removeprefix("docs/"), page.path)
        return _relative(self._linked(name), page.path)

    def _linked(self, name: str) -> str:
        """Where a file or folder goes, which it does from now on."""
        if name not in self.sources:
            self.sources.append(name)
        return _place(self.root / name, name)

    def _source(self, name: str) -> str | Path:
        path = self.root / name
        if path.suffix in COPIED:
            return path
        if path.is_dir():
            here = Page(_place(path, name), f"{name}/", "")
            suffixes = LANGUAGES.keys() | COPIED | {".md"}
            shown = sorted(child.name for child in path.iterdir() if child.suffix in suffixes)
            body = "\n".join(f"- [{one}]({self._target(here, one)})" for one in shown)
        else:
            code = path.read_text(encoding="utf-8").rstrip()
            body = f"`````````{LANGUAGES.get(path.suffix, 'text')}\n{code}\n`````````"
        return f"---\nsearch:\n  exclude: true\n---\n\n# {name}\n\n{body}\n"


def _meant(page: Page, target: str) -> tuple[str, str]:
    """The file or folder of the repository that a link of ``page`` leads to, and the anchor in it, or ""."""
    path, _, anchor = target.partition("#")
    name = posixpath.join(posixpath.dirname(page.source), path) if path else page.source
    return posixpath.normpath(name), anchor


def _place(path: Path, name: str) -> str:
    """The path on the site of a file or folder that is no page of the documentation."""
    if path.is_dir():
        return f"source/{name}/index.md"
    return f"source/{name}" if path.suffix in COPIED else f"source/{name}.md"


def _with_arxiv_links(prose: str) -> str:
    return _ARXIV.sub(r"[\1](https://arxiv.org/abs/\2)", prose)


def _relative(target: str, page: str) -> str:
    return Path(os.path.relpath(target, posixpath.dirname(page) or ".")).as_posix()
