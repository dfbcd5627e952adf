"""A data set streamed from the Hub: a server on loopback speaks the few requests that `datasets` makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.loopback_hub import LoopbackHub
from support.runs import TRAINING, sentences, write_jsonl

CARD = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
---
"""


SCRIPT = """
import sys, json
sys.path.insert(0, sys.argv[1])
from itertools import islice
from data import open_documents
from recipe import Recipe

source = open_documents(Recipe(dataset=sys.argv[2], dataset_config=sys.argv[3]))
train = [t for v in range(2) for t, _ in source.read("train", None, part=v, parts=2)]
some = [(t, s()) for t, s in islice(source.read("train", None, part=1, parts=2), 9)]
rest = [t for t, _ in source.read("train", json.loads(json.dumps(some[-1][1])), part=1, parts=2)]
print(json.dumps({
    "train": sorted(train),
    "validation": [t for t, _ in source.read("validation", None)],
    "some": [t for t, _ in some], "rest": rest,
    "whole": [t for t, _ in source.read("train", None, part=1, parts=2)],
}))
"""


@pytest.mark.slow
def test_streaming_from_the_hub(texts: Path, tmp_path) -> None:
    files = {f"en/{path.name}": path.read_bytes() for path in texts.iterdir()}
    home = tmp_path / "home"
    with LoopbackHub() as hub:
        hub.repositories["datasets/someone/c4"] = {"README.md": CARD.encode(), **files}
        found = json.loads(hub.run(SCRIPT, str(TRAINING), "someone/c4", "en", home=home))
    assert found["train"] == sorted(sentences(260, 0) + sentences(240, 1))
    assert found["validation"] == sentences(60, 2)
    assert found["some"] + found["rest"] == found["whole"]
    # Read as a stream: no data file came to this machine.
    assert not list(home.rglob("*.json.gz"))


LOSSES = """
import sys, json, time, warnings
time.sleep = lambda seconds: None  # the waits are told, not waited
sys.path.insert(0, sys.argv[1])
from hf_sparse.documents import Documents

warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as caught:
    documents = Documents(sys.argv[2], max_bad_documents=0)
    part = [t for t, _ in documents.read("train", None, part=0, parts=2)]
    try:
        list(documents.read("validation", None))
        end = ""
    except ConnectionError as error:
        end = str(error)
print(json.dumps({"part": part, "end": end, "said": [str(w.message) for w in caught]}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl"])
def test_lost_connections_lose_no_document_and_end_at_last(tmp_path, ending) -> None:
    """huggingface_hub repeats a request five times; after seven losses it is read on from its place."""
    train, validation = sentences(400, 0), sentences(40, 1)
    files = {
        f"{split}.{ending}": write_jsonl(tmp_path / f"{split}.{ending}", texts).read_bytes()
        for split, texts in (("train", train), ("validation", validation))
    }
    with LoopbackHub() as hub:
        hub.repositories["datasets/me/text"] = files
        hub.cut_short = {"train": 7, "validation": 1000}
        hub.cut = {"/api/datasets/me/text": 2}
        found = json.loads(hub.run(LOSSES, str(TRAINING), "me/text", home=tmp_path / "home"))
    assert found["part"] == train[::2]
    assert (hub.cut["/api/datasets/me/text"], hub.cut_short["train"]) == (0, 0)
    lost = [said for said in found["said"] if said.startswith("lost the connection to dataset='me/text' (")]
    waits = [1, 2, 5, 10, 20, 40, 60, 60, 60]
    for wait, said in zip(waits, lost[-9:], strict=True):
        assert said.endswith(f"to get it back, in {wait} s.")
    assert len(lost) > 9
    assert "dataset='me/text' cannot be read: the connection was lost 10 times in a row" in found["end"]


STREAMED = """
import sys, json
from hf_sparse.documents import Documents

documents = Documents("me/tables")
rows = [(t, json.dumps(s())) for t, s in documents.read("train", None, part=1, parts=2)]
rest = [[t for t, _ in documents.read("train", json.loads(s), part=1, parts=2)] for _, s in rows]
print(json.dumps({"texts": [t for t, _ in rows], "rest": rest, "bad": json.loads(rows[-1][1])["bad"]}))
"""


@pytest.mark.slow
def test_other_formats_of_the_hub_are_streamed_by_datasets_and_bad_rows_left_out(tmp_path) -> None:
    lines = ["text,url", *(f"text {n},u" if n % 4 != 3 else ",u" for n in range(20))]
    with LoopbackHub() as hub:
        hub.repositories["datasets/me/tables"] = {"train.csv": "\n".join(lines).encode()}
        found = json.loads(hub.run(STREAMED, home=tmp_path / "home"))
    assert found["texts"] == [f"text {n}" for n in range(1, 20, 2) if n % 4 != 3]
    assert found["rest"] == [found["texts"][i + 1 :] for i in range(len(found["texts"]))]
    assert found["bad"] == 4
