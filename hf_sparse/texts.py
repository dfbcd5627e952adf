"""Text to measure on: a data set on the Hub, local files, or what is embedded in the package."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from hf_sparse.assets.corpus import python_corpus
from hf_sparse.documents import Documents, HeldOut

EMBEDDED = "tiny"
"""Stands, as a model, for the embedded one and, as a data set, for the running Python's documentation."""


def evaluation_texts(
    dataset: str, *, config: str | None = None, text_field: str = "text", holdout: float = 1.0
) -> Iterator[str]:
    """Documents for evaluation, in a fixed order, read as a stream.

    Those of the validation split or, where a data set has none, the share ``holdout`` of its documents that a
    hash of their text selects: all by default; the training application leaves out of training what its own
    field ``holdout`` selects, by the same hash. Documents that cannot be used are left out, with a warning.

    Args:
        dataset: ``"tiny"``, a Hub id, a local file, or a local folder of json, jsonl, parquet or txt files.
        config: configuration of a Hub data set; None means its only one (``en`` of ``allenai/c4``).
        text_field: the column that holds the text.
        holdout: share of the documents, where there is no validation split.

    Raises:
        ValueError, FileNotFoundError, ImportError: see :class:`hf_sparse.documents.Documents`.

    """
    if dataset == EMBEDDED:
        yield from python_corpus().held_out
        return
    documents = Documents(dataset, config=config, text_field=text_field, max_bad_documents=None)
    if documents.has_validation:
        yield from (text for text, _ in documents.read("validation", None))
    else:
        held_out = HeldOut(holdout)
        yield from (text for text, _ in documents.read("train", None) if text in held_out)


def training_texts(dataset: str, *, config: str | None = None, text_field: str = "text") -> Iterator[str]:
    """Documents of the training split, in a fixed order, as a stream; else as :func:`evaluation_texts`."""
    if dataset == EMBEDDED:
        yield from python_corpus().train
        return
    documents = Documents(dataset, config=config, text_field=text_field, max_bad_documents=None)
    yield from (text for text, _ in documents.read("train", None))


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
