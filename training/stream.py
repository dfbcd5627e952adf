"""One stream of training sequences: documents shuffled in blocks, tokenised, joined and cut."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from mix_in import Turns

from hf_sparse.documents import Documents, HeldOut
from hf_sparse.windows import TOKENISE_AT_ONCE


class DataExhaustedError(RuntimeError):
    """The data ended before the run did."""


@dataclass
class StreamState:
    """Where a stream stands.

    The next token is number ``token`` of document ``document``, in shuffled order, of the block that begins
    where ``reader`` stands.
    """

    epoch: int = 0
    block: int = 0
    reader: dict[str, Any] | None = None
    """State of the reader at the beginning of the block; None is the beginning of the data."""
    document: int = 0
    token: int = 0
    sequences: int = 0
    """Sequences served since the beginning of the run."""
    bad: int = 0
    """Documents left out so far. Every pass leaves out the same; they count once."""
    second: StreamState | None = None
    """Of the data set that is mixed in."""

    def __post_init__(self) -> None:
        if isinstance(self.second, dict):  # as it comes from JSON
            self.second = StreamState(**self.second)

    @property
    def all_sequences(self) -> int:
        """Sequences served since the beginning of the run, of both data sets."""
        return self.sequences + (self.second.sequences if self.second else 0)

    @property
    def all_bad(self) -> int:
        """Documents left out so far, of both data sets."""
        return self.bad + (self.second.bad if self.second else 0)


class Stream:
    """One of the V streams: an iterator of sequences (lists of ``sequence_length`` token ids).

    ``state`` is the position after the sequence last returned. Continue from a state by passing it in.

    Raises:
        DataExhaustedError: while iterating, when all epochs are used up. The tokens left over then, fewer
            than a sequence, are dropped.
        ValueError, ConnectionError: as of :meth:`hf_sparse.documents.Documents.read`.

    """

    def __init__(
        self,
        source: Documents,
        tokenise: Callable[[list[str]], list[list[int]]],
        *,
        index: int,
        streams: int,
        sequence_length: int,
        shuffle_buffer: int,
        seed: int,
        epochs: int,
        held_out: HeldOut,
        state: StreamState | None = None,
        of: str = "",
    ) -> None:
        """``of`` stands before the name of a field in messages: ``"mix_in."`` for the second data set."""
        self._source, self._tokenise, self._of = source, tokenise, of
        self._index, self._streams = index, streams
        self._length, self._block_size = sequence_length, shuffle_buffer
        self._seed, self._epochs, self._held_out = seed, epochs, held_out
        self.state = copy.deepcopy(state) or StreamState()
        self._iterator = self._sequences()

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        return next(self._iterator)

    def _sequences(self) -> Iterator[list[int]]:
        served, skip = self.state.sequences, self.state.token
        row: list[int] = []
        for place, tokens in self._documents():
            start, skip = skip, 0
            while len(row) + len(tokens) - start >= self._length:
                stop = start + self._length - len(row)
                row += tokens[start:stop]
                start, served = stop, served + 1
                self.state = StreamState(**{**place, "token": start, "sequences": served})
                yield row
                row = []
            row += tokens[start:]
        raise DataExhaustedError(
            f"the data ended: stream {self._index} gave {served:,} sequences of {self._length} tokens of "
            f"{self._of}dataset in {self._of}epochs={self._epochs}"
        )

    def _documents(self) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Tokenised documents from the current state on, each with its place."""
        state, first, bad = self.state, self.state.document, self.state.bad
        reader, block = state.reader, state.block
        part = {"part": self._index, "parts": self._streams}
        for epoch in range(state.epoch, self._epochs):
            counted = self._source.bad_documents("train", **part)
            documents = self._source.read("train", reader, **part, bad=counted)
            while texts := list(islice(documents, self._block_size)):
                bad = max(bad, counted.count)
                order = list(range(len(texts)))
                # A string seeds through SHA-512: the same order on every machine and Python version.
                random.Random(f"{self._seed}/{epoch}/{self._index}/{block}").shuffle(order)
                place = {"epoch": epoch, "block": block, "reader": reader, "bad": bad}
                for begin in range(first, len(order), TOKENISE_AT_ONCE):
                    chosen = order[begin : begin + TOKENISE_AT_ONCE]
                    # Held-out texts become empty documents, so that places do not depend on what is held out.
                    kept = ["" if texts[i][0] in self._held_out else texts[i][0] for i in chosen]
                    for offset, tokens in enumerate(self._tokenise(kept)):
                        yield {**place, "document": begin + offset}, tokens
                reader, first = texts[-1][1](), 0
                block += 1
            bad = max(bad, counted.count)
            reader, first, block = None, 0, 0


class MixedStream:
    """A stream that takes its sequences from two by turns; as :class:`Stream` in all else."""

    def __init__(self, first: Stream, second: Stream, turns: Turns) -> None:
        self._first, self._second, self._turns = first, second, turns

    @property
    def state(self) -> StreamState:
        """The position after the sequence last returned, of both."""
        return replace(self._first.state, second=self._second.state)

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        given = self._first.state.sequences + self._second.state.sequences
        return next(self._second if self._turns.second(given) else self._first)
