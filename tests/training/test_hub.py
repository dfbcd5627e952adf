"""A data set streamed from the Hub: a server on loopback speaks the few requests that `datasets` makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.loopback_hub import LoopbackHub
from support.runs import TRAINING, sentences

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
