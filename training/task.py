"""What a model has to learn: what becomes of sequences of text before they are given to it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from recipe import Recipe
from span_corruption import SpanCorruption
from torch import Tensor
from transformers import PreTrainedTokenizerBase


class Task:
    """The task of a recipe.

    Raises:
        ValueError: the tokenizer does not suit it.

    """

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
        spans = recipe.task == "span_corruption"
        self._seed = recipe.seed
        self._corruption = SpanCorruption(recipe.sequence_length, tokenizer) if spans else None

    def examples(self, sequences: Tensor, places: Iterable[tuple[int, int]]) -> dict[str, Tensor]:
        """``input_ids`` and ``labels`` for ``sequences`` (int64 ``[N, recipe.raw_length]``) of training.

        ``places`` has stream and number of each; they and the seed alone decide on what is random.
        """
        if self._corruption is None:
            return {"input_ids": sequences, "labels": sequences}
        return self._corrupted(sequences, (f"{self._seed}/spans/{v}/{number}" for v, number in places))

    def held_out(self, sequences: Tensor) -> dict[str, Tensor]:
        """What ``hf_sparse.measure`` takes for ``sequences``; the same for every seed."""
        if self._corruption is None:
            return {"input_ids": sequences}
        return self._corrupted(sequences, (f"held-out/spans/{number}" for number in range(len(sequences))))

    def _corrupted(self, sequences: Tensor, places: Iterable[str]) -> dict[str, Tensor]:
        assert self._corruption is not None
        pairs = [self._corruption(text, place) for text, place in zip(sequences.numpy(), places, strict=True)]
        columns = zip(("input_ids", "labels"), zip(*pairs, strict=True), strict=True)
        return {name: torch.from_numpy(np.stack(column)) for name, column in columns}
