"""Tiny models of stock transformers classes, made in memory."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

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


def tiny(model_type: str, **changes: object) -> PreTrainedModel:
    """A randomly initialised model in eval mode whose logits are far from uniform."""
    sizes = dict(_SIZES)
    if model_type == "gpt2":
        sizes = {"n_embd": 32, "n_inner": 88, "n_layer": 3, "n_head": 4, "vocab_size": 128, "n_positions": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(sizes | changes)))
    for parameter in model.parameters():  # the default scale of 0.02 would hide an error in the MLPs
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def untrained_llama(**changes: object) -> LlamaForCausalLM:
    """A Llama as training finds it: initialised by transformers, in training mode."""
    return LlamaForCausalLM(LlamaConfig(**(_SIZES | changes))).train()
