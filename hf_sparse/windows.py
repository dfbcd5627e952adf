"""Texts to windows of tokens: documents joined by end-of-text tokens and cut, as in training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

_TOKENISE_AT_ONCE = 64


def windows(
    texts: Iterable[str], tokenizer: Any, *, sequence_length: int, batch_size: int, max_tokens: int | None
) -> Iterator[Tensor]:
    """Batches int64 ``[<= batch_size, sequence_length]``; the rest of the text comes as one shorter window.

    A rest of one token predicts nothing and is dropped.

    Raises:
        ValueError: the tokenizer has no end-of-text token.

    """
    full: list[list[int]] = []
    row: list[int] = []
    left = float("inf") if max_tokens is None else max_tokens
    for document in _tokenised(texts, tokenizer):
        take = document[: int(min(left, len(document)))]
        left -= len(take)
        row += take
        while len(row) >= sequence_length:
            full.append(row[:sequence_length])
            row = row[sequence_length:]
            if len(full) == batch_size:
                yield torch.tensor(full)
                full = []
        if left <= 0:
            break
    if full:
        yield torch.tensor(full)
    if len(row) > 1:
        yield torch.tensor([row])


def _tokenised(texts: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no eos_token to put between texts; set one, or "
            "give measure() batches of input_ids."
        )
    iterator = iter(texts)
    while chunk := list(islice(iterator, _TOKENISE_AT_ONCE)):
        for ids in tokenizer(chunk, return_attention_mask=False, verbose=False)["input_ids"]:
            if ids and ids != [end]:
                yield ids if ids[-1] == end else [*ids, end]
