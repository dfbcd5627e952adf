"""Models that were read from GGUF files: of plain weights, and quantised by what transformers says."""

from __future__ import annotations

from transformers import PreTrainedModel


def forget_gguf(model: PreTrainedModel) -> None:
    """Take the mark of a GGUF file off ``model``, if its weights were unpacked when they were read.

    With that mark transformers refuses to save the model and to train it. It takes it off itself where
    ``from_pretrained`` gets ``quantization_config=GgufConfig(dequantize=True)``. A model of which weights are
    still packed, which are integers, keeps it.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or quantizer.quantization_config.quant_method != "gguf":
        return
    if all(parameter.is_floating_point() for parameter in model.parameters()):
        quantizer.remove_quantization_config(model)
