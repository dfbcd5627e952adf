"""Tiny inputs for a tiny model of any type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

ORDINARY = 60
"""Numbers of special tokens are above."""


def inputs_for(name: str, model: PreTrainedModel) -> dict[str, Any]:
    """Keyword arguments of the model's forward."""
    if (special := SPECIAL.get(name)) is not None:
        return special(model)
    main = model.main_input_name
    if main == "pixel_values":
        return {"pixel_values": image(model.config)}
    if main == "input_values":
        return {"input_values": torch.randn(1, 800)}
    inputs: dict[str, Any] = {"input_ids": ids(2, 9)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids(2, 5)
    return inputs


def ids(*shape: int) -> Tensor:
    """Ordinary tokens."""
    return torch.randint(3, ORDINARY, shape)


def image(config: Any) -> Tensor:
    config = getattr(config, "vision_config", config)
    side = getattr(config, "image_size", 32)
    return torch.randn(1, 3, *(side if isinstance(side, list | tuple) else (side, side)))


def _with_image(model: Any, **image_inputs: Any) -> dict[str, Any]:
    """A text with as many image tokens as the model makes of the image."""
    config = model.config
    with torch.no_grad():
        out = getattr(model, "get_image_features", model.base_model.get_image_features)(**image_inputs)
    features = out.last_hidden_state if out.pooler_output is None else out.pooler_output
    features = features if isinstance(features, Tensor) else torch.cat(list(features))
    token = getattr(config, "image_token_id", None) or config.image_token_index
    count = features.numel() // features.shape[-1]
    text = torch.cat((ids(1, 2), torch.full((1, count), token), ids(1, 5)), dim=1)
    return {"input_ids": text, **image_inputs}


def _whole_image(model: Any) -> dict[str, Any]:
    return _with_image(model, pixel_values=image(model.config))


def _sized_image(model: Any) -> dict[str, Any]:
    return _with_image(model, pixel_values=image(model.config), image_sizes=torch.tensor([[32, 32]]))


def _tiled_image(model: Any) -> dict[str, Any]:
    pixels = image(model.config).expand(2, -1, -1, -1)[None]
    return _with_image(model, pixel_values=pixels, image_sizes=torch.tensor([[32, 32]]))


def _patches(model: Any) -> dict[str, Any]:
    config = model.config.vision_config
    pixels = torch.randn(16, 3 * getattr(config, "temporal_patch_size", 1) * config.patch_size**2)
    inputs = _with_image(model, pixel_values=pixels, image_grid_thw=torch.tensor([[1, 4, 4]]))
    is_image = inputs["input_ids"] == model.config.image_token_id
    return {**inputs, "mm_token_type_ids": is_image.long()}


def _placed_patches(model: Any) -> dict[str, Any]:
    config = model.config.vision_config
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]
    return _with_image(
        model, pixel_values=torch.randn(1, 16, 3 * config.patch_size**2), image_position_ids=places
    )


def _tiles(model: Any) -> dict[str, Any]:
    pixels = torch.randn(1, 1, 4, 3, 32, 32)
    ratio = {"aspect_ratio_ids": torch.tensor([[1]]), "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]]])}
    text = ids(1, 9)
    return {
        "input_ids": text,
        "pixel_values": pixels,
        "cross_attention_mask": torch.ones(1, 9, 1, 4),
        **ratio,
    }


def _pictures_and_speech(model: Any) -> dict[str, Any]:
    """Of Phi-4: an image of one crop and as a whole, 2 x 2 features each; and 32 frames of sound."""
    config = model.config
    picture = torch.full((1, 6 + 1 + 6), config.vision_config.image_token_id)
    sound = torch.full((1, 4), config.audio_config.audio_token_id)
    return {
        "input_ids": torch.cat((ids(1, 2), picture, sound, ids(1, 3)), dim=1),
        "image_pixel_values": torch.randn(1, 2, 3, 32, 32),
        "image_sizes": torch.tensor([[32, 32]]),
        "image_attention_mask": torch.ones(1, 2, 4, 4),
        "audio_input_features": torch.randn(1, 32, config.audio_config.input_size),
        "audio_embed_sizes": torch.tensor([4]),
    }


def _patches_and_speech(model: Any) -> dict[str, Any]:
    config = model.config
    samples = torch.tensor([4 * config.audio_config.samples_per_token])
    frames = int(samples) // config.audio_config.hop_length
    inputs = _patches(model)
    sound = torch.full((1, 4), config.audio_token_id)
    return {
        "input_ids": torch.cat((inputs["input_ids"], sound), dim=1),
        "pixel_values": inputs["pixel_values"],
        "image_grid_thw": inputs["image_grid_thw"],
        "input_features": torch.randn(1, config.audio_config.feature_size, frames),
        "chunk_sample_lengths": samples,
    }


def _speech_to_transcribe(model: Any) -> dict[str, Any]:
    config = model.config
    frames = 2 * config.audio_config.max_source_positions
    tokens = frames // 2 // config.audio_merge_size
    return {
        "input_ids": torch.cat((torch.full((1, tokens), config.audio_token_id), ids(1, 5)), dim=1),
        "input_features": torch.randn(1, config.audio_config.num_mel_bins, frames),
        "input_features_mask": torch.ones(1, frames, dtype=torch.int64),
        "padding_mask": torch.ones(1, config.audio_chunk_size, dtype=torch.int64),
    }


def _spectrogram(model: Any) -> dict[str, Any]:
    config = model.config
    if hasattr(config, "num_mel_bins"):
        features = torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions)
    else:
        features = torch.randn(1, 32, config.input_feat_per_channel)
    return {"input_features": features, "decoder_input_ids": ids(1, 5)}


def _image_and_text(model: Any) -> dict[str, Any]:
    text = ids(2, 9)
    text[:, -1] = model.config.text_config.eos_token_id
    return {"input_ids": text, "pixel_values": image(model.config)}


def _music(model: Any) -> dict[str, Any]:
    return {"input_ids": ids(1, 5), "decoder_input_ids": ids(model.config.decoder.num_codebooks, 4)}


PATCHES = "qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe qwen4_exp"
WHOLE_IMAGE = "llava paligemma internvl gemma3 llama4 got_ocr2 aya_vision ovis2 cohere2_vision"
SPECIAL: dict[str, Callable[[Any], dict[str, Any]]] = {
    "blt": lambda model: {"input_ids": ids(2, 9), "use_cache": False},
    **dict.fromkeys(("whisper", "speech_to_text"), _spectrogram),
    **dict.fromkeys(("musicgen", "musicgen_melody"), _music),
    **dict.fromkeys(("clip", "siglip"), _image_and_text),
    **dict.fromkeys(WHOLE_IMAGE.split(), _whole_image),
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp"),
        _patches,
    ),
    "dots3_note": _patches_and_speech,
    "moss_transcribe_diarize": _speech_to_transcribe,
    "phi4_multimodal": _pictures_and_speech,
    "gemma4": _placed_patches,
    "git": lambda model: {"input_ids": ids(1, 9), "pixel_values": image(model.config)},
    **dict.fromkeys(
        ("idefics3", "smolvlm"),
        lambda model: _with_image(model, pixel_values=image(model.config)[None]),
    ),
    **dict.fromkeys(("llava_next", "llava_onevision"), _tiled_image),
    "mistral3": _sized_image,
    "mllama": _tiles,
}
