"""Files of documents, here or on the Hub, read row by row; a place in them is three numbers."""

from __future__ import annotations

import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from gzip import BadGzipFile
from io import BufferedReader
from itertools import chain
from math import gcd
from typing import Any, NamedTuple

FORMATS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".txt": "text"}
"""The format of a file by its ending; one of ``COMPRESSED`` may follow, but not after parquet."""

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

_PARQUET_ROWS = 1024  # in memory at once


class Row(NamedTuple):
    """One document, or why it is none."""

    text: str
    place: str
    """The file, and the line or row in it."""
    problem: str | None = None
    """What follows ``place`` in a sentence; None for a good document."""


State = dict[str, Any]
GetState = Callable[[], State]

_Raw = tuple[int, str, Any]
"""Number of a row in its file, its place there, and what is there: bytes to read yet, or a value."""


@dataclass(frozen=True)
class Files:
    """Files of one format, by split."""

    kind: str
    """json (lines, or one list), parquet or text."""
    splits: Mapping[str, list[str]]
    field: str
    """The column of the text, in json and parquet."""
    unit: str
    """What one document is in text files: ``"paragraph"``, ``"line"`` or ``"document"``."""

    def rows(self, split: str, state: State | None, part: int, parts: int) -> Iterator[tuple[Row, GetState]]:
        """Part ``part`` of ``parts`` from ``state`` on, each row with what gives the state just after it.

        Parts share as few files as can be: none if the number of files is a multiple of theirs. Of files that
        n parts share, each takes every n-th row.

        Raises:
            ValueError: a file is damaged as a whole, or has no column of the name.
            OSError: a file cannot be read.

        """
        groups = gcd(len(self.splits[split]), parts)
        files, share, own = self.splits[split][part % groups :: groups], parts // groups, part // groups
        at = state or {"file": 0, "row": 0, "earlier": 0}
        first, begin, earlier = at["file"], at["row"], at["earlier"]
        for index in range(first, len(files)):
            end = begin
            for number, place, raw in self._raw(files[index], begin):
                if number < begin:
                    continue
                end = number + 1
                if (earlier + number) % share == own:
                    new = {"file": index, "row": end, "earlier": earlier}
                    row = self._row(f"{files[index]}, {place}", raw)
                    yield row, lambda new=new: new  # type: ignore[misc]
            begin, earlier = 0, earlier + end

    def _raw(self, file: str, begin: int) -> Iterator[_Raw]:
        """The rows of a file; those before number ``begin`` need not be among them."""
        with _naming(file):
            if self.kind == "parquet":
                yield from _parquet(file, self.field, begin)
            elif self.kind == "json":
                yield from _json(file)
            else:
                yield from _text(file, self.unit)

    def _row(self, place: str, raw: Any) -> Row:
        try:
            if isinstance(raw, bytes):
                raw = raw.decode()
                raw = json.loads(raw) if self.kind == "json" else raw
        except UnicodeDecodeError as error:
            return Row("", place, f"is not UTF-8: {error.reason} at byte {error.start}")
        except (ValueError, RecursionError) as error:
            return Row("", place, f"is no JSON: {error}")
        if self.kind == "json" and not isinstance(raw, dict):
            return Row("", place, f"is no JSON object, but {type(raw).__name__}")
        return found_in(raw, self.field, place) if isinstance(raw, dict) else checked(raw, place)


def found_in(row: Mapping[str, Any], field: str, place: str) -> Row:
    """The text in the column ``field`` of a row."""
    if field in row:
        return checked(row[field], place)
    return Row("", place, f"has no {field!r}, but columns {', '.join(row)}")


def checked(text: Any, place: str) -> Row:
    """A row of ``text``, if it is one."""
    if text is None:
        return Row("", place, "is null")
    if not isinstance(text, str):
        return Row("", place, f"holds {type(text).__name__} and no text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return Row("", place, f"is no Unicode: {error.reason} at character {error.start}")
    return Row(text, place)


def format_of(name: str) -> str | None:
    """The format of a file by its name; None if it is none that is read."""
    bare = name
    for ending in COMPRESSED:
        bare = bare.removesuffix(ending)
    found = next((kind for ending, kind in FORMATS.items() if bare.endswith(ending)), None)
    return None if found == "parquet" and bare != name else found


@contextmanager
def _naming(file: str) -> Iterator[None]:
    """Errors of damaged files say which."""
    damaged: list[type[Exception]] = [EOFError, zlib.error, lzma.LZMAError, OSError]
    if "pyarrow" in sys.modules:
        damaged.append(sys.modules["pyarrow"].ArrowInvalid)
    try:
        yield
    except tuple(damaged) as error:
        # What decompressors and Arrow say has neither a type nor a number of the operating system.
        if isinstance(error, OSError) and (type(error) not in (OSError, BadGzipFile) or error.errno):
            raise
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file} is damaged: {reason}. Get it anew, or take it away.") from error


@contextmanager
def _opened(file: str) -> Iterator[Any]:
    import fsspec

    with fsspec.open(file, "rb", compression="infer") as opened:
        yield opened if hasattr(opened, "peek") else BufferedReader(opened)


def _lines(file: str) -> Iterator[bytes]:
    """Lines without their ends."""
    with _opened(file) as opened:
        if opened.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError(f"{file} is UTF-16 or UTF-32; write it as UTF-8.")
        if opened.peek(3)[:3] == b"\xef\xbb\xbf":
            opened.read(3)
        for line in opened:
            yield line.rstrip(b"\r\n")


def _json(file: str) -> Iterator[_Raw]:
    lines = _lines(file)
    first = next(lines, b"")
    if first.lstrip().startswith(b"["):
        rest = [first, *lines]
        try:
            items = json.loads(b"\n".join(rest))
        except (ValueError, RecursionError):
            lines = iter(rest)
        else:
            for number, item in enumerate(items):
                yield number, f"item {number + 1}", {"text": item} if isinstance(item, str) else item
            return
    else:
        lines = chain([first], lines)
    for number, line in enumerate(lines):
        if line.strip():
            yield number, f"line {number + 1}", line


def _text(file: str, unit: str) -> Iterator[_Raw]:
    if unit == "document":
        yield 0, "all of it", b"\n".join(_lines(file))
        return
    if unit == "line":
        for number, line in enumerate(_lines(file)):
            yield number, f"line {number + 1}", line
        return
    paragraph: list[bytes] = []
    count = 0
    for number, line in enumerate(chain(_lines(file), [b""])):
        if line:
            paragraph.append(line)
        elif paragraph:
            yield count, f"line {number + 1 - len(paragraph)}", b"\n".join(paragraph)
            count, paragraph = count + 1, []


def _parquet(file: str, field: str, begin: int) -> Iterator[_Raw]:
    import fsspec
    import pyarrow.parquet as pq

    with fsspec.open(file, "rb") as opened:
        parquet = pq.ParquetFile(opened)
        if field not in (names := parquet.schema_arrow.names):
            raise ValueError(f"text_field={field!r} is no column of {file}, which has {', '.join(names)}.")
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        number, wanted = 0, list(range(len(sizes)))
        while wanted and number + sizes[wanted[0]] <= begin:
            number += sizes[wanted.pop(0)]
        batches = parquet.iter_batches(_PARQUET_ROWS, row_groups=wanted, columns=[field])
        for text in chain.from_iterable(batch.column(0).to_pylist() for batch in batches):
            yield number, f"row {number + 1}", text
            number += 1
