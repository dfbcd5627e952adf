"""Tiny models of stock transformers classes, made in memory."""

from __future__ import annotations

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

SIZES = {
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
_OWN: dict[str, dict[str, object]] = {
    "opt": {"ffn_dim": 88, "word_embed_proj_dim": 32, "activation_function": "gelu"},
    "xglm": {"ffn_dim": 88},
    "bert": {"is_decoder": True},
    "roberta": {"is_decoder": True},
    "cpmant": {"dim_head": 8, "dim_ff": 88, "num_hidden_layers": 3, "hidden_size": 32, "vocab_size": 128},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "num_mem_blocks": 2,
        "num_key_value_heads": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "adapter_rank": 4,
        "mamba_d_state": 8,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
        "chunk_size": 8,
    },
    "gemma3n_text": {
        "intermediate_size": [88] * 3,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0],
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "layer_types": ["full_attention"] * 3,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
    },
}


def tiny(model_type: str, **changes: object) -> PreTrainedModel:
    """A randomly initialised model in eval mode whose logits are far from uniform."""
    sizes: dict[str, object] = dict(SIZES)
    if model_type == "gpt2":
        sizes = {"n_embd": 32, "n_inner": 88, "n_layer": 3, "n_head": 4, "vocab_size": 128, "n_positions": 64}
    sizes |= _OWN.get(model_type, {})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(sizes | changes)))
    for parameter in model.parameters():  # the default scale of 0.02 would hide an error in the MLPs
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def tiny_t5(**changes: object) -> PreTrainedModel:
    """A T5 1.0 with ReLU, which drops nothing in training."""
    sizes: dict[str, object] = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 88, "num_layers": 2}
    sizes |= {"num_heads": 4, "dropout_rate": 0.0, "decoder_start_token_id": 0, "eos_token_id": None}
    model = T5ForConditionalGeneration(T5Config(**(sizes | changes)))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def untrained_llama(**changes: object) -> LlamaForCausalLM:
    """A Llama as training finds it: initialised by transformers, in training mode."""
    return LlamaForCausalLM(LlamaConfig(**(SIZES | changes))).train()
