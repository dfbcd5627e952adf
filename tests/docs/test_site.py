"""The documentation site: its pages, their links, and what makes a build fail."""

from __future__ import annotations

import fnmatch
import importlib
import re
import sys
from pathlib import Path

import pytest

from hf_sparse.activations.config import ACTIVATIONS
from hf_sparse.calibration.search import methods as calibrations
from hf_sparse.config import PARTS
from hf_sparse.methods import methods
from hf_sparse.sharpness.registry import CONFIGS
from website import figures
from website.check import broken
from website.markdown_text import indented_by_four, links, without_comments
from website.names import documented
from website.pages import ROOT
from website.staging import BrokenLinkError, staged

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIG = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def site():
    """Everything the site is built from. A link that leads nowhere, anywhere, is an error here."""
    return staged()


@pytest.fixture
def repository(tmp_path):
    """A small repository with a page that is a section of another file."""
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        (tmp_path / name).write_text("# Title\n\n## Command line\n\nText.\n")
    for folder in ("docs", "code"):
        (tmp_path / folder).mkdir()
    (tmp_path / "code" / "one.py").write_text('"""```in here```"""\n')
    (tmp_path / "README.md").write_text(
        "# Title\n\n[C](#inner)\n\n## Command line\n\n### Inner\nx\n\n## B two\n"
    )
    (tmp_path / "docs" / "one.md").write_text("# A one\n\n## Deep\n")
    (tmp_path / "docs" / "page.md").write_text("# Page\n\n## There\n")
    return tmp_path


def _code(text: str) -> set[str]:
    """The words in code spans of a text without fenced blocks."""
    return set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", text))))


def test_the_index_of_methods_names_everything_that_is_one_and_every_page():
    folder = ROOT / "docs" / "methods"
    index = (folder / "index.md").read_text(encoding="utf-8")
    parts = set(PARTS) - {"activation"}
    assert {*ACTIVATIONS, *parts, *methods(), *CONFIGS, *calibrations()} <= _code(index)
    recipes = {path.stem for path in (ROOT / "training" / "recipes").glob("*.yaml")}
    assert {Path(link).stem for link in links(index) if link.endswith(".yaml")} == recipes
    assert {path.name for path in folder.glob("*.md")} - {"index.md"} <= set(links(index))


@pytest.mark.parametrize(
    "name", sorted({*ACTIVATIONS, *PARTS, *methods(), *CONFIGS} - {"original", "activation", "inputs"})
)
def test_the_page_that_the_index_gives_for_a_method_tells_of_it(name):
    folder = ROOT / "docs" / "methods"
    rows = (folder / "index.md").read_text(encoding="utf-8").splitlines()
    of_it = [row for row in rows if row.startswith("| [") and name in _code(row.split("|")[4])]
    assert any(
        re.search(rf"\b{name}\b", (folder / links(row)[0]).read_text(encoding="utf-8")) for row in of_it
    )


def test_a_page_of_a_method_says_where_it_is_from_and_links_its_recipes():
    folder = ROOT / "docs" / "methods"
    for row in (folder / "index.md").read_text(encoding="utf-8").splitlines():
        if not row.startswith("| ["):
            continue
        page, *recipes = links(row)
        text = (folder / page).read_text(encoding="utf-8")
        assert "| Source |" in text, page
        assert set(recipes) <= set(links(text)), page


def test_a_section_that_is_a_page_has_the_links_to_it(repository):
    (repository / "docs" / "results").mkdir()
    (repository / "docs" / "results" / "one.md").write_text("# One")
    (repository / "docs" / "page.md").write_text(
        "# Page\n[a](../README.md) [b](../README.md#inner) [`c`](../code/one.py) [d](../code)\n"
        "[e](results) [f](#page) [g](https://x.y/z) `[h](nowhere.md)` [i](one.md#deep)\n"
    )
    found = staged(repository)
    assert links(found["page.md"]) == [
        "readme.md",
        "command_line.md#inner",
        "source/code/one.py.md",
        "source/code/index.md",
        "source/docs/results/index.md",
        "#page",
        "https://x.y/z",
        "one.md#deep",
    ]
    assert links(found["readme.md"]) == ["command_line.md#inner"]
    assert found["command_line.md"] == "# Command line\n\n## Inner\nx\n"
    assert '"""```in here```"""' in found["source/code/one.py.md"]
    assert links(found["source/code/index.md"]) == ["one.py.md"]
    assert links(found["source/docs/results/index.md"]) == ["../../../results/one.md"]


@pytest.mark.parametrize(
    "target",
    [
        "nowhere.md",
        "page.md#nowhere",
        "#nowhere",
        "../code/two.py",
        "../../outside.md",
        "one.md#a",
        "x.svg",
    ],
)
@pytest.mark.parametrize("name", ["docs/page.md", "docs/one.md", "README.md"])
def test_a_link_that_leads_nowhere_is_refused(repository, name, target):
    page = repository / name
    page.write_text(page.read_text() + f"\n[link]({target})\n")
    with pytest.raises(BrokenLinkError, match=rf"{name}: the link to {target} leads nowhere"):
        staged(repository)


def test_a_link_by_the_name_of_a_file_has_the_title_of_its_page(repository):
    (repository / "docs" / "page.md").write_text(
        "# Page\n[one.md](one.md#deep) [README.md](../README.md#inner) [two.md](../code/two.py)\n"
    )
    (repository / "code" / "two.py").touch()
    page = staged(repository)["page.md"]
    assert (
        "[A one](one.md#deep) [Command line](command_line.md#inner) [two.md](source/code/two.py.md)" in page
    )


def test_what_is_said_to_writers_and_tests_is_not_on_the_site(site):
    assert not any("<!--" in text for name, text in site.items() if _is_page(name))
    text = "a\n\n   <!-- not run:\n   it needs `x` -->\n\n   b <!-- c -->\n```\n<!-- kept -->\n```\n"
    assert without_comments(text) == "a\n\n   b \n```\n<!-- kept -->\n```\n"


def test_lists_as_github_reads_them_are_lists_on_the_site():
    markdown = pytest.importorskip("markdown").Markdown(extensions=["tables", "fenced_code"])
    text = """Begin:
- one
  goes on
  - inner

  | a | b |
  |---|---|
  | 1 | 2 |
- two
1. first

   paragraph

Not in the list.
"""
    html = "".join(markdown.convert(indented_by_four(text)).split("\n"))
    assert "<p>Begin:</p><ul><li>" in html
    assert "<ul><li>inner</li></ul>" in html
    assert html.index("<table>") < html.index("two")
    assert "<p>paragraph</p></li>" in html
    assert html.endswith("<p>Not in the list.</p>")


def test_code_in_a_list_moves_as_it_is():
    text = "1. Do:\n\n   ```python\n   if x:\n\n       y\n   ```\n"
    assert indented_by_four(text) == "1.  Do:\n\n    ```python\n    if x:\n\n        y\n    ```\n"


def test_every_page_is_in_the_navigation(site):
    def leaves(entry):
        if isinstance(entry, str):
            return [entry]
        return [
            leaf for one in (entry.values() if isinstance(entry, dict) else entry) for leaf in leaves(one)
        ]

    patterns = [f"{leaf}*" if leaf.endswith("/") else leaf for leaf in leaves(CONFIG["nav"])]
    pages = {name for name in site if _is_page(name)} - {"readme.md"}
    assert [page for page in pages if not any(fnmatch.fnmatch(page, one) for one in patterns)] == []
    assert [one for one in patterns if not fnmatch.filter(pages, one)] == []


@pytest.mark.parametrize("name", ["", ".methods", ".objectives", ".observing", ".sharpness", "triton_ops"])
def test_the_api_pages_have_every_public_name(name):
    module = importlib.import_module(name if name == "triton_ops" else f"hf_sparse{name}")
    known = documented()
    assert set(module.__all__) - {"__version__"} <= set(known)


def test_the_api_pages_have_no_other_names():
    for name in documented().values():
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


@pytest.mark.parametrize("name", figures.FIGURES)
def test_figures_are_what_their_script_draws(name):
    assert (figures.FOLDER / name).read_text(encoding="utf-8") == figures.FIGURES[name]()


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ('<a href="inner/b.html#there">x</a> <a href="https://else.where">y</a> <img src="i.svg">', None),
        ('<a href="inner/c.html">x</a>', "the link to inner/c.html leads nowhere"),
        ('<a href="inner/b.html#nowhere">x</a>', "the link to inner/b.html#nowhere leads to no heading"),
        ('<a href="#nowhere">x</a>', "the link to #nowhere leads to no heading"),
        ('<img src="j.svg">', "the link to j.svg leads nowhere"),
        ('<script src="https://else.where/a.js"></script>', "https://else.where/a.js would be loaded"),
        (
            '<link rel="stylesheet" href="https://else.where/a.css">',
            "https://else.where/a.css would be loaded",
        ),
    ],
)
def test_a_built_site_is_checked_for_what_leads_out_of_it(tmp_path, body, fault):
    (tmp_path / "inner").mkdir()
    (tmp_path / "i.svg").touch()
    (tmp_path / "inner" / "b.html").write_text('<h1 id="there">b</h1> <a href="../a.html">a</a>')
    (tmp_path / "a.html").write_text(body)
    found = broken(tmp_path)
    assert (len(found) == 1 and found[0].startswith(f"a.html: {fault}")) if fault else found == []


def _is_page(name: str) -> bool:
    return name.endswith(".md") and Path(name).parts[0] != "source"
