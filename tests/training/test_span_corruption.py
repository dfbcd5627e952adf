"""Span corruption: nothing is lost, every length is exact, and a place decides on all that is random."""

from __future__ import annotations

import re
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from data import Batch, TrainingData, evaluation_data, open_documents
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe import Recipe
from span_corruption import SpanCorruption, lengths
from task import Task
from transformers import AutoTokenizer

from support.runs import sentences, write_jsonl

FIRST, LAST = 3, 22  # the ids of the sentinels of the tiny T5; its end is 1


@pytest.fixture(scope="module")
def t5_tokenizer(tiny_t5):
    return AutoTokenizer.from_pretrained(tiny_t5)


def put_together(inputs: list[int], targets: list[int]) -> list[int]:
    """The text, by hand: each sentinel of the inputs is replaced by what follows it in the targets."""
    assert inputs[-1] == targets[-1] == 1
    spans: dict[int, list[int]] = {}
    for token in targets[:-1]:
        if FIRST <= token <= LAST:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    assert all(spans.values())  # none is empty
    assert list(spans) == list(range(FIRST, FIRST + len(spans)))  # in the order of the tokenizer's names
    text = [t for token in inputs[:-1] for t in (spans.pop(token) if FIRST <= token <= LAST else [token])]
    assert not spans
    return text


def test_the_published_lengths():
    found = lengths(512)
    assert (found.raw, found.noise, found.inputs, found.targets) == (568, 85, 512, 114)


@settings(deadline=None, max_examples=30)
@given(inputs=st.integers(3, 340), place=st.text(max_size=5), seed=st.integers(0, 99))
def test_inputs_and_targets_have_exact_lengths_and_make_the_text(t5_tokenizer, inputs, place, seed):
    corruption = SpanCorruption(inputs, t5_tokenizer)
    size = corruption.lengths
    text = np.random.default_rng(seed).integers(LAST + 1, 160, size.raw)
    given, wanted = corruption(text, place)
    assert (len(given), len(wanted)) == (inputs, size.targets)
    assert put_together(given.tolist(), wanted.tolist()) == text.tolist()
    assert size.noise == pytest.approx(0.15 * size.raw, abs=1)
    # It is the longest text that comes to so many inputs.
    assert lengths(inputs + 1).raw > size.raw


def test_a_case_by_hand(t5_tokenizer):
    text = np.arange(30, 47)  # 17 tokens: 3 of noise in one span, which is the last
    given, wanted = SpanCorruption(16, t5_tokenizer)(text, "anywhere")
    assert given.tolist() == [*range(30, 44), FIRST, 1]
    assert wanted.tolist() == [FIRST, 44, 45, 46, 1]


def test_all_ways_of_cutting_are_as_likely(t5_tokenizer):
    # 40 tokens: 6 of noise in two spans, of which the first has 1 to 5.
    corruption = SpanCorruption(37, t5_tokenizer)
    assert corruption.lengths[1:] == (6, 2)
    text = np.full(corruption.lengths.raw, 50)
    firsts = [corruption(text, str(n))[1].tolist().index(FIRST + 1) - 1 for n in range(2000)]
    assert np.bincount(firsts, minlength=6)[1:] == pytest.approx([400] * 5, abs=90)  # 5 standard deviations


def test_the_place_alone_decides(t5_tokenizer):
    recipe = Recipe(task="span_corruption", sequence_length=64, seed=1)
    task, other = (Task(r, t5_tokenizer) for r in (recipe, Recipe(**{**recipe.to_dict(), "seed": 2})))
    texts = torch.arange(3 * recipe.raw_length).view(3, -1) % 100 + 30
    places = [(0, 0), (0, 1), (5, 0)]
    whole = task.examples(texts, places)
    assert whole["input_ids"].shape == (3, 64)
    for i, place in enumerate(places):
        alone = Task(recipe, t5_tokenizer).examples(texts[i : i + 1], [place])
        assert all(torch.equal(alone[name][0], whole[name][i]) for name in whole)
    same = texts[:1].expand(3, -1)
    corrupted = task.examples(same, places)["input_ids"]
    assert len({tuple(row) for row in corrupted.tolist()}) == 3
    assert not torch.equal(other.examples(same, places)["input_ids"], corrupted)
    assert torch.equal(task.held_out(texts)["labels"], other.held_out(texts)["labels"])


def test_processes_and_interruptions_change_no_example(t5_tokenizer, texts, tmp_path):
    """With a second data set mixed in, whose sequences count as well."""
    other = write_jsonl(tmp_path / "more.jsonl", sentences(200, 7))
    recipe = Recipe(
        dataset=str(texts),
        mix_in={"dataset": str(other), "share": 0.4},
        task="span_corruption",
        sequence_length=20,
        global_batch=16,
        eval_tokens=320,
    )
    source = open_documents(recipe)
    _, held_out = evaluation_data(recipe, source, t5_tokenizer)

    def batches(count: int, **arguments: Any) -> list[Batch]:
        with closing(iter(TrainingData(recipe, source, t5_tokenizer, held_out, **arguments))) as data:
            return list(islice(data, count))

    def rows(*parts: Batch) -> list[list[list[int]]]:
        return [
            [*pair] for one in parts for pair in zip(one.input_ids.tolist(), one.labels.tolist(), strict=True)
        ]

    whole = batches(4)
    ids = rows(*whole)
    assert len({str(row) for row in ids}) == 4 * 16
    two = [batches(4, rank=rank, world_size=2) for rank in (0, 1)]
    for step in range(4):
        assert sorted(rows(whole[step])) == sorted(rows(two[0][step], two[1][step]))
    assert rows(*batches(2, states=whole[1].states)) == rows(*whole[2:])


def test_a_tokenizer_with_too_few_sentinels_is_refused(tokenizer, t5_tokenizer):
    with pytest.raises(ValueError, match=r"sequence_length=64 leaves out \d spans.*has 0 sentinels"):
        SpanCorruption(64, tokenizer)
    with pytest.raises(ValueError, match=r"leaves out 28 spans.*has 20 sentinels.*shorter sequence_length"):
        SpanCorruption(512, t5_tokenizer)
    with pytest.raises(ValueError, match=re.escape("sequence_length=2 is too short")):
        Recipe(task="span_corruption", sequence_length=2)
