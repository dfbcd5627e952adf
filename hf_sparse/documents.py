"""Documents of a data set on the Hub or of local files, read as a stream; and which are held out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

_FORMATS = {
    ".json": "json",
    ".jsonl": "json",
    ".json.gz": "json",
    ".jsonl.gz": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".txt.gz": "text",
}
_VALIDATION_WORDS = {"validation", "valid", "val", "dev", "eval", "evaluation"}
_IGNORED_WORDS = {"test"}

GetState = Callable[[], dict[str, Any]]


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

    Raises:
        ImportError: the ``datasets`` package is not installed.
        ValueError: the data set has no readable files, or files of several formats.
        FileNotFoundError: a local path does not exist.

    """

    def __init__(
        self,
        dataset: str,
        *,
        config: str | None = None,
        revision: str | None = None,
        text_field: str = "text",
        txt_unit: str = "paragraph",
    ) -> None:
        try:
            from datasets import get_dataset_split_names
        except ImportError as error:
            raise ImportError("reading a data set needs: pip install 'hf-sparse[train]'") from error
        self._name, self._field = dataset, text_field
        self._load: dict[str, Any]
        if is_local(dataset):
            root = Path(dataset).expanduser()
            if not root.exists():
                raise FileNotFoundError(f"dataset={dataset!r} does not exist.")
            kind, splits = _local_files(root)
            self._load = {"path": kind, "data_files": splits}
            if kind == "text":
                # The text builder names its one column "text".
                self._load["sample_by"], self._field = txt_unit, "text"
            names = list(splits)
        else:
            config = config or ("en" if dataset == "allenai/c4" else None)
            self._load = {"path": dataset, "name": config, "revision": revision}
            names = get_dataset_split_names(dataset, config, revision=revision)
        self.splits: list[str] = list(names)
        self.has_validation = "validation" in names
        self._opened: dict[str, Any] = {}

    def read(
        self, split: str, state: dict[str, Any] | None, *, part: int = 0, parts: int = 1
    ) -> Iterator[tuple[str, GetState]]:
        """Texts of part ``part`` of ``parts`` of a split, in order, from ``state`` on (None: the beginning).

        With each text comes a function that gives the state just after it, until the next text is taken. Rows
        whose text is null are left out.

        Raises:
            ValueError: the text column is missing, or holds something else than text, or nothing but nulls.

        """
        from datasets.distributed import split_dataset_by_node

        if split not in self.splits:
            raise ValueError(f"dataset={self._name!r} has no {split} split, only {', '.join(self.splits)}.")
        # A fresh object for each pass: a data set that was given a state starts from it every time.
        data = split_dataset_by_node(self._open(split), rank=part, world_size=parts)
        if state is not None:
            data.load_state_dict(state)
        nulls, texts = 0, 0
        for row in data:
            text = row.get(self._field)
            if isinstance(text, str):
                texts += 1
                yield text, data.state_dict
            elif text is None and self._field in row:
                nulls += 1
            else:
                have = (
                    f"has columns {', '.join(row)}" if text is None else f"holds {type(text).__name__} there"
                )
                raise ValueError(
                    f"text_field={self._field!r} is no text: the {split} split of {self._name!r} {have}."
                )
        if nulls and not texts and state is None:
            where = f"the {split} split of {self._name!r}"
            if parts > 1:
                where += f", part {part + 1} of {parts}"
            raise ValueError(
                f"text_field={self._field!r} is null in every row of {where} ({nulls:,} rows); name the "
                "column that holds the text."
            )

    def _open(self, split: str) -> Any:
        from datasets import load_dataset

        if split not in self._opened:
            self._opened[split] = load_dataset(**self._load, split=split, streaming=True)
        return self._opened[split]


def _local_files(root: Path) -> tuple[str, dict[str, list[str]]]:
    """The ``datasets`` builder for a file or folder, and its files by split."""
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    found = {path: kind for path in files if (kind := _format(path))}
    if not found:
        raise ValueError(f"dataset={str(root)!r} has no file of a known format ({', '.join(_FORMATS)}).")
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


def _format(path: Path) -> str | None:
    # Endings, longest first: "a.json.gz" is json, and "v1.2.txt" is text.
    return next(
        (k for ending, k in sorted(_FORMATS.items(), reverse=True) if path.name.endswith(ending)), None
    )


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
