"""Text to measure on: a data set on the Hub, local files, or what is embedded in the package."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_sparse.assets.corpus import python_corpus

EMBEDDED = "tiny"
"""Stands, as a model, for the embedded one and, as a data set, for the running Python's documentation."""

_FORMATS = {
    ".json": "json",
    ".jsonl": "json",
    ".json.gz": "json",
    ".jsonl.gz": "json",
    ".parquet": "parquet",
    ".txt": "text",
}


def evaluation_texts(
    dataset: str, *, config: str | None = None, text_field: str = "text", holdout: float = 1.0
) -> Iterator[str]:
    """Documents for evaluation, in a fixed order, read as a stream.

    Those of the validation split or, where a data set has none, the share ``holdout`` of its documents that a
    hash of their text selects: all by default; the training application leaves out of training what its own
    field ``holdout`` selects, by the same hash.

    Args:
        dataset: ``"tiny"``, a Hub id, a local file, or a local folder of json, jsonl, parquet or txt files.
        config: configuration of a Hub data set; None means its only one (``en`` of ``allenai/c4``).
        text_field: the column that holds the text.
        holdout: share of the documents, where there is no validation split.

    Raises:
        ValueError: there is no such data set, or no text in its column.
        ImportError: the ``datasets`` package is not installed.

    """
    if dataset == EMBEDDED:
        yield from python_corpus().held_out
        return
    splits = _open(dataset, config)
    split = "validation" if "validation" in splits else "train" if "train" in splits else None
    if split is None:
        raise ValueError(f"dataset={dataset!r} has no validation or train split, only {', '.join(splits)}.")
    for row in splits[split]:
        text = row.get(text_field)
        if not isinstance(text, str):
            raise ValueError(f"text_field={text_field!r} is no text; {dataset!r} has {', '.join(row)}.")
        if split == "validation" or _hash(text) < holdout * 2**64:
            yield text


def file_texts(path: str | os.PathLike[str]) -> list[str]:
    """The paragraphs of a text file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8, or has no text.

    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{str(path)!r} is not a text file in UTF-8.") from None
    if not (paragraphs := [p.strip() for p in text.split("\n\n") if p.strip()]):
        raise ValueError(f"{str(path)!r} has no text.")
    return paragraphs


def _open(dataset: str, config: str | None) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("reading a data set needs: pip install 'hf-sparse[train]'") from error
    path = Path(dataset).expanduser()
    if path.is_dir():
        return load_dataset(str(path), streaming=True)
    if path.is_file():
        kind = next((k for ending, k in _FORMATS.items() if path.name.endswith(ending)), None)
        if kind is None:
            raise ValueError(f"dataset={dataset!r} is none of {', '.join(_FORMATS)}.")
        return load_dataset(kind, data_files=str(path), streaming=True)
    if dataset.startswith((".", "/", "~")):
        raise ValueError(f"dataset={dataset!r} does not exist.")
    return load_dataset(dataset, config or ("en" if dataset == "allenai/c4" else None), streaming=True)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")
