"""A patched model goes to the Hub and comes back as any model does: against a Hub on loopback."""

from __future__ import annotations

import json

import pytest
import torch

import hf_sparse
from support.loopback_hub import LoopbackHub

PUSH = """
import sys, hf_sparse
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
hf_sparse.patch(model, "fatrelu", threshold=0.1)
model.push_to_hub("me/llama-sparse")
"""
LOAD = """
import sys, torch, hf_sparse
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("me/llama-sparse")
print(hf_sparse.inspect(model).config)
torch.set_num_threads(1)
torch.save(model(torch.load(sys.argv[1])).logits, sys.argv[2])
"""


@pytest.mark.slow
def test_push_and_load(tiny_model, input_ids, tmp_path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "stock")
    torch.save(input_ids, tmp_path / "ids.pt")
    with LoopbackHub() as hub:
        hub.run(PUSH, str(tmp_path / "stock"), home=tmp_path / "author")
        pushed = hub.repositories["me/llama-sparse"]
        assert json.loads(pushed["config.json"])["hf_sparse"]["activation"] == {
            "name": "fatrelu",
            "threshold": 0.1,
        }
        assert "model.safetensors" in pushed
        said = hub.run(LOAD, str(tmp_path / "ids.pt"), str(tmp_path / "logits.pt"), home=tmp_path / "user")
    hf_sparse.patch(model, "fatrelu", threshold=0.1)
    assert str(hf_sparse.inspect(model).config) in said
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(input_ids).logits)
