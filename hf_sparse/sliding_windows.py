"""Windows that overlap, so that each token is predicted once and with context before it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from hf_sparse.checks import require_positive
from hf_sparse.observing.encoder_decoder import IGNORED
from hf_sparse.windows import Tokeniser, limited, require_window


def sliding_windows(
    texts: Iterable[str],
    tokenizer: Any,
    *,
    sequence_length: int,
    stride: int,
    batch_size: int = 4,
    max_tokens: int | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Batches for :func:`hf_sparse.measure` whose windows begin ``stride`` tokens after one another.

    This is the recipe that transformers documents for the perplexity of models with a fixed context:
    texts are one sequence (here with an end-of-text token between two), a window has ``sequence_length``
    tokens of it, and the loss is over those that no window before it had. With a stride below
    ``sequence_length``, each of them has at least ``sequence_length - stride`` tokens before it, but for
    those of the first window, whose first token alone is not predicted. With the two equal nothing
    overlaps, and the first token of each window is not predicted. The last window ends with the text and
    may be shorter.

    The mean is over tokens. The documented recipe takes each window's mean times its number of new tokens
    less one, so that its last digits differ. Activation sparsity is over all tokens of the batches: those
    that overlap count each time they are computed.

    Args:
        texts: as of ``measure``.
        tokenizer: with an end-of-text token.
        sequence_length: tokens of a window, at most the model's context.
        stride: tokens from window to window, 1 to ``sequence_length``.
        batch_size: windows in a batch.
        max_tokens: of the texts; None means all.

    Returns:
        Mappings of ``input_ids`` and ``labels`` int64 ``[<= batch_size, sequence_length]``, labels being -100
        where a window before has had the token.

    Raises:
        ValueError: a size is out of range; the tokenizer has no end-of-text token.

    """
    require_window(sequence_length)
    if not 1 <= stride <= sequence_length:
        raise ValueError(f"stride={stride} is out of range; use 1 to sequence_length={sequence_length}.")
    require_positive(batch_size=batch_size, max_tokens=max_tokens)
    return _batches(texts, Tokeniser(tokenizer), sequence_length, stride, batch_size, max_tokens)


def _batches(
    texts: Iterable[str],
    tokenise: Tokeniser,
    length: int,
    stride: int,
    batch_size: int,
    max_tokens: int | None,
) -> Iterator[dict[str, Tensor]]:
    full: list[tuple[list[int], int]] = []
    tokens = _joined(limited(texts, tokenise, max_tokens), tokenise.end)
    for window, new in _windows(tokens, length, stride):
        if len(window) == length:
            full.append((window, new))
        if full and (len(full) == batch_size or len(window) < length):
            yield _batch(full)
            full = []
        if len(window) < length:
            yield _batch([(window, new)])
    if full:
        yield _batch(full)


def _joined(texts: Iterable[list[int]], end: int) -> Iterator[int]:
    """All tokens, but for an end-of-text token after which there is nothing."""
    ended = False
    for tokens in texts:
        if not tokens:
            continue
        if ended:
            yield end
        ended = tokens[-1] == end
        yield from tokens[:-1] if ended else tokens


def _windows(stream: Iterator[int], length: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """Windows, and how many of their last tokens are new."""
    window: list[int] = []
    new = 0
    for token in stream:
        if len(window) == length:
            yield window, new
            window, new = window[stride:], 0  # another list: the one before is the caller's
        window.append(token)
        new += 1
    if len(window) > 1:
        yield window, new


def _batch(windows: list[tuple[list[int], int]]) -> dict[str, Tensor]:
    input_ids = torch.tensor([window for window, _ in windows])
    labels = input_ids.clone()
    for row, (window, new) in zip(labels, windows, strict=True):
        row[: len(window) - new] = IGNORED
    return {"input_ids": input_ids, "labels": labels}
