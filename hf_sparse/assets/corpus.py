"""English text out of the running Python: its documentation topics and the docstrings of its library.

A document is one help topic, or all docstrings of one source file in the order of the source. Documents are
split into training and held-out text by a hash of their *name* (``topics/if``, ``json/decoder.py``), not of
their text: names are the same in every Python release, so text that the embedded model has never seen stays
unseen when a later Python words it a little differently. A paragraph is used once: repeated ones are dropped
where they come again, and the held-out text loses each paragraph that the training text has, too.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_SHARE = 1 / 16
"""Share of the documents, by count, that is kept for evaluation."""

_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "pydoc_data",
}
_MIN_CHARACTERS = 80


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Two disjoint sets of documents, each in a fixed order."""

    train: tuple[str, ...]
    """Text to train on."""
    held_out: tuple[str, ...]
    """Text to evaluate on; no paragraph of it is in :attr:`train`."""

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``train.jsonl`` and ``validation.jsonl``, one ``{"text": ...}`` a line.

        Returns the folder, which ``datasets.load_dataset`` and the training application take as it is.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, documents in (("train", self.train), ("validation", self.held_out)):
            lines = (json.dumps({"text": document}, ensure_ascii=False) for document in documents)
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder


@functools.cache
def python_corpus(library: str | os.PathLike[str] | None = None) -> Corpus:
    """The documentation text of the running Python; the same on every call.

    Args:
        library: folder of the standard library's source files; None means that of the running Python.

    Raises:
        FileNotFoundError: there are no source files there (a Python that ships byte code only).

    """
    root = Path(library or sysconfig.get_paths()["stdlib"])
    documents = list(_topics()) + list(_docstrings(root))
    if len(documents) < 2:
        raise FileNotFoundError(
            f"no documented Python source files under {str(root)!r}; pass library=<folder>."
        )
    seen: set[str] = set()
    train = _new_paragraphs((text for name, text in documents if not _is_held_out(name)), seen)
    held_out = _new_paragraphs((text for name, text in documents if _is_held_out(name)), seen)
    return Corpus(train=tuple(train), held_out=tuple(held_out))


def _is_held_out(name: str) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        # Underlines of headings, rules of tables: long runs of one character teach nothing.
        yield f"topics/{name}", re.sub(r"([*=~^+\-])\1{3,}", "", topics[name])


def _docstrings(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(name.parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in the library's own old files
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # templates and deliberately broken files
        if texts := list(_documented(tree)):
            yield name.as_posix(), "\n\n".join(texts)


def _documented(tree: ast.Module) -> Iterator[str]:
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node, clean=False)
        ):
            yield inspect.cleandoc(text)
        nodes.extend(reversed(list(ast.iter_child_nodes(node))))


def _new_paragraphs(texts: Iterator[str], seen: set[str]) -> list[str]:
    """Each text without the paragraphs in ``seen``, which grows; texts with too little left are dropped."""
    documents = []
    for text in texts:
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                kept.append("\n".join(line.rstrip() for line in paragraph.strip("\n").split("\n")))
        document = "\n\n".join(kept)
        if len(document) >= _MIN_CHARACTERS:
            documents.append(document)
    return documents
