"""Perplexity with windows that overlap: that of the recipe which transformers documents."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse.assets import TINY_MODEL
from hf_sparse.assets.corpus import python_corpus
from hf_sparse.windows import Tokeniser


@pytest.fixture(scope="module")
def known():
    texts = [text for _, text in zip(range(3), python_corpus().held_out, strict=False)]
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL).eval()
    return model, AutoTokenizer.from_pretrained(TINY_MODEL), texts


def recipe(model, ids: torch.Tensor, length: int, stride: int, lost: int) -> float:
    """As documented: a window's mean loss counts for its new tokens, less ``lost``."""
    total, count, before = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + length, ids.shape[1])
        new = end - before
        window = ids[:, begin:end]
        targets = window.clone()
        targets[:, :-new] = -100
        with torch.no_grad():
            loss = float(model(window, labels=targets).loss)
        size = new - 1 if begin == 0 else new - lost
        total, count = total + loss * size, count + size
        before = end
        if end == ids.shape[1]:
            break
    return math.exp(total / count)


def joined(texts: list[str], tokenizer, most: int | None = None) -> list[int]:
    """The tokens of all, with an end between two."""
    ids = [one for text in Tokeniser(tokenizer)(texts) for one in text][:most]
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


@pytest.mark.parametrize("name", ["one", "some", "with empty ones"])
def test_whole_texts_end_where_they_end(known, name) -> None:
    model, tokenizer, _ = known
    texts = {
        "one": ["A text of few words."],
        "some": ["A text.", "And another one."],
        "with empty ones": ["", "A text.", "", "And another.", "", ""],
    }[name]
    text = tokenizer.eos_token.join(one for one in texts if one)
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == joined(texts, tokenizer)
    data = hf_sparse.sliding_windows(texts, tokenizer, sequence_length=64, stride=32)
    report = hf_sparse.measure(model, data)
    assert report.predicted_tokens == ids.shape[1] - 1
    assert report.perplexity == pytest.approx(recipe(model, ids, 64, 32, lost=1), rel=1e-5)


@pytest.mark.parametrize(
    ("length", "stride", "tokens"), [(48, 24, 300), (48, 47, 301), (48, 7, 130), (48, 16, 48)]
)
def test_perplexity_is_that_of_the_recipe(known, length, stride, tokens) -> None:
    model, tokenizer, texts = known
    ids = torch.tensor([joined(texts, tokenizer, tokens)])
    data = hf_sparse.sliding_windows(
        texts, tokenizer, sequence_length=length, stride=stride, batch_size=3, max_tokens=tokens
    )
    report = hf_sparse.measure(model, data)
    assert report.predicted_tokens == tokens - 1
    assert report.perplexity == pytest.approx(recipe(model, ids, length, stride, lost=0), rel=1e-5)
    # Its own weights, which take one token off every window.
    assert report.perplexity == pytest.approx(recipe(model, ids, length, stride, lost=1), rel=0.05)


def test_without_overlap_it_is_measure(known) -> None:
    model, tokenizer, texts = known
    data = hf_sparse.sliding_windows(texts, tokenizer, sequence_length=32, stride=32, max_tokens=300)
    report = hf_sparse.measure(model, data)
    plain = hf_sparse.measure(model, texts, tokenizer=tokenizer, sequence_length=32, max_tokens=300)
    assert report.predicted_tokens == plain.predicted_tokens
    assert report.perplexity == pytest.approx(plain.perplexity)
    assert report.sparsity == plain.sparsity


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 90), st.integers(2, 20), st.integers(1, 20), st.integers(1, 4))
def test_each_token_is_new_once(known, tokens, length, stride, batch_size) -> None:
    _, tokenizer, texts = known
    stride = min(stride, length)
    ids = joined(texts, tokenizer, max(tokens, 1))
    sizes = {"sequence_length": length, "stride": stride, "batch_size": batch_size}
    batches = list(hf_sparse.sliding_windows(texts, tokenizer, **sizes, max_tokens=max(tokens, 1)))
    new = [int(label) for one in batches for label in one["labels"].flatten() if label != -100]
    # A rest of one token without context predicts nothing.
    assert new == (ids if stride < length or len(ids) % length != 1 else ids[:-1]) or len(ids) == 1
    assert all(one["input_ids"].shape[0] <= batch_size for one in batches)
    windows = [row for one in batches for row in one["input_ids"].tolist()]
    assert all(row == ids[i * stride : i * stride + length] for i, row in enumerate(windows))


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"sequence_length": 1, "stride": 1}, "sequence_length=1"),
        ({"sequence_length": 8, "stride": 0}, "stride=0"),
        ({"sequence_length": 8, "stride": 9}, "stride=9"),
        ({"sequence_length": 8, "stride": 4, "max_tokens": 0}, "max_tokens=0"),
    ],
)
def test_bad_sizes_are_named_at_once(known, sizes, named) -> None:
    with pytest.raises(ValueError, match=named):
        hf_sparse.sliding_windows(["a"], known[1], **sizes)
