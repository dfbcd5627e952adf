"""A patched model goes to the Hub and comes back as any model does: against a Hub on loopback."""

from __future__ import annotations

import json

import pytest
import torch

import hf_sparse
from support.loopback_hub import LoopbackHub

CONFIGS = {
    "fatrelu": {"activation": {"name": "fatrelu", "threshold": 0.1}},
    "inputs": {
        "activation": {"name": "original"},
        "inputs": {
            "self_attn.q_proj": {"threshold": 0.1},
            "mlp.down_proj": {"threshold": 0.01, "center": 0.1},
        },
    },
}
PUSH = """
import json, sys, hf_sparse
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
hf_sparse.patch(model, hf_sparse.SparsityConfig.from_dict(json.loads(sys.argv[2])))
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
@pytest.mark.parametrize("kind", CONFIGS)
def test_push_and_load(tiny_model, input_ids, tmp_path, kind) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "stock")
    stock = model(input_ids).logits
    config = hf_sparse.SparsityConfig.from_dict(CONFIGS[kind])
    torch.save(input_ids, tmp_path / "ids.pt")
    with LoopbackHub() as hub:
        hub.run(PUSH, str(tmp_path / "stock"), json.dumps(config.to_dict()), home=tmp_path / "author")
        pushed = hub.repositories["me/llama-sparse"]
        said = json.loads(pushed["config.json"])["hf_sparse"]
        assert {name: said[name] for name in CONFIGS[kind]} == {
            name: config.to_dict()[name] for name in CONFIGS[kind]
        }
        assert "model.safetensors" in pushed
        said = hub.run(LOAD, str(tmp_path / "ids.pt"), str(tmp_path / "logits.pt"), home=tmp_path / "user")
    hf_sparse.patch(model, config)
    assert str(hf_sparse.inspect(model).config) in said
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(input_ids).logits)
    assert not torch.equal(stock, model(input_ids).logits)
