"""Generation that skips silent neurons, in batches and by the Triton kernels; test_certify.py has more."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse.assets import TINY_MODEL
from support.activations import FIELDS, OWN
from support.compiler import CPP


@pytest.mark.parametrize("backend", ["torch", CPP])
def test_batched_generation_with_padding_gives_the_dense_tokens(backend) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    hf_sparse.patch(model, "relu")
    prompts = ["Return the", "This module provides a way to", "The"]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    tokens = []
    for name in ("dense", backend):
        with hf_sparse.backend(name):
            tokens.append(model.generate(**inputs, max_new_tokens=40, do_sample=False))
    assert torch.equal(*tokens)


TRITON = """
import json, sys, torch, hf_sparse
from transformers import AutoConfig, AutoModelForCausalLM
torch.manual_seed(0)
config = AutoConfig.for_model(
    "llama", hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=96, max_position_embeddings=64,
)
model = AutoModelForCausalLM.from_config(config).eval()
for parameter in model.parameters():
    if parameter.dim() == 2:
        torch.nn.init.normal_(parameter, std=0.2)
prompt = torch.arange(3, 8)[None]
same = {}
for activation, fields in json.loads(sys.argv[1]).items():
    hf_sparse.patch(model, activation, **fields)
    tokens = []
    for backend in ("dense", "triton"):
        with hf_sparse.backend(backend):
            out = model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
            tokens.append(out.tolist())
    same[activation] = tokens[0] == tokens[1]
print(json.dumps(same))
"""


@pytest.mark.slow
def test_triton_kernels_give_the_dense_tokens() -> None:
    fields = {name: given for name, given in FIELDS.items() if OWN.get(name, "silu") == "silu"}
    run = subprocess.run(
        [sys.executable, "-c", TRITON, json.dumps(fields)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == dict.fromkeys(fields, True)
