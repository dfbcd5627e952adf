"""Documents of files: each once, from any place on; those that cannot be used are left out and named."""

from __future__ import annotations

import gzip
import json
import warnings
from itertools import chain
from pathlib import Path

import pytest
from datasets import Dataset

from hf_sparse.documents import Documents
from hf_sparse.texts import evaluation_texts

BAD_LINES = {
    '{"text": null}': "is null",
    '{"text": 3}': "holds int and no text",
    '{"text": ["a"]}': "holds list and no text",
    '{"body": "x", "url": "y"}': "has no 'text', but columns body, url",
    '{"text": "cut sho': "is no JSON: Unterminated string",
    '"a text"': "is no JSON object, but str",
    '{"text": "\\ud800"}': "is no Unicode: surrogates not allowed at character 0",
    "[" * 100_000: "is no JSON: maximum recursion",
}


def texts(documents: Documents, **arguments) -> list[str]:
    return [text for text, _ in documents.read("train", None, **arguments)]


def jsonl(path: Path, lines: list[str | bytes]) -> Path:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")
    return path


def good(*numbers: int) -> list[str]:
    return [json.dumps({"text": f"text {n}"}) for n in numbers]


@pytest.mark.parametrize(("line", "problem"), [*BAD_LINES.items(), (b'{"text": "caf\xe9"}', "is not UTF-8")])
def test_a_bad_line_is_left_out_and_named(tmp_path, line, problem) -> None:
    path = jsonl(tmp_path / "a.jsonl", [*good(1), "", line, *good(2)])
    with pytest.warns(RuntimeWarning) as caught:
        assert texts(Documents(str(path))) == ["text 1", "text 2"]
    (said,) = (str(one.message) for one in caught)
    assert said.startswith(f"a document is left out: {path}, line 3 {problem}")


def test_bad_documents_are_counted_and_one_too_many_ends_the_pass(tmp_path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [*good(1), *["{"] * 3, *good(2)])
    documents = Documents(str(path), max_bad_documents=3)
    bad = documents.bad_documents("train")
    with pytest.warns(RuntimeWarning):
        assert texts(documents, bad=bad) == ["text 1", "text 2"]
    assert bad.count == 3
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(ValueError, match=r"max_bad_documents=2 documents .* last: .*, line 4 is no JSON"),
    ):
        texts(Documents(str(path), max_bad_documents=2))
    with pytest.raises(ValueError, match=r"max_bad_documents=0 .*, line 2 is no JSON"):
        texts(Documents(str(path), max_bad_documents=0))


def test_a_wrong_column_is_said_at_the_limit_and_not_row_by_row(tmp_path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ['{"body": "x"}'] * 50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            ValueError,
            match=r"text_field='text' is no text .*none of 21 documents.*line 1 has no 'text', but",
        ):
            texts(Documents(str(path), max_bad_documents=20))
    assert texts(Documents(str(path), text_field="body")) == ["x"] * 50


@pytest.mark.filterwarnings("ignore:a document is left out")
def test_a_place_with_bad_documents_around_leads_to_the_rest_and_their_count(tmp_path) -> None:
    jsonl(tmp_path / "a.jsonl", ["{", *good(1, 2), "{", "{", *good(3)])
    jsonl(tmp_path / "b.jsonl", ["{", *good(4), "{"])
    documents = Documents(str(tmp_path))
    whole = [(text, json.dumps(state())) for text, state in documents.read("train", None)]
    assert [json.loads(state)["bad"] for _, state in whole] == [1, 1, 3, 4]
    for i, (_, state) in enumerate(whole):
        bad = documents.bad_documents("train")
        rest = [text for text, _ in documents.read("train", json.loads(state), bad=bad)]
        assert rest == [text for text, _ in whole[i + 1 :]]
        assert bad.count == 5


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("files", [1, 2, 3, 4, 6])
def test_every_document_is_in_one_part(tmp_path, files, parts) -> None:
    """Also where a file has fewer rows than there are parts, and in whatever number of files."""
    expected = []
    for file in range(files):
        numbers = range(100 * file, 100 * file + 5 * file + 1)
        jsonl(tmp_path / f"{file}.jsonl", good(*numbers))
        expected += [f"text {n}" for n in numbers]
    documents = Documents(str(tmp_path))
    found = [texts(documents, part=part, parts=parts) for part in range(parts)]
    assert sorted(chain(*found)) == sorted(expected)
    for part, own in enumerate(found):
        for i, (_, state) in enumerate(documents.read("train", None, part=part, parts=parts)):
            rest = documents.read("train", state(), part=part, parts=parts)
            assert [text for text, _ in rest] == own[i + 1 :]


def test_a_file_may_be_one_list_of_objects_or_texts(tmp_path) -> None:
    items = [{"text": "one"}, "two", {"text": None}, {"text": "three"}]
    (tmp_path / "a.json").write_text(json.dumps(items, indent=2))
    with pytest.warns(RuntimeWarning, match=r"a.json, item 3 is null"):
        assert texts(Documents(str(tmp_path))) == ["one", "two", "three"]
    # A first line that is damaged is no list.
    jsonl(tmp_path / "a.json", ['["text": "one"}', *good(2)])
    with pytest.warns(RuntimeWarning, match=r"a.json, line 1 is no JSON"):
        assert texts(Documents(str(tmp_path))) == ["text 2"]


@pytest.mark.parametrize(
    ("unit", "expected", "where"),
    [
        ("paragraph", ["one\nmore", "three"], "line 4"),
        ("line", ["one", "more", "", "", "", "three"], "line 4"),
        ("document", [], "all of it"),
    ],
)
def test_txt_that_is_not_utf8_is_left_out_by_its_unit(tmp_path, unit, expected, where) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\nmore\r\n\r\ncaf\xe9\r\n\r\n\r\nthree\r\n")
    (tmp_path / "b.txt").write_bytes(b"good")
    with pytest.warns(RuntimeWarning, match=f"a.txt, {where} is not UTF-8"):
        assert texts(Documents(str(tmp_path), txt_unit=unit)) == [*expected, "good"]


@pytest.mark.filterwarnings("ignore:a document is left out")
def test_parquet_is_read_by_row_groups_and_nulls_are_named(tmp_path) -> None:
    rows = [None if n in (0, 7) else f"text {n}" for n in range(10)]
    Dataset.from_dict({"text": rows, "url": ["u"] * 10}).to_parquet(tmp_path / "a.parquet", batch_size=3)
    documents = Documents(str(tmp_path))
    with pytest.warns(RuntimeWarning) as caught:
        whole = [(text, state()) for text, state in documents.read("train", None)]
    assert [text for text, _ in whole] == [text for text in rows if text is not None]
    assert [str(one.message).split("parquet, ")[1] for one in caught] == ["row 1 is null", "row 8 is null"]
    for i, (_, state) in enumerate(whole):
        assert [text for text, _ in documents.read("train", state)] == [text for text, _ in whole[i + 1 :]]
    with pytest.raises(
        ValueError, match=r"text_field='body' is no column of .*a.parquet, which has text, url"
    ):
        texts(Documents(str(tmp_path), text_field="body"))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet", "a.jsonl.xz"])
def test_a_damaged_file_is_named(tmp_path, name) -> None:
    content = gzip.compress("\n".join(good(*range(999))).encode())
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{name} is damaged: .*Get it anew"):
        texts(Documents(str(tmp_path)))


def test_other_unicode_is_refused_and_a_mark_at_the_beginning_is_no_text(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo", encoding="utf-16")
    with pytest.raises(ValueError, match=r"a.txt is UTF-16 or UTF-32; write it as UTF-8"):
        texts(Documents(str(tmp_path)))
    (tmp_path / "a.txt").write_text("one\n\ntwo", encoding="utf-8-sig")
    assert texts(Documents(str(tmp_path))) == ["one", "two"]


def test_a_measurement_leaves_out_any_number_of_them(tmp_path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [*good(1), *['{"text": null}'] * 300, *good(2)])
    with pytest.warns(RuntimeWarning) as caught:
        assert list(evaluation_texts(str(path))) == ["text 1", "text 2"]
    assert len(caught) == 100  # more are not named
