"""Span corruption, the pretraining task of T5 (arXiv 1910.10683): find the spans that are left out of a text.

A text of R tokens is cut at random into spans that are kept and spans that are left out, by turns. The
encoder is given the kept ones with a sentinel in the place of each other one, the decoder has to give these,
each after its sentinel; both end in the end-of-text token:

    kept kept <0> kept <1> </s>    ->    <0> left <1> left left </s>

All texts of R tokens give inputs of S and targets of T tokens, 568 -> 512 and 114, for R, the share of noise
(15 %) and the mean length of its spans (3) tell how many tokens and spans there are.
"""

from __future__ import annotations

import random
from itertools import count, pairwise
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

_NOISE, _MEAN_SPAN = 0.15, 3.0


class Lengths(NamedTuple):
    """How many tokens a text, and what becomes of it, have."""

    raw: int
    """R, of the text."""
    noise: int
    """Left out of it."""
    spans: int
    """That these are in."""

    @property
    def inputs(self) -> int:
        """S: those kept, the sentinels and the end."""
        return self.raw - self.noise + self.spans + 1

    @property
    def targets(self) -> int:
        """T: those left out, the sentinels and the end."""
        return self.noise + self.spans + 1


def lengths(inputs: int) -> Lengths:
    """Those of the longest text whose corruption has ``inputs`` tokens.

    Raises:
        ValueError: ``inputs`` is too few for a span and what is around it.

    """
    if inputs < 3:
        raise ValueError(f"sequence_length={inputs} is too short for task=span_corruption; use 3 or more.")
    # One token more of text is one or none more of the inputs, so each number of these is met.
    fit = [one for raw in range(2, 2 * inputs) if (one := _of(raw)).inputs == inputs]
    return fit[-1]


def _of(raw: int) -> Lengths:
    noise = min(max(round(raw * _NOISE), 1), raw - 1)
    return Lengths(raw, noise, max(round(noise / _MEAN_SPAN), 1))


class SpanCorruption:
    """Corrupts texts of ``lengths(inputs).raw`` tokens.

    Raises:
        ValueError: the tokenizer has too few sentinels, or ``inputs`` is too few.

    """

    def __init__(self, inputs: int, tokenizer: PreTrainedTokenizerBase) -> None:
        self.lengths = lengths(inputs)
        vocabulary = tokenizer.get_vocab()
        self._sentinels: list[int] = []
        for name in (f"<extra_id_{i}>" for i in count()):
            if name not in vocabulary or len(self._sentinels) == self.lengths.spans:
                break
            self._sentinels.append(vocabulary[name])
        if (found := len(self._sentinels)) < self.lengths.spans:
            raise ValueError(
                f"task=span_corruption with sequence_length={inputs} leaves out {self.lengths.spans} spans, "
                f"and the tokenizer {tokenizer.name_or_path!r} has {found} sentinels (<extra_id_0>, "
                "<extra_id_1>, …): take the tokenizer of a T5, or a shorter sequence_length."
            )
        self._end = tokenizer.eos_token_id

    def __call__(self, text: np.ndarray, place: str) -> tuple[np.ndarray, np.ndarray]:
        """Inputs ``[S]`` and targets ``[T]`` of ``text`` ``[R]``, int64; ``place`` decides on the spans."""
        rng = random.Random(place)
        _, noise, spans = self.lengths
        kept_lengths = _cut(rng, len(text) - noise, spans)
        noise_lengths = _cut(rng, noise, spans)
        inputs: list[np.ndarray | list[int]] = []
        targets: list[np.ndarray | list[int]] = []
        at = 0
        for sentinel, kept, left in zip(self._sentinels, kept_lengths, noise_lengths, strict=True):
            inputs += [text[at : at + kept], [sentinel]]
            targets += [[sentinel], text[at + kept : at + kept + left]]
            at += kept + left
        return np.concatenate([*inputs, [self._end]]), np.concatenate([*targets, [self._end]])


def _cut(rng: random.Random, tokens: int, spans: int) -> list[int]:
    """Lengths, at least 1 and each such row as likely, of ``spans`` spans that ``tokens`` are cut into."""
    cuts = [0, *sorted(rng.sample(range(1, tokens), spans - 1)), tokens]
    return [after - before for before, after in pairwise(cuts)]
