"""Tiny models that are made of several, of stock transformers classes; and input for all their parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    FuyuConfig,
    FuyuForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from support.models import SIZES

IMAGE = 127
"""The token that stands for a piece of an image; there are four in :func:`inputs`."""

TEXT: dict[str, Any] = SIZES
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION: dict[str, Any] = {"depth": 2, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 1}
_QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": 126, "vision_start_token_id": 125}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}


def _gemma3() -> PreTrainedModel:
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, image_token_index=IMAGE)
    )


def _llava() -> PreTrainedModel:
    config = LlavaConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**VISION, "model_type": "clip_vision_model", "projection_dim": 32},
        image_token_index=IMAGE,
    )
    return LlavaForConditionalGeneration(config)


def _paligemma() -> PreTrainedModel:
    config = PaliGemmaConfig(
        text_config={**TEXT, "model_type": "gemma"},
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    return PaliGemmaForConditionalGeneration(config)


def _idefics2() -> PreTrainedModel:
    config = Idefics2Config(
        text_config={**TEXT, "model_type": "mistral"},
        vision_config=VISION,
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        },
        image_token_id=IMAGE,
    )
    return Idefics2ForConditionalGeneration(config)


def _qwen2_vl() -> PreTrainedModel:
    config = Qwen2VLConfig(
        text_config={**TEXT, **_MROPE},
        vision_config={**_QWEN_VISION, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
        **_QWEN_TOKENS,
    )
    return Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, **_MROPE}, vision_config={**_QWEN_VISION, **sizes}, **_QWEN_TOKENS
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _got_ocr2() -> PreTrainedModel:
    config = GotOcr2Config(
        text_config={**TEXT, "model_type": "qwen2"},
        vision_config={
            "hidden_size": 32,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 16,
            "mlp_dim": 48,
            "window_size": 2,
            "global_attn_indexes": [1],
        },
        image_token_index=IMAGE,
    )
    return GotOcr2ForConditionalGeneration(config)


def _fuyu() -> PreTrainedModel:
    config = FuyuConfig(
        text_config={**TEXT, "model_type": "persimmon"}, **TEXT, patch_size=2, image_token_id=IMAGE
    )
    return FuyuForCausalLM(config)


def _video_llava() -> PreTrainedModel:
    config = VideoLlavaConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config=CLIPVisionConfig(**VISION, projection_dim=32).to_dict(),
        image_token_index=IMAGE,
        video_token_index=126,
    )
    return VideoLlavaForConditionalGeneration(config)


def _t5gemma() -> PreTrainedModel:
    sizes = {**TEXT, "query_pre_attn_scalar": 8}
    return T5GemmaForConditionalGeneration(
        T5GemmaConfig(encoder=sizes, decoder={**sizes, "num_hidden_layers": 2})
    )


COMPOSITES: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma3": _gemma3,
    "llava": _llava,
    "paligemma": _paligemma,
    "idefics2": _idefics2,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "got_ocr2": _got_ocr2,
    "fuyu": _fuyu,
    "video_llava": _video_llava,
    "t5gemma": _t5gemma,
}


def composite(name: str) -> PreTrainedModel:
    """A randomly initialised model in eval mode whose logits are far from uniform."""
    model = COMPOSITES[name]()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def inputs(name: str) -> dict[str, Tensor]:
    """Two rows of text for any of them, and, but for a few, images that all parts see."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 100, (2, 9), generator=generator)
    given = {"input_ids": ids}

    def pixels(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if name == "t5gemma":
        return {**given, "decoder_input_ids": ids[:, :6]}
    if name in ("fuyu", "got_ocr2"):
        return given
    ids[:, 1:5] = IMAGE
    if name in ("gemma3", "paligemma"):
        given["token_type_ids"] = (ids == IMAGE).long()
    if name.startswith("qwen"):
        grid = torch.tensor([[1, 2, 2]] * 2)
        types = (ids == IMAGE).int()
        return {
            **given,
            "pixel_values": pixels(8, 3 * 2 * 14 * 14),
            "image_grid_thw": grid,
            "mm_token_type_ids": types,
        }
    if name == "idefics2":
        return {**given, "pixel_values": pixels(2, 1, 3, 28, 28)}
    if name == "video_llava":
        return {**given, "pixel_values_images": pixels(2, 3, 28, 28)}
    return {**given, "pixel_values": pixels(2, 3, 28, 28)}


def logits(model: PreTrainedModel, name: str) -> Tensor:
    with torch.no_grad():
        return model(**inputs(name), use_cache=False).logits
