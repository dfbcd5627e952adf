"""DeepSpeed's ZeRO-3: parameters are gathered for each call of a module, and empty in between."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from support.runs import run_on_two
from support.twins import KINDS, assert_close, logits, stock, twins

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="no deepspeed")


@pytest.mark.slow
@needs_deepspeed
def test_training_is_that_of_the_stock_model(tmp_path) -> None:
    references = {}
    for kind in KINDS:
        model, references[kind] = twins(kind, tie_word_embeddings=False)
        model.save_pretrained(tmp_path / kind / "sparse")
        stock(kind, tie_word_embeddings=False).save_pretrained(tmp_path / kind / "stock")
    run_on_two("support.zero3", tmp_path)
    for kind, reference in references.items():
        found = torch.load(tmp_path / kind / "found.pt")
        assert_close(found["by hand"][0], logits(reference))
        assert not torch.allclose(found["by hand"][2], found["by hand"][0], atol=0.1)
        for way in ("loaded", "patched"):
            assert_close(found[way], found["by hand"])
