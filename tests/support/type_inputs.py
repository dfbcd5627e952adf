"""Tiny inputs for a tiny model of any type."""

from __future__ import annotations

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


def image(config: Any, count: int = 1) -> Tensor:
    config = getattr(config, "vision_config", config)
    side = getattr(config, "image_size", 32)
    return torch.randn(count, 3, side, side)


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


SPECIAL: dict[str, Any] = {
    "blt": lambda model: {"input_ids": ids(2, 9), "use_cache": False},
    "whisper": _spectrogram,
    "speech_to_text": _spectrogram,
    "clip": _image_and_text,
    "siglip": _image_and_text,
    "musicgen": _music,
    "musicgen_melody": _music,
}
