"""Text to packed token sequences: streamed, shuffled, in an order that no process count changes.

The data is divided into V streams. Each stream reads its documents in order, shuffles blocks of them,
tokenises them and cuts the endless row of tokens into sequences; a global batch takes equally many sequences
from every stream. Process r of W serves the streams v with v % W == r. So 1, 2, 4 or 8 processes see the same
batches, and so they do with any number of workers that prepare them. A second data set that is mixed in has
streams of its own, and a stream of the recipe takes from its two by turns (``mix_in.py``).

The position of a stream is a few numbers and the reader's own state (``StreamState``), exact to the token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from data_workers import Round, from_workers, rounds
from mix_in import MixIn, Turns
from recipe import Recipe
from stream import DataExhaustedError, MixedStream, Stream, StreamState
from task import Task
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_sparse.documents import Documents, HeldOut
from hf_sparse.windows import Tokeniser, tokenised

__all__ = [
    "Batch",
    "DataExhaustedError",
    "StreamState",
    "TrainingData",
    "evaluation_data",
    "open_documents",
]

_BATCHES_AHEAD = 2


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


class TrainingData:
    """The batches of one process, prepared a little ahead in a background thread or in worker processes."""

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
            ValueError: ``world_size`` does not divide ``recipe.data_streams``, the data set to mix in
                cannot be used, or as of :class:`task.Task`.

        """
        if recipe.data_streams % world_size:
            raise ValueError(
                f"{world_size} processes cannot share data_streams={recipe.data_streams} evenly; "
                "use a number of processes that divides it, or set data_streams to a multiple of it."
            )
        self._recipe, self._world_size = recipe, world_size
        sources = [source]
        if (mix_in := recipe.mixed_in()) is not None:
            sources.append(open_documents(recipe, mix_in))
        self._task = Task(recipe, tokenizer)
        tokenise = Tokeniser(tokenizer)
        self._streams = {
            v: partial(_stream, recipe, sources, tokenise, held_out, v, (states or {}).get(v))
            for v in range(rank, recipe.data_streams, world_size)
        }

    def __iter__(self) -> Generator[Batch, None, None]:
        """Endless; close the iterator to stop what prepares it.

        Raises:
            DataExhaustedError: see :class:`stream.Stream`.
            ValueError: more than ``max_bad_documents`` of this process's documents cannot be used.
            ChildProcessError: a worker died.

        """
        each = self._recipe.global_batch // self._recipe.data_streams
        if workers := min(self._recipe.data_workers, len(self._streams)):
            for one in from_workers(self._streams, each, workers):
                yield self._batch(one)
            return
        own = rounds({v: build() for v, build in self._streams.items()}, each)
        with ThreadPoolExecutor(1, thread_name_prefix="data") as pool:
            ahead: deque[Future[Round]] = deque(pool.submit(next, own) for _ in range(_BATCHES_AHEAD))
            try:
                while True:
                    one = ahead.popleft().result()
                    ahead.append(pool.submit(next, own))
                    yield self._batch(one)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _batch(self, one: Round) -> Batch:
        rows = np.concatenate([one[v][0] for v in self._streams])
        states = {v: one[v][1] for v in self._streams}
        check_bad(sum(state.all_bad for state in states.values()), self._recipe)
        each = self._recipe.global_batch // self._recipe.data_streams
        places = [(v, state.all_sequences - n) for v, state in states.items() for n in range(each, 0, -1)]
        return Batch(**self._task.examples(torch.from_numpy(rows), places), states=states)


def check_bad(count: int, recipe: Recipe) -> None:
    """Refuse more documents that cannot be used than the recipe allows.

    Raises:
        ValueError: there are more.

    """
    if count > recipe.max_bad_documents:
        raise ValueError(
            f"max_bad_documents={recipe.max_bad_documents}, and {count:,} documents cannot be used; the "
            "warnings above say where they stand. Mend the data, or raise max_bad_documents, and --resume."
        )


def _stream(
    recipe: Recipe,
    sources: list[Documents],
    tokenise: Tokeniser,
    held_out: HeldOut,
    index: int,
    state: StreamState | None,
) -> Stream | MixedStream:
    shared: dict[str, Any] = {
        "index": index,
        "streams": recipe.data_streams,
        "sequence_length": recipe.raw_length,
        "shuffle_buffer": recipe.shuffle_buffer,
        "seed": recipe.seed,
        "held_out": held_out,
    }
    first = Stream(sources[0], tokenise, epochs=recipe.epochs, state=state, **shared)
    if (mix_in := recipe.mixed_in()) is None:
        return first
    inner = state and state.second
    second = Stream(sources[1], tokenise, epochs=mix_in.epochs, state=inner, of="mix_in.", **shared)
    return MixedStream(first, second, Turns(mix_in.share, index, recipe.data_streams))


def open_documents(recipe: Recipe, mix_in: MixIn | None = None) -> Documents:
    """The data set of a recipe, or the one that is mixed in; errors as of :class:`Documents`.

    Raises:
        ValueError: there is nothing to train on.
    """
    if mix_in is None:
        name, config, revision = recipe.dataset, recipe.dataset_config, recipe.dataset_revision
    else:
        name, config, revision = mix_in.dataset, mix_in.config, mix_in.revision
    one = mix_in or recipe
    documents = Documents(
        name,
        config=config,
        revision=revision,
        text_field=one.text_field,
        txt_unit=one.txt_unit,
        max_bad_documents=recipe.max_bad_documents,
    )
    if "train" not in documents.splits:
        raise ValueError(
            f"{'mix_in.' if mix_in else ''}dataset={name!r} has no train split, only "
            f"{', '.join(documents.splits)}."
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
