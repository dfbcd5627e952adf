"""Texts to tokens, and tokens to windows: documents joined by end-of-text tokens and cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

TOKENISE_AT_ONCE = 64
"""Texts in one call of a tokenizer: enough for its threads, few enough to wait for."""


class Tokeniser:
    """Texts to token ids, each ending in the end-of-text token; texts that are empty give no tokens.

    Raises:
        ValueError: the tokenizer has no end-of-text token.

    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no eos_token to put between texts; set one in "
                "its tokenizer_config.json, or tokenizer.eos_token."
            )
        self._tokenizer, self.end = tokenizer, int(tokenizer.eos_token_id)

    def __call__(self, texts: list[str]) -> list[list[int]]:
        if not (full := [text for text in texts if text]):
            return [[] for _ in texts]
        encoded = iter(self._tokenizer(full, return_attention_mask=False, verbose=False)["input_ids"])
        return [self._ended(next(encoded)) if text else [] for text in texts]

    def _ended(self, ids: list[int]) -> list[int]:
        if ids[-1:] == [self.end]:
            ids = ids[:-1]
        return [*ids, self.end] if ids else []


def tokenised(
    texts: Iterable[str], tokenise: Callable[[list[str]], list[list[int]]]
) -> Iterator[tuple[str, list[int]]]:
    """Each text with its tokens."""
    iterator = iter(texts)
    while chunk := list(islice(iterator, TOKENISE_AT_ONCE)):
        yield from zip(chunk, tokenise(chunk), strict=True)


def limited(texts: Iterable[str], tokenise: Tokeniser, max_tokens: int | None) -> Iterator[list[int]]:
    """The tokens of each text, ``max_tokens`` in all; None means no limit."""
    left = max_tokens
    for _, tokens in tokenised(texts, tokenise):
        taken = tokens if left is None else tokens[:left]
        yield taken
        if left is not None and (left := left - len(taken)) <= 0:
            return


def require_window(sequence_length: int) -> None:
    """Refuse windows in which no token is predicted.

    Raises:
        ValueError: ``sequence_length`` is below 2.

    """
    if sequence_length < 2:
        raise ValueError(f"sequence_length={sequence_length} leaves nothing to predict; use 2 or more.")


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
    for tokens in limited(texts, Tokeniser(tokenizer), max_tokens):
        row += tokens
        while len(row) >= sequence_length:
            full.append(row[:sequence_length])
            row = row[sequence_length:]
            if len(full) == batch_size:
                yield torch.tensor(full)
                full = []
    if full:
        yield torch.tensor(full)
    if len(row) > 1:
        yield torch.tensor([row])


def context_length(model: nn.Module) -> int | None:
    """The longest sequence that a transformers model has positions for; None if its config does not say."""
    config: Any = model.config
    return getattr(config.get_text_config(), "max_position_embeddings", None)
