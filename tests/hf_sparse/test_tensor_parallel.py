"""``tp_plan="auto"``: each layer split between two processes (gloo)."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse
from support.runs import run_on_two
from support.twins import IDS, KINDS, assert_close, logits, stock, twins


@pytest.mark.slow
def test_split_models_compute_what_whole_ones_do(tmp_path) -> None:
    """Weights that are split cannot be read, so nothing skips."""
    references = {}
    for kind in KINDS:
        model, references[kind] = twins(kind, tie_word_embeddings=False)
        model.save_pretrained(tmp_path / kind / "sparse")
        stock(kind, tie_word_embeddings=False).save_pretrained(tmp_path / kind / "stock")
    run_on_two("support.tensor_parallel", tmp_path)
    for kind, reference in references.items():
        found = torch.load(tmp_path / kind / "found.pt")
        expected = logits(reference)
        assert_close(found["logits"], expected)
        assert (found["skips"], found["split"] > 0) == (0, True)
        assert torch.equal(
            found["tokens"], reference.generate(IDS[:1, :4], max_new_tokens=4, do_sample=False)
        )
        again = AutoModelForCausalLM.from_pretrained(tmp_path / kind / "again")
        assert len(hf_sparse.inspect(again).blocks) == 2
        assert_close(logits(again, "torch"), expected)
        if kind == "mixtral":  # splitting wraps the forward of the stock experts, which a patch would lose
            assert "load a model that was patched before it was saved" in found["refused"]
        else:
            assert_close(found["patched later"], expected)
