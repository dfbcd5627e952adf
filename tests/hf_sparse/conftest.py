"""Tiny models of stock transformers classes, one per MLP layout that is patched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo2", "stablelm")
PLAIN = ("gpt_neox", "phi", "nemotron", "starcoder2", "gpt2", "persimmon")


def build(model_type: str, **changes: object) -> PreTrainedModel:
    """A randomly initialised model in eval mode whose logits are far from uniform."""
    sizes = dict(_SIZES)
    if model_type == "gpt2":
        sizes = {"n_embd": 32, "n_inner": 88, "n_layer": 3, "n_head": 4, "vocab_size": 128, "n_positions": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(sizes | changes)))
    for parameter in model.parameters():  # the default scale of 0.02 would hide an error in the MLPs
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    return build


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(3, 128, (2, 17))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take ``model_type``, ``gated_type`` or ``plain_type`` run for each of them."""
    for name, values in (("model_type", GATED + PLAIN), ("gated_type", GATED), ("plain_type", PLAIN)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values)
