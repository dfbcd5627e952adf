"""From the default configuration of any model type to a tiny one: sizes by the names of their fields.

No other part of a model gets the width of an FFN (``FFN_WIDTHS``), so that the inventory knows an FFN by it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PretrainedConfig

HIDDEN, HEADS, KEY_VALUE_HEADS, HEAD_DIM, LAYERS, VOCAB = 32, 4, 2, 8, 2, 100
DENSE, EXPERT, SHARED = 44, 20, 28
EXPERTS = 4
FFN_WIDTHS = (DENSE, EXPERT, SHARED, 2 * SHARED, DENSE // 2, 4 * HIDDEN)
"""Widths that only FFNs have; the last two are of types whose field means both halves, or that have none."""

_RULES: tuple[tuple[str, Any], ...] = (
    # Names of one meaning are one row; the first row that matches a whole name counts.
    (r"num_hidden_layers|n_layers?|num_layers|(num_)?(en|de)coder_layers|num_layers_per_stack", LAYERS),
    (r"depth|num_blocks|num_global_layers|num_mem_blocks", LAYERS),
    (r".*shared_expert.*intermediate_size|shared_intermediate_size", SHARED),
    (r"moe_intermediate_size|expert_ffn_hidden_size|moe_ffn_hidden_size", EXPERT),
    (r"(.*_)?intermediate_size(_mlp)?|ffn_hidden_size|(.*_)?ffn_dim|d_ff|dff|dim_ff|d_inner|n_inner", DENSE),
    (r"mlp_dim|feed_forward_size", DENSE),
    (r"(decoder_|projector_)?hidden_size(_global)?|n_embd|n_embed|d_model|embedding_dim|emb_dim", HIDDEN),
    (r"embed_dim|embedding_size|lru_width|hidden_dim|dim_model_base", HIDDEN),
    (r"(input|output)_embedding_size|out_hidden_size|backbone_hidden_size|input_size", HIDDEN),
    (r"projector_(input|output)_dim|projection_dim|word_embed_proj_dim", HIDDEN),
    (r"swa_num_key_value_heads|num_global_key_value_heads|num_key_value_heads|num_kv_heads|kv_n_heads", 2),
    (r"(.*_)?attention_heads|n_heads?|num_heads|num_query_groups|linear_num_(key_|value_)?heads", HEADS),
    (r"(.*_)?head_dim|d_kv|d_head|dim_head|attention_head_size|kv_channels|rotary_dim", HEAD_DIM),
    (r"linear_(key|value)_head_dim|linear_head_dim|v_head_dim|qk_(nope|rope)_head_dim", HEAD_DIM),
    (r"(q|kv|o)_lora_rank|adapter_rank|gated_norm_rank|laurel_rank|router_hidden_size|hc_lowrank", 12),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"(.*_)?top_?k|moe_k|num_experts_per_tok(en)?|num_local_experts_per_tok", 2),
    (r"n_routed_experts|(moe_)?num_(local_)?experts|zero_expert_num", EXPERTS),
    (r"n_shared_experts|(moe_)?num_shared_experts", 1),
    (r"n_group|num_expert_group|topk_group", 1),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(source|target)_positions", 64),
    (r"original_max_position_embeddings|context_length", 64),
    (r"vocab_size|(decoder_|unpadded_|shape_|pronunciation_)?vocab_size(_per_layer_input)?", VOCAB),
    (r"(sliding_window|local_attention|attention_chunk_size|mem_len)(_size)?|attention_window_size", 8),
    (r"(mamba_|linear_attn_)?chunk_size|block_size|index_block_size", 8),
    (r"mamba_d_state|ssm_state_size|state_size", 8),
    (r"mamba_d_head|mamba_head_dim", 8),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r"mamba_dt_rank|time_step_rank", 4),
    (r"mamba_n_groups|n_groups", 2),
    (r"hidden_size_per_layer_input", 12),
    (r"image_size|crop_size", 32),
    (r"patch_size", 8),
)
_MEANINGS = tuple((re.compile(pattern), size) for pattern, size in _RULES)
_LAYER_COUNTS = re.compile(_RULES[0][0])
_TOKEN = re.compile(r".*_(token_id|token_index|tokens?_ids?)")
_COMPUTED = ("qk_head_dim", "attention_hidden_size", "attention_head_dim")
"""Fields that a configuration makes of others."""
_INDICES = ("moe_layers", "full_attn_idxs", "hybrid_layer_ids", "intermediate_layers_indices")
"""Lists of numbers of layers, which may be as long as there are layers."""
_KEPT_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def size_of(name: str) -> Any:
    """The tiny value for a field of this name; None if it may stay as it is."""
    return next((size for pattern, size in _MEANINGS if pattern.fullmatch(name)), None)


class Tokens:
    """One number for the special token of each name, below the vocabulary's size and above the usual ones."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def __getitem__(self, name: str) -> int:
        if name in _KEPT_TOKENS:
            return _KEPT_TOKENS[name]
        return self._numbers.setdefault(name, VOCAB - 1 - len(self._numbers))


def tiny_fields(
    default: PretrainedConfig, changes: Mapping[str, Any] | None = None, tokens: Tokens | None = None
) -> dict[str, Any]:
    """Arguments for the class of ``default`` that make a tiny configuration of it.

    ``changes`` win over the rules; those of a nested configuration are a mapping under its name.
    """
    changes, tokens = dict(changes or {}), tokens or Tokens()
    fields: dict[str, Any] = {}
    latent = {"num_key_value_heads": HEADS} if "kv_lora_rank" in vars(default) else {}
    own = {k: v for k, v in vars(default).items() if not k.startswith("_")}
    lists = _per_layer_lists(own)
    for name, value in own.items():
        if isinstance(value, PretrainedConfig):
            nested = tiny_fields(value, changes.pop(name, None), tokens)
            fields[name] = type(value)(**nested)
        elif isinstance(value, bool) or name in lists or name in _COMPUTED:
            continue
        elif name in ("image_size", "patch_size") and isinstance(value, list | tuple):
            fields[name] = [size_of(name)] * len(value)
        elif isinstance(value, int) or value is None:
            size = size_of(name)
            if value is not None and _TOKEN.fullmatch(name):
                fields[name] = tokens[name]
            elif size is not None and (value is not None or name == "head_dim"):
                fields[name] = size
    if lists:
        columns = ([size_of(name) or one for one in own[name]] for name in lists)
        kinds = list(dict.fromkeys(zip(*columns, strict=True)))
        while len(kinds) < LAYERS:
            kinds *= 2
        fields.update(zip(lists, map(list, zip(*kinds, strict=True)), strict=True))
        fields.update({name: len(kinds) for name in own if _LAYER_COUNTS.fullmatch(name)})
    return fields | latent | changes


def _per_layer_lists(own: Mapping[str, Any]) -> list[str]:
    """Fields with a value for each layer."""
    counts: Iterable[Any] = (own[name] for name in own if _LAYER_COUNTS.fullmatch(name))
    layers = next((count for count in counts if isinstance(count, int)), None)
    return [
        name
        for name, value in own.items()
        if isinstance(value, list | tuple) and len(value) == layers and name not in _INDICES
        if all(map(_is_plain, value))
    ]


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)
