"""Text to packed token sequences: streamed, shuffled, in an order that no process count changes.

The data is divided into V streams. Each stream reads its documents in order, shuffles blocks of them,
tokenises them and cuts the endless row of tokens into sequences; a global batch takes equally many sequences
from every stream. Process r of W serves the streams v with v % W == r. So 1, 2, 4 or 8 processes see the same
batches.

The position of a stream is a few numbers and the reader's own state (``StreamState``), exact to the token.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from recipe import Recipe
from task import Task
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_sparse.documents import Documents, HeldOut
from hf_sparse.windows import TOKENISE_AT_ONCE, Tokeniser, tokenised

_BATCHES_AHEAD = 2


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


@dataclass(frozen=True)
class Batch:
    """The part of a global batch that one process trains on."""

    input_ids: Tensor
    """int64 [global_batch / W, sequence_length]"""
    labels: Tensor
    """int64 [global_batch / W, T]"""
    states: dict[int, StreamState]
    """Of each stream of this process, after this batch."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model is given."""
        return {"input_ids": self.input_ids, "labels": self.labels}


class Stream:
    """One of the V streams: an iterator of sequences (lists of ``sequence_length`` token ids).

    ``state`` is the position after the sequence last returned. Continue from a state by passing it in.

    Raises:
        DataExhaustedError: while iterating, when all epochs are used up. The tokens left over then, fewer
            than a sequence, are dropped.

    """

    def __init__(
        self,
        read: Callable[[dict[str, Any] | None], Iterator[tuple[str, Callable[[], dict[str, Any]]]]],
        tokenise: Callable[[list[str]], list[list[int]]],
        *,
        index: int,
        sequence_length: int,
        shuffle_buffer: int,
        seed: int,
        epochs: int,
        held_out: HeldOut,
        state: StreamState | None = None,
    ) -> None:
        self._read, self._tokenise = read, tokenise
        self._index, self._length, self._block_size = index, sequence_length, shuffle_buffer
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
            f"the data ended: stream {self._index} gave {served:,} sequences of {self._length} tokens in "
            f"{self._epochs} pass{'es' if self._epochs > 1 else ''} over it"
        )

    def _documents(self) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Tokenised documents from the current state on, each with its place."""
        state, first = self.state, self.state.document
        reader, block = state.reader, state.block
        for epoch in range(state.epoch, self._epochs):
            documents = self._read(reader)
            while texts := list(islice(documents, self._block_size)):
                order = list(range(len(texts)))
                # A string seeds through SHA-512: the same order on every machine and Python version.
                random.Random(f"{self._seed}/{epoch}/{self._index}/{block}").shuffle(order)
                place = {"epoch": epoch, "block": block, "reader": reader}
                for begin in range(first, len(order), TOKENISE_AT_ONCE):
                    chosen = order[begin : begin + TOKENISE_AT_ONCE]
                    # Held-out texts become empty documents, so that places do not depend on what is held out.
                    kept = ["" if texts[i][0] in self._held_out else texts[i][0] for i in chosen]
                    for offset, tokens in enumerate(self._tokenise(kept)):
                        yield {**place, "document": begin + offset}, tokens
                reader, first = texts[-1][1](), 0
                block += 1
            reader, first, block = None, 0, 0


class TrainingData:
    """The batches of one process, prepared a little ahead in a background thread."""

    def __init__(
        self,
        recipe: Recipe,
        source: Documents,
        tokenizer: PreTrainedTokenizerBase,
        held_out: HeldOut,
        *,
        rank: int = 0,
        world_size: int = 1,
        states: dict[int, StreamState] | None = None,
    ) -> None:
        """Continue from ``states``, one for each stream that this process serves.

        Raises:
            ValueError: ``world_size`` does not divide ``recipe.data_streams``, or as of :class:`task.Task`.

        """
        if recipe.data_streams % world_size:
            raise ValueError(
                f"{world_size} processes cannot share data_streams={recipe.data_streams} evenly; "
                "use a number of processes that divides it, or set data_streams to a multiple of it."
            )
        self._per_stream = recipe.global_batch // recipe.data_streams
        self._task = Task(recipe, tokenizer)
        tokenise = Tokeniser(tokenizer)
        self._streams = {
            v: Stream(
                partial(source.read, "train", part=v, parts=recipe.data_streams),
                tokenise,
                index=v,
                sequence_length=recipe.raw_length,
                shuffle_buffer=recipe.shuffle_buffer,
                seed=recipe.seed,
                epochs=recipe.epochs,
                held_out=held_out,
                state=(states or {}).get(v),
            )
            for v in range(rank, recipe.data_streams, world_size)
        }

    def __iter__(self) -> Generator[Batch, None, None]:
        """Endless; close the iterator to stop the thread.

        Raises:
            DataExhaustedError: see :class:`Stream`.

        """
        with ThreadPoolExecutor(1, thread_name_prefix="data") as pool:
            ahead: deque[Future[Batch]] = deque(pool.submit(self._next) for _ in range(_BATCHES_AHEAD))
            try:
                while True:
                    batch = ahead.popleft().result()
                    ahead.append(pool.submit(self._next))
                    yield batch
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _next(self) -> Batch:
        rows = [row for stream in self._streams.values() for row in islice(stream, self._per_stream)]
        states = {v: copy.deepcopy(stream.state) for v, stream in self._streams.items()}
        places = [(v, one.sequences - n) for v, one in states.items() for n in range(self._per_stream, 0, -1)]
        return Batch(**self._task.examples(torch.tensor(rows, dtype=torch.int64), places), states=states)


def open_documents(recipe: Recipe) -> Documents:
    """The data set of a recipe; errors as of :class:`hf_sparse.documents.Documents`.

    Raises:
        ValueError: there is nothing to train on.
    """
    documents = Documents(
        recipe.dataset,
        config=recipe.dataset_config,
        revision=recipe.dataset_revision,
        text_field=recipe.text_field,
        txt_unit=recipe.txt_unit,
    )
    if "train" not in documents.splits:
        raise ValueError(
            f"dataset={recipe.dataset!r} has no train split, only {', '.join(documents.splits)}."
        )
    return documents


def evaluation_data(
    recipe: Recipe, source: Documents, tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, HeldOut]:
    """Sequences to evaluate on, and which documents training must therefore leave out.

    They come, in order, from the validation split, else from the share ``recipe.holdout`` of the training
    documents that a hash of their text selects. Returns int64 [up to eval_tokens // R, R], R raw_length.

    Raises:
        ValueError: there is not enough held-out text for one sequence.

    """
    split = "validation" if source.has_validation else "train"
    chosen = HeldOut(1.0 if source.has_validation else recipe.holdout)
    length = recipe.raw_length
    wanted = recipe.eval_tokens // length * length
    row: list[int] = []
    used: list[str] = []
    documents = (text for text, _ in source.read(split, None) if text in chosen)
    for text, tokens in tokenised(documents, Tokeniser(tokenizer)):
        row += tokens
        used.append(text)
        if len(row) >= wanted:
            break
    count = min(len(row), wanted) // length
    if count == 0:
        raise ValueError(
            f"the held-out text of dataset={recipe.dataset!r} has {len(row)} tokens, fewer than one sequence "
            f"of {length}; add a validation file, or raise holdout={recipe.holdout} "
            "or lower sequence_length."
        )
    sequences = torch.tensor(row[: count * length]).view(count, length)
    # A text of the validation split may stand in the training split as well.
    return sequences, HeldOut(0.0 if source.has_validation else recipe.holdout, used)
