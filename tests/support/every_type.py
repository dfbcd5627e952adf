"""A tiny, randomly initialised model of every registered model type, and inputs for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from support.type_changes import CHANGES
from support.type_inputs import inputs_for
from support.type_sizes import Tokens, tiny_fields

DECODERS = "Decoder-only text"
FAMILIES: dict[str, dict[str, str]] = {
    "Encoder-decoder text": {
        "AutoModelForSeq2SeqLM": "t5 mt5 umt5 switch_transformers longt5 t5gemma bart mbart pegasus "
        "pegasus_x marian blenderbot blenderbot-small m2m_100 nllb-moe plbart mvp prophetnet "
        "bigbird_pegasus led fsmt"
    },
    "Encoder text": {
        "AutoModelForMaskedLM": "bert roberta xlm-roberta xlm-roberta-xl camembert roberta-prelayernorm "
        "data2vec-text xmod electra ernie rembert roc_bert roformer megatron-bert big_bird xlm deberta "
        "deberta-v2 convbert longformer funnel nomic_bert layoutlm mra nystromformer yoso fnet albert "
        "distilbert mpnet modernbert eurobert"
    },
    "Vision": {
        "AutoModelForImageClassification": "vit deit beit dinov2 dinov2_with_registers ijepa vit_msn "
        "data2vec-vision",
        "AutoModelForZeroShotImageClassification": "clip siglip",
    },
    "Speech and music": {
        "AutoModelForSpeechSeq2Seq": "whisper speech_to_text",
        "AutoModelForCTC": "wav2vec2 hubert wavlm data2vec-audio unispeech",
        "AutoModelForCausalLM": "moshi moss_transcribe_diarize",
        "AutoModelForTextToWaveform": "musicgen musicgen_melody",
    },
    "Vision and language": {
        "AutoModelForImageTextToText": "llava llava_next llava_onevision paligemma qwen2_vl qwen2_5_vl "
        "qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe qwen4_exp idefics3 smolvlm internvl aya_vision ovis2 "
        "cohere2_vision mistral3 gemma3 gemma3n gemma4 gemma4_unified git llama4 mllama got_ocr2 emu3 fuyu "
        "dots3_note",
        "AutoModelForCausalLM": "phi4_multimodal gemma4_assistant gemma4_unified_assistant",
    },
}
"""By family and auto class, the types that are not decoder-only text models."""

NOT_BUILT: dict[str, str] = {
    "gemma3n": "its vision tower needs the timm package",
    "gemma4_assistant": "drafts from the keys and values of another model, and its defaults are refused",
    "gemma4_unified_assistant": "drafts from the keys and values of another model",
}


@dataclass(frozen=True)
class ModelType:
    name: str
    family: str
    auto_class: str

    def config(self) -> PretrainedConfig:
        """A configuration of the fewest and smallest layers that show every kind that the type has."""
        changes, tokens = CHANGES.get(self.name, {}), Tokens()
        config_class = CONFIG_MAPPING[self.name]
        return config_class(**tiny_fields(config_class(), changes, tokens))

    def build(self) -> PreTrainedModel:
        """The model in eval mode, the same each time, with outputs that are far from uniform."""
        torch.manual_seed(0)
        model = self.auto.from_config(self.config())
        computed = model._keys_to_ignore_on_save or ()
        for name, parameter in model.named_parameters():
            # The default scale of 0.02 would hide an error in the MLPs. What is not saved must stay.
            if parameter.dim() in (2, 3) and name not in computed:
                torch.nn.init.normal_(parameter, std=0.2)
        return model.eval()

    @property
    def auto(self) -> Any:
        return getattr(transformers, self.auto_class)

    def inputs(self, model: PreTrainedModel) -> dict[str, Any]:
        torch.manual_seed(1)
        return inputs_for(self.name, model)

    def outputs(self, model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
        """What the model is for: logits of some kind."""
        torch.manual_seed(2)
        with torch.no_grad():
            out = model(**inputs)
        return next(value for value in out.values() if isinstance(value, Tensor) and value.dim() > 0)


@cache
def model_types() -> dict[str, ModelType]:
    """By name: all that are registered for causal language modelling, and the other families above.

    But those of ``NOT_BUILT``. A type with several heads has the one that shows most of its layers.
    """
    others = {
        name: ModelType(name, family, auto_class)
        for family, classes in FAMILIES.items()
        for auto_class, names in classes.items()
        for name in names.split()
    }
    decoders = {
        name: ModelType(name, DECODERS, "AutoModelForCausalLM")
        for name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if name not in others
    }
    return {name: kind for name, kind in (decoders | others).items() if name not in NOT_BUILT}
