"""What the rules of ``type_sizes`` cannot know of a model type: sizes that must fit, kinds of layers."""

from __future__ import annotations

from typing import Any

_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_INDEXER = {"n_heads": 4, "kv_heads": 1, "head_dim": 8, "budget": 8, "compress_ratio": 4}
_QWEN4 = {f"indexer_{name}": size for name, size in _INDEXER.items()}
_GEMMA4_EXPERTS = {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 20,
}

_GEMMA4_VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "patch_size": 8,
    "pooling_kernel_size": 2,
    "position_embedding_size": 64,
}
_LATENT = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 12,
    "head_dim": 16,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_AUDIO = {
    "conv_dim": [32, 32],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}

CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50, "encoder_hash_byte_group_size": [2]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {**_ROPE, "mrope_section": [2, 1, 1]},
            "full_attention": {**_ROPE, "mrope_section": [2, 1, 1]},
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "data2vec-audio": _AUDIO,
    "deit": {"pooler_output_size": 32, "architectures": ["DeiTForImageClassification"]},
    "distilbert": {"dim": 32, "hidden_dim": 44},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32, "num_experts_per_tok": 2},
        "audio_config": {"adapter_out_dim": 32, "downsample_hidden_size": 8, "adapter_input_size": 32},
        "text_config": {f"swa_{name}": size for name, size in _LATENT.items()},
    },
    "dots3_note_text": {f"swa_{name}": size for name, size in _LATENT.items()},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 64},
    "falcon_mamba": {"intermediate_size": 64},
    "flint": {"mlp_only_layers": [0]},
    "fsmt": {"src_vocab_size": 100, "tgt_vocab_size": 100},
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4": {"text_config": _GEMMA4_EXPERTS, "vision_config": _GEMMA4_VISION},
    "gemma4_text": _GEMMA4_EXPERTS,
    "emu3": {"vocabulary_map": {"<image>": 90}, "vq_config": {"base_channels": 32, "embed_dim": 4}},
    "got_ocr2": {"vision_config": {"output_channels": 12, "window_size": 2, "global_attn_indexes": [1]}},
    "granitemoehybrid": {**_MAMBA2, "layer_types": ["linear_attention", "full_attention"]},
    "hubert": _AUDIO,
    "hrm_text": {"num_layers_per_stack": None},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4": {
        "text_config": {"interleave_moe_layer_step": 2, "moe_layers": None},
        "vision_config": {"intermediate_size": 128, "projector_input_dim": 32, "vision_output_dim": 32},
    },
    "llama4_text": {"interleave_moe_layer_step": 2, "moe_layers": None},
    "llava_next": {"image_grid_pinpoints": [[32, 32]]},
    "llava_onevision": {"image_grid_pinpoints": [[32, 32]]},
    "longcat_flash": {"num_layers": 2},
    "mamba": {"intermediate_size": 64},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mllama": {
        "text_config": {"cross_attention_layers": [1]},
        "vision_config": {"intermediate_layers_indices": [0], "vision_output_dim": 64},
    },
    "musicgen": {"audio_encoder": {"num_filters": 4}},
    "musicgen_melody": {"audio_encoder": {"num_filters": 4}},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "phi4_multimodal": {
        "audio_config": {
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 32,
        }
    },
    "qwen2_vl": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (8, 24),
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "hash_seed": 0,
    },
    "speech_to_text": {"conv_channels": 32},
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "unispeech": _AUDIO,
    "wav2vec2": _AUDIO,
    "wavlm": _AUDIO,
    "xlstm": {"qk_dim_factor": 2.0, "v_dim_factor": 2.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
}
"""Arguments of the configuration, in the place of what the rules give."""
