"""Documents of a data set on the Hub or of local files, read as a stream; and which are held out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_sparse.bad_documents import BadDocuments
from hf_sparse.connection import WAITS, Attempts, retried
from hf_sparse.document_files import FORMATS, Files, GetState, format_of
from hf_sparse.document_streams import Streamed

_VALIDATION_WORDS = {"validation", "valid", "val", "dev", "eval", "evaluation"}
_IGNORED_WORDS = {"test"}


class Documents:
    """The documents of a data set, by split.

    Args:
        dataset: a Hub id, or a local file or folder of json, jsonl, parquet or txt files, each also gzipped
            but parquet. Files of a folder with the word validation, valid, val, dev or eval in their name are
            the validation split; files with the word test are left alone.
        config: configuration of a Hub data set; None means its only one (``en`` of ``allenai/c4``).
        revision: branch, tag or commit of a Hub data set.
        text_field: the column that holds the text.
        txt_unit: what one document is in txt files: ``"paragraph"``, ``"line"`` or ``"document"``.
        max_bad_documents: how many documents that cannot be used are left out, with a warning each, in one
            pass; None means any number. They are null, no text, no JSON, or no UTF-8.
        waits: seconds before each attempt to get a lost connection back.

    Raises:
        ImportError: the ``datasets`` package is not installed.
        ValueError: the data set has no readable files, or files of several formats.
        FileNotFoundError: a local path does not exist.
        ConnectionError: the Hub was not reached, after all attempts.

    """

    def __init__(
        self,
        dataset: str,
        *,
        config: str | None = None,
        revision: str | None = None,
        text_field: str = "text",
        txt_unit: str = "paragraph",
        max_bad_documents: int | None = 100,
        waits: Sequence[float] = WAITS,
    ) -> None:
        if find_spec("datasets") is None:
            raise ImportError("reading a data set needs: pip install 'hf-sparse[train]'")
        self._name, self._field, self._waits = dataset, text_field, waits
        self._max_bad = max_bad_documents
        self._source: Files | Streamed
        if is_local(dataset):
            root = Path(dataset).expanduser()
            if not root.exists():
                raise FileNotFoundError(f"dataset={dataset!r} does not exist.")
            self._source = Files(*_local_files(root), text_field, txt_unit)
        else:
            config = config or ("en" if dataset == "allenai/c4" else None)
            hub = Streamed(dataset, config, revision, text_field)
            self._source = retried(lambda: hub.as_files(txt_unit) or hub, f"dataset={dataset!r}", waits)
        self.splits = retried(lambda: list(self._source.splits), f"dataset={dataset!r}", waits)
        self.has_validation = "validation" in self.splits

    def read(
        self,
        split: str,
        state: dict[str, Any] | None,
        *,
        part: int = 0,
        parts: int = 1,
        bad: BadDocuments | None = None,
    ) -> Iterator[tuple[str, GetState]]:
        """Texts of part ``part`` of ``parts`` of a split, in order, from ``state`` on (None: the beginning).

        With each text comes a function that gives the state just after it, until the next text is taken; its
        ``"bad"`` is the number of documents left out so far. ``bad``, from :meth:`bad_documents`, tells that
        number at any time.

        Raises:
            ValueError: too many documents cannot be used, or all of them; a file is damaged as a whole.
            ConnectionError: the connection was lost, and did not come back.

        """
        if split not in self.splits:
            raise ValueError(f"dataset={self._name!r} has no {split} split, only {', '.join(self.splits)}.")
        bad = bad or self.bad_documents(split, part=part, parts=parts)
        if state is not None:
            bad.continued(state["bad"])
        at: GetState | None = None if state is None else (lambda: state["at"])
        attempts = Attempts(f"dataset={self._name!r}", self._waits)
        while True:
            try:
                for row, get_state in self._source.rows(split, at and at(), part, parts):
                    at = get_state
                    attempts.succeeded()
                    if row.problem is None:
                        bad.good()
                        yield row.text, partial(_state, at, bad)
                    else:
                        bad.found(row.place, row.problem)
                break
            except Exception as error:
                attempts.failed(error)  # goes on after the row that came last
        bad.ended()

    def bad_documents(self, split: str, *, part: int = 0, parts: int = 1) -> BadDocuments:
        """What counts the documents that :meth:`read` leaves out."""
        where = f"the {split} split of {self._name!r}"
        if parts > 1:
            where += f" (part {part + 1} of {parts})"
        return BadDocuments(where, self._field, self._max_bad)


def _state(at: GetState, bad: BadDocuments) -> dict[str, Any]:
    return {"at": at(), "bad": bad.count}


def _local_files(root: Path) -> tuple[str, dict[str, list[str]]]:
    """The format of a file or folder, and its files by split."""
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    found = {path: kind for path in files if (kind := format_of(path.name))}
    if not found:
        raise ValueError(f"dataset={str(root)!r} has no file of a known format ({', '.join(FORMATS)}).")
    if len(kinds := sorted(set(found.values()))) > 1:
        raise ValueError(
            f"dataset={str(root)!r} mixes {' and '.join(kinds)} files; keep one format in a folder."
        )
    splits: dict[str, list[str]] = {}
    for path in found:
        relative = path.name if root.is_file() else str(path.relative_to(root))
        words = set(re.split(r"[^a-z]+", relative.lower()))
        if root.is_file() or not words & (_VALIDATION_WORDS | _IGNORED_WORDS):
            split = "train"
        elif words & _VALIDATION_WORDS:
            split = "validation"
        else:
            continue
        splits.setdefault(split, []).append(str(path.absolute()))
    return kinds[0], splits


class HeldOut:
    """Tells documents that are for evaluation alone, by a hash of their text.

    ``share`` of all documents, chosen by their hash, and the given ``texts``, whatever their hash.
    """

    def __init__(self, share: float = 0.0, texts: Sequence[str] = ()) -> None:
        self._below = share * 2**64
        self._hashes = {_hash(text) for text in texts}

    def __contains__(self, text: str) -> bool:
        value = _hash(text)
        return value < self._below or value in self._hashes


def is_local(path: str) -> bool:
    """Whether a model or data set is meant as a path, not as a Hub id."""
    return Path(path).expanduser().exists() or path.startswith((".", "/", "~")) or path.count("/") > 1


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")
