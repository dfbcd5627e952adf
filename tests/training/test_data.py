from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import pytest
import torch
from data import (
    DataExhaustedError,
    StreamState,
    TrainingData,
    evaluation_data,
    open_documents,
)
from recipe import Recipe

import hf_sparse.texts
from hf_sparse.documents import HeldOut
from hf_sparse.windows import Tokeniser
from support.runs import sentences, write_jsonl


def recipe_for(dataset: Path, **fields) -> Recipe:
    defaults = {"sequence_length": 16, "global_batch": 16, "eval_tokens": 320, "shuffle_buffer": 7}
    return Recipe(dataset=str(dataset), **{**defaults, **fields})


def training_data(recipe, tokenizer, **arguments):
    source = open_documents(recipe)
    _, held_out = evaluation_data(recipe, source, tokenizer)
    return TrainingData(recipe, source, tokenizer, held_out, **arguments)


def batches(data, count):
    iterator = iter(data)
    try:
        return list(islice(iterator, count))
    finally:
        iterator.close()


def to_the_end(data) -> tuple[torch.Tensor, str]:
    rows = []
    try:
        for batch in data:
            rows.append(batch.input_ids)
    except DataExhaustedError as error:
        return torch.cat(rows), str(error)
    raise AssertionError("the data did not end")


def as_tokens(texts, tokenizer) -> list[tuple[int, ...]]:
    return [tuple(tokenizer(text)["input_ids"]) for text in texts]


def documents_of(rows: torch.Tensor, tokenizer) -> list[tuple[int, ...]]:
    """The documents in packed sequences, without a last one that is cut."""
    documents, current = [], []
    for token in rows.flatten().tolist():
        if token == tokenizer.eos_token_id:
            documents.append(tuple(current))
            current = []
        else:
            current.append(token)
    return documents


@pytest.fixture(params=["jsonl", "json.gz", "parquet", "txt"])
def any_format(request, tmp_path) -> Path:
    """One train file and one validation file in each format that is read."""
    from datasets import Dataset

    for split, seed, count in (("train", 0, 200), ("validation", 1, 40)):
        texts = sentences(count, seed)
        path = tmp_path / f"{split}.{request.param}"
        if request.param == "parquet":
            Dataset.from_dict({"text": texts}).to_parquet(path)
        elif request.param == "txt":
            path.write_text("\n\n".join(texts))
        else:
            write_jsonl(path, texts)
    return tmp_path


def test_any_number_of_processes_sees_the_same_global_batches(texts, tokenizer):
    recipe = recipe_for(texts)
    alone = batches(training_data(recipe, tokenizer), 6)
    for world in (2, 4, 8):
        parts = [batches(training_data(recipe, tokenizer, rank=r, world_size=world), 6) for r in range(world)]
        for step, whole in enumerate(alone):
            found = torch.cat([part[step].input_ids for part in parts]).tolist()
            assert sorted(found) == sorted(whole.input_ids.tolist())
            states = {v: s for part in parts for v, s in part[step].states.items()}
            assert states == whole.states


@pytest.mark.parametrize("shuffle_buffer", [1, 7, 1000])
@pytest.mark.parametrize("stop", [1, 5, 11])
@pytest.mark.slow
def test_a_stream_continues_to_the_token_after_its_state_went_through_json(
    any_format, tokenizer, stop, shuffle_buffer
):
    recipe = recipe_for(any_format, shuffle_buffer=shuffle_buffer, epochs=3)
    whole = batches(training_data(recipe, tokenizer), stop + 9)
    stored = json.loads(json.dumps({v: asdict(s) for v, s in whole[stop - 1].states.items()}))
    states = {int(v): StreamState(**s) for v, s in stored.items()}
    rest = batches(training_data(recipe, tokenizer, states=states), 9)
    for expected, found in zip(whole[stop:], rest, strict=True):
        assert torch.equal(expected.input_ids, found.input_ids)
        assert expected.states == found.states


def test_another_number_of_processes_continues_the_same_data(texts, tokenizer):
    recipe = recipe_for(texts)
    whole = batches(training_data(recipe, tokenizer), 8)
    states = whole[3].states
    parts = [
        batches(training_data(recipe, tokenizer, rank=r, world_size=2, states=states), 4) for r in (0, 1)
    ]
    for step in range(4):
        found = torch.cat([part[step].input_ids for part in parts]).tolist()
        assert sorted(found) == sorted(whole[4 + step].input_ids.tolist())


def test_every_token_is_used_once(texts, tokenizer):
    """With one sequence a batch from one stream nothing is lost but the tail, shorter than a sequence."""
    recipe = recipe_for(texts, data_streams=1, global_batch=1)
    rows, message = to_the_end(training_data(recipe, tokenizer))
    documents = [t for t, _ in open_documents(recipe).read("train", None)]
    expected = Counter(id for ids in Tokeniser(tokenizer)(documents) for id in ids)
    found = Counter(rows.flatten().tolist())
    lost = expected - found
    assert not found - expected
    assert sum(lost.values()) < recipe.sequence_length
    assert "stream 0 gave" in message
    assert f"{len(rows):,} sequences" in message


def test_documents_are_joined_by_one_end_of_text_token(texts, tokenizer):
    recipe = recipe_for(texts, data_streams=1, global_batch=1, shuffle_buffer=1)
    rows, _ = to_the_end(training_data(recipe, tokenizer))
    documents = [t for t, _ in open_documents(recipe).read("train", None)]
    expected = [id for t in documents for id in [*tokenizer(t)["input_ids"], tokenizer.eos_token_id]]
    assert rows.flatten().tolist() == expected[: rows.numel()]


def test_epochs_repeat_the_data_in_another_order(texts, tokenizer):
    once, _ = to_the_end(training_data(recipe_for(texts, data_streams=1, global_batch=1), tokenizer))
    recipe = recipe_for(texts, data_streams=1, global_batch=1, epochs=2)
    twice, _ = to_the_end(training_data(recipe, tokenizer))
    assert torch.equal(twice[: len(once)], once)
    assert 2 * len(once) <= len(twice) <= 2 * len(once) + 1
    second = twice[len(once) + 1 :]
    assert not torch.equal(second, once[1 : 1 + len(second)])


def test_the_seed_changes_the_order_and_the_same_seed_repeats_it(texts, tokenizer):
    def first(seed):
        return batches(training_data(recipe_for(texts, seed=seed), tokenizer), 1)[0].input_ids

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_the_validation_split_is_evaluated_and_its_texts_are_never_trained_on(tmp_path, tokenizer):
    shared = sentences(30, 5)
    write_jsonl(tmp_path / "train.jsonl", sentences(100, 6) + shared)
    write_jsonl(tmp_path / "valid.jsonl", shared)
    recipe = recipe_for(tmp_path, eval_tokens=100_000, data_streams=1, global_batch=1, shuffle_buffer=1)
    sequences, held_out = evaluation_data(recipe, open_documents(recipe), tokenizer)
    assert sequences.shape[1] == 16
    evaluated = documents_of(sequences, tokenizer)
    assert evaluated == as_tokens(shared, tokenizer)[: len(evaluated)]
    assert len(evaluated) >= len(shared) - 1
    rows, _ = to_the_end(training_data(recipe, tokenizer))
    trained = documents_of(rows, tokenizer)
    assert len(trained) >= 99
    assert not set(trained) & set(as_tokens(shared, tokenizer))
    assert all(text in held_out for text in shared)


def test_without_a_validation_split_a_hash_holds_documents_out(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", sentences(400, 7))
    recipe = recipe_for(tmp_path, holdout=0.2, eval_tokens=100_000, data_streams=1, global_batch=1)
    source = open_documents(recipe)
    assert not source.has_validation
    sequences, held_out = evaluation_data(recipe, source, tokenizer)
    out = {t for t, _ in source.read("train", None) if t in held_out}
    assert 40 < len(out) < 120  # 20 % of 400
    rows, _ = to_the_end(training_data(recipe, tokenizer))
    held = set(as_tokens(list(out), tokenizer))
    evaluated = documents_of(sequences, tokenizer)
    assert set(evaluated) <= held
    assert len(evaluated) >= len(held) - 1
    assert not set(documents_of(rows, tokenizer)) & held

    # By the text alone: neither its place nor what else there is matters. hf_sparse.texts holds out the same.
    reordered = [*sentences(400, 7)[::-1], "something more"]
    write_jsonl(tmp_path / "a.jsonl", reordered)
    assert set(hf_sparse.texts.evaluation_texts(str(tmp_path), holdout=0.2)) == out


def test_hold_out_shares():
    texts = [f"text {i}" for i in range(1000)]
    assert not any(t in HeldOut(0.0) for t in texts)
    assert all(t in HeldOut(1.0) for t in texts)
    assert 20 < sum(t in HeldOut(0.05) for t in texts) < 90
    assert "lone \ud800 surrogate" in HeldOut(1.0)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no file of a known format"),
        ({"a.jsonl": "{}", "b.txt": "x"}, "mixes json and text"),
        ({"validation.jsonl": '{"text": "x"}'}, "no train split, only validation"),
    ],
)
def test_bad_folders_are_refused(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        open_documents(recipe_for(tmp_path))


def test_a_missing_path_is_no_hub_id():
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_documents(recipe_for("./not/there"))


def test_test_files_are_left_alone(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", ["secret"])
    write_jsonl(tmp_path / "part.jsonl", ["open"])
    assert [t for t, _ in open_documents(recipe_for(tmp_path)).read("train", None)] == ["open"]


@pytest.mark.parametrize(
    ("row", "message"),
    [({"body": "x"}, "text_field='text' is no text.*columns body"), ({"text": 3}, "holds int")],
)
def test_a_missing_text_column_is_named(tmp_path, row, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        next(open_documents(recipe_for(tmp_path)).read("train", None))


def rows_with_nulls(folder, nulls: set[int], count: int = 60) -> list[str]:
    texts = sentences(count, 0)
    rows = [{"text": None if i in nulls else text, "url": "u"} for i, text in enumerate(texts)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [text for i, text in enumerate(texts) if i not in nulls]


@pytest.mark.filterwarnings("ignore:a document is left out")
@pytest.mark.parametrize("nulls", [{0}, {59}, {4, 5, 6, 31}, set(range(0, 60, 2))])
@pytest.mark.slow
def test_null_texts_are_left_out_and_a_run_continues_to_the_token(tmp_path, tokenizer, nulls):
    kept = rows_with_nulls(tmp_path, nulls)
    recipe = recipe_for(tmp_path, data_streams=1, global_batch=2, shuffle_buffer=3, epochs=2, holdout=0.1)
    assert [text for text, _ in open_documents(recipe).read("train", None)] == kept
    whole = batches(training_data(recipe, tokenizer), 9)
    for stop in range(1, 8):
        stored = {v: StreamState(**asdict(s)) for v, s in whole[stop - 1].states.items()}
        rest = batches(training_data(recipe, tokenizer, states=stored), 2)
        for expected, found in zip(whole[stop:], rest, strict=False):
            assert torch.equal(expected.input_ids, found.input_ids)
            assert expected.states == found.states


@pytest.mark.filterwarnings("ignore:a document is left out")
def test_a_state_leads_to_the_texts_after_it_with_nulls_around(tmp_path):
    rows_with_nulls(tmp_path, {0, 3, 4, 9}, count=12)
    documents = open_documents(recipe_for(tmp_path))
    for part, parts in ((0, 1), (1, 3)):
        texts, states = [], []
        for text, state in documents.read("train", None, part=part, parts=parts):
            texts.append(text)
            states.append(copy.deepcopy(state()))
        for i, state in enumerate(states):
            assert [t for t, _ in documents.read("train", state, part=part, parts=parts)] == texts[i + 1 :]


def test_nothing_but_nulls_is_said(tmp_path):
    rows_with_nulls(tmp_path, set(range(12)), count=12)
    documents = open_documents(recipe_for(tmp_path))
    with pytest.raises(
        ValueError, match=r"text_field='text' is no text in the train .* none of 12 .*is null"
    ):
        list(documents.read("train", None))
    with pytest.raises(ValueError, match=r"\(part 2 of 4\): none of 3 documents"):
        list(documents.read("train", None, part=1, parts=4))


def test_another_text_column_can_be_chosen(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "hello"}\n')
    assert next(open_documents(recipe_for(tmp_path, text_field="body")).read("train", None))[0] == "hello"


@pytest.mark.parametrize(
    ("unit", "expected"),
    [("paragraph", ["a\nb", "c"]), ("line", ["a", "b", "", "c"]), ("document", ["a\nb\n\nc"])],
)
@pytest.mark.slow
def test_txt_units(tmp_path, unit, expected):
    (tmp_path / "a.txt").write_text("a\nb\n\nc")
    assert [t for t, _ in open_documents(recipe_for(tmp_path, txt_unit=unit)).read("train", None)] == expected


def test_processes_must_divide_the_streams(texts, tokenizer):
    with pytest.raises(ValueError, match="3 processes cannot share data_streams=8"):
        training_data(recipe_for(texts), tokenizer, rank=0, world_size=3)


def test_too_little_held_out_text_is_refused(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", sentences(20, 0))
    recipe = recipe_for(tmp_path, holdout=0.0)
    with pytest.raises(ValueError, match="0 tokens, fewer than one sequence of 16"):
        evaluation_data(recipe, open_documents(recipe), tokenizer)


def test_a_tokenizer_without_end_of_text_is_refused(tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny, eos_token=None)
    with pytest.raises(ValueError, match="no eos_token"):
        Tokeniser(tokenizer)


def test_empty_documents_give_no_tokens(tokenizer):
    ids = Tokeniser(tokenizer)(["", "cat", ""])
    assert [len(x) for x in ids] == [0, len(tokenizer("cat")["input_ids"]) + 1, 0]


@pytest.mark.slow
def test_real_c4(assets, tokenizer):
    """Real documents: two training shards and a validation shard in allenai/c4's layout."""
    recipe = recipe_for(assets / "c4", sequence_length=256, eval_tokens=51_200, shuffle_buffer=100)
    source = open_documents(recipe)
    assert source.has_validation
    sequences, _ = evaluation_data(recipe, source, tokenizer)
    assert sequences.shape == (200, 256)
    whole = batches(training_data(recipe, tokenizer), 5)
    rest = batches(training_data(recipe, tokenizer, states=whole[2].states), 2)
    assert torch.equal(rest[1].input_ids, whole[4].input_ids)
