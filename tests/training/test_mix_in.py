"""A second data set is mixed in: its share, the order, and where a run continues."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import pytest
import torch
from arguments import parse_recipe
from data import StreamState, TrainingData, evaluation_data, open_documents
from mix_in import MixIn, Turns
from recipe import Recipe

from support.runs import sentences, write_jsonl

LENGTH = 16


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> Path:
    """A second data set: words that the first one does not have, in another column."""
    path = tmp_path_factory.mktemp("code") / "train.jsonl"
    lines = [{"content": f"{i} " + "def return " * (4 + i % 9)} for i in range(300)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def recipe_for(texts: Path, code: Path, share: float = 0.25, **fields) -> Recipe:
    mix_in = {"dataset": str(code), "share": share, "text_field": "content", **fields.pop("mix_in", {})}
    some = {"sequence_length": LENGTH, "global_batch": 16, "eval_tokens": 320, "shuffle_buffer": 7}
    return Recipe(dataset=str(texts), mix_in=mix_in, **{**some, **fields})


def batches(recipe: Recipe, tokenizer, count: int, **arguments) -> list:
    source = open_documents(recipe)
    _, held_out = evaluation_data(recipe, source, tokenizer)
    iterator = iter(TrainingData(recipe, source, tokenizer, held_out, **arguments))
    try:
        return list(islice(iterator, count))
    finally:
        iterator.close()


def is_code(row: torch.Tensor, tokenizer) -> bool:
    """Of one source as a whole: the words of the other are not there."""
    text = tokenizer.decode(row).replace(" ", "")
    found = "return" in text
    assert found != any(word in text for word in ("sleeps", "because", "river", "green", "under", "tree"))
    return found


def test_every_batch_has_its_share_and_every_sequence_one_source(texts, code, tokenizer):
    for share, expected in ((0.25, 4), (0.5, 8)):
        for batch in batches(recipe_for(texts, code, share), tokenizer, 4):
            assert sum(is_code(row, tokenizer) for row in batch.input_ids) == expected


@pytest.mark.parametrize("share", [0.2, 0.01, 1 / 3, 0.999])
@pytest.mark.parametrize("streams", [1, 3, 8])
def test_turns_keep_the_share_exactly(share, streams):
    turns = [Turns(share, stream, streams) for stream in range(streams)]
    given = 0
    for sequence in range(400):
        given += sum(one.second(sequence) for one in turns)
        assert abs(given - share * streams * (sequence + 1)) < 1 + 1e-3


def test_without_it_the_first_is_in_the_same_order(texts, code, tokenizer):
    mixed = torch.cat([b.input_ids for b in batches(recipe_for(texts, code, global_batch=8), tokenizer, 8)])
    alone = batches(recipe_for(texts, code, global_batch=8, mix_in={"share": 1e-6}), tokenizer, 6)
    first = [row.tolist() for row in mixed if not is_code(row, tokenizer)]
    assert len(first) == 48
    assert sorted(first) == sorted(row.tolist() for batch in alone for row in batch.input_ids)


def test_any_number_of_processes_sees_the_same_and_continues_to_the_token(texts, code, tokenizer):
    recipe = recipe_for(texts, code, shuffle_buffer=3)
    whole = batches(recipe, tokenizer, 8)
    stored = json.loads(json.dumps({v: asdict(state) for v, state in whole[3].states.items()}))
    states = {int(v): StreamState(**state) for v, state in stored.items()}
    assert states == whole[3].states
    for world in (1, 2, 8):
        parts = [batches(recipe, tokenizer, 4, rank=r, world_size=world, states=states) for r in range(world)]
        for step in range(4):
            found = torch.cat([part[step].input_ids for part in parts]).tolist()
            assert sorted(found) == sorted(whole[4 + step].input_ids.tolist())
            assert {v: s for part in parts for v, s in part[step].states.items()} == whole[4 + step].states


def test_the_end_of_the_second_is_said_and_its_epochs_go_over_it_again(texts, code, tokenizer):
    few = write_jsonl(code.parent / "few" / "train.jsonl", sentences(9, 5))
    fields = {"mix_in": {"text_field": "text"}, "data_streams": 1}
    from data import DataExhaustedError

    with pytest.raises(DataExhaustedError, match=r"of mix_in.dataset in mix_in.epochs=1"):
        batches(recipe_for(texts, few, **fields), tokenizer, 20)
    fields["mix_in"]["epochs"] = 99
    assert len(batches(recipe_for(texts, few, **fields), tokenizer, 20)) == 20


def test_evaluated_texts_are_not_trained_on_where_the_second_has_them(tmp_path, tokenizer):
    shared = sentences(30, 5)
    write_jsonl(tmp_path / "a/train.jsonl", sentences(200, 6))
    write_jsonl(tmp_path / "a/valid.jsonl", shared)
    second = write_jsonl(tmp_path / "b.jsonl", sentences(60, 7) + shared)
    fields = {"mix_in": {"text_field": "text"}, "data_streams": 1, "global_batch": 1, "eval_tokens": 10_000}
    rows = [b.input_ids for b in batches(recipe_for(tmp_path / "a", second, 0.5, **fields), tokenizer, 150)]
    text = tokenizer.decode(torch.cat(rows).flatten()).replace(" ", "")
    assert "7-1" in text
    assert not any(f"5-{i}" in text for i in range(30))


def test_it_is_a_part_of_a_recipe_and_its_fields_are_options(texts, code):
    line = ["--mix-in", f"{{dataset: {code}, share: 0.1}}", "--mix-in.share", "0.3", "--mix-in.epochs", "2"]
    recipe = parse_recipe(["--dataset", str(texts), *line])
    assert recipe.mixed_in() == MixIn(dataset=str(code), share=0.3, epochs=2)
    assert Recipe(**json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert Recipe().mixed_in() is None
    assert Recipe(dataset=str(texts)).changed(recipe.to_dict()) != []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"share": 0.2}, "mix_in has no dataset"),
        ({"dataset": "a/b"}, "mix_in has no share"),
        ({"dataset": "a/b", "share": 1}, "mix_in.share=1 cannot be used: it must be a fraction between"),
        ({"dataset": "a/b", "share": 0.1, "weight": 2}, "unknown fields in mix_in: weight"),
        ({"dataset": "a/b", "share": 0.1, "epochs": 0}, "mix_in.epochs=0"),
        ("a/b", "mix_in is a mapping"),
    ],
)
def test_mistakes_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        Recipe(mix_in=given)
