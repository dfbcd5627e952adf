"""Encoders, and encoders with decoders: their layers stay, two parts of each are exchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedModel,
)

import hf_sparse
from hf_sparse.adapters import find_blocks
from hf_sparse.modules import SparseLinear
from support.skips import CountSkips

_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_BOTH = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 88,
    "decoder_ffn_dim": 88,
    "vocab_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_TEXTS = ("bart", "mbart", "pegasus", "marian", "blenderbot", "m2m_100", "plbart")
_SPEECH: dict[str, dict[str, object]] = {
    "whisper": {"max_source_positions": 16, "max_target_positions": 32, "num_mel_bins": 8},
    "speech_to_text": {"input_feat_per_channel": 8, "conv_channels": 16, "max_source_positions": 64},
}
_ENCODERS: dict[str, dict[str, object]] = {
    "bert": {},
    "electra": {},
    "deberta": {},
    "deberta-v2": {},
    "xlm-roberta": {},
    "mpnet": {},
    "albert": {"embedding_size": 16},
    "fnet": {},
    "roformer": {},
    "convbert": {},
}
BLOCKS = {**dict.fromkeys(_TEXTS, 4), **dict.fromkeys(_SPEECH, 4), **dict.fromkeys(_ENCODERS, 2), "albert": 1}
"""MLPs by model type: albert has one, for all layers."""


def build(model_type: str, **fields: object) -> PreTrainedModel:
    torch.manual_seed(0)
    make: Callable[..., PreTrainedModel]
    if model_type in _ENCODERS:
        sizes, make = {**_ENCODER, **_ENCODERS[model_type]}, AutoModel.from_config
    elif model_type in _SPEECH:
        sizes, make = {**_BOTH, **_SPEECH[model_type]}, AutoModelForSpeechSeq2Seq.from_config
    else:
        sizes, make = {**_BOTH, "max_position_embeddings": 64}, AutoModelForSeq2SeqLM.from_config
    model = make(AutoConfig.for_model(model_type, **sizes, **fields))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "position" not in name:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def run(model: PreTrainedModel, backend: str) -> Tensor:
    torch.manual_seed(1)
    ids = torch.randint(3, 128, (2, 16))
    inputs = {"input_ids": ids}
    if model.config.model_type in _SPEECH:
        channels_first = model.config.model_type == "whisper"
        inputs = {"input_features": torch.randn(2, *((8, 32) if channels_first else (32, 8)))}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :5]
    with torch.no_grad(), hf_sparse.backend(backend):
        return model(**inputs)[0]


@pytest.mark.parametrize("family", BLOCKS)
def test_from_patch_to_unpatch(family, tmp_path) -> None:
    model = build(family)
    modules = {name: id(module) for name, module in model.named_modules()}
    stock = run(model, "dense")
    by_hand = copy.deepcopy(model)
    for block in find_blocks(by_hand)[0]:
        parent, _, name = block.roles.act.rpartition(".")
        setattr(block.module.get_submodule(parent), name, nn.ReLU())
    expected = run(by_hand, "dense")
    found = len(hf_sparse.patch(model, "relu").blocks)
    assert found == BLOCKS[family]
    assert torch.equal(run(model, "dense"), expected)
    with CountSkips() as skips:
        torch.testing.assert_close(run(model, "torch"), expected, atol=1e-4, rtol=1e-4)
    assert skips.count == max(found, 2)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(run(loaded, "dense"), expected)
    assert sum(isinstance(module, SparseLinear) for module in loaded.modules()) == found
    hf_sparse.unpatch(model)
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert torch.equal(run(model, "dense"), stock)


def test_a_head_with_the_same_activation_keeps_its_own(tmp_path) -> None:
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **_ENCODER)).eval()
    hf_sparse.patch(model, "fatrelu", threshold=(0.1, 0.2))
    expected = run(model, "dense")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(loaded.cls.predictions.transform.transform_act_fn).__name__ == "GELUActivation"
    assert torch.equal(run(loaded, "dense"), expected)


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_chunks_of_a_sequence(family, tmp_path) -> None:
    """Such a model can run its MLPs on some tokens after the other, here on 4 of 16."""
    model = build(family, chunk_size_feed_forward=4)
    calls = 2 * 4  # of layers, also where they share one block
    by_hand = copy.deepcopy(model)
    for block in find_blocks(by_hand)[0]:
        parent, _, name = block.roles.act.rpartition(".")
        setattr(block.module.get_submodule(parent), name, nn.ReLU())
    expected = run(by_hand, "dense")
    hf_sparse.patch(model, "relu")
    assert torch.equal(run(model, "dense"), expected)
    model.save_pretrained(tmp_path)
    for one in (model, type(model).from_pretrained(tmp_path).eval()):
        assert one.config.chunk_size_feed_forward == 4
        with CountSkips() as skips:
            torch.testing.assert_close(run(one, "torch"), expected, atol=1e-4, rtol=1e-4)
        assert skips.count == calls
