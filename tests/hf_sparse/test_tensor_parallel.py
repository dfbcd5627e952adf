"""``tp_plan="auto"``: each layer split between two processes (gloo)."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.distributed.tensor_parallel import ReplicatedWithGradAllReduce

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
        assert not any("replaced" in text for text in found["warned"])
        assert_close(found["patched later"], expected)
        assert_close(found["patched anew"], expected)
        assert_close(found["unpatched"], found["stock"])
        assert not torch.allclose(found["stock"], expected, atol=1e-3)


def test_a_split_that_no_other_module_can_take_over_is_refused() -> None:
    """Its wrapper does not tell how it was made."""
    model = stock("llama")
    expected = logits(model)
    mlp = model.model.layers[1].mlp
    ReplicatedWithGradAllReduce().install_forward(mlp, None)
    with pytest.raises(
        hf_sparse.PatchError, match=r"model\.layers\.1\.mlp is split.* without a distributed_config"
    ):
        hf_sparse.patch(model, "relu")
    assert model.model.layers[1].mlp is mlp
    assert hf_sparse.inspect(model).config is None
    assert torch.equal(logits(model), expected)
