"""Which norm stands before an MLP block is seen in a forward, and how it scales in what it computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hf_sparse
from hf_sparse.adapters import find_blocks
from hf_sparse.norms import norm_offset, preceding_norms
from support.models import tiny, tiny_t5

BEFORE = {
    "llama": "model.layers.{}.post_attention_layernorm",
    "gpt2": "transformer.h.{}.ln_2",
    "gpt_neox": "gpt_neox.layers.{}.post_attention_layernorm",
    "gemma2": "model.layers.{}.pre_feedforward_layernorm",
    "nemotron": "model.layers.{}.post_attention_layernorm",
    "phi": "model.layers.{}.input_layernorm",
    "cohere": "model.layers.{}.input_layernorm",
    "opt": "model.decoder.layers.{}.final_layer_norm",
    "mixtral": "model.layers.{}.post_attention_layernorm",
    "bert": "bert.encoder.layer.{}.attention.output.LayerNorm",
    "olmo": "model.layers.{}.post_attention_layernorm",
}
OFFSET_OF_1 = ("gemma2", "nemotron", "olmo")


@pytest.mark.parametrize("kind", BEFORE)
def test_it_is_the_one_whose_output_a_block_is_given(kind) -> None:
    model = tiny(kind)
    blocks = find_blocks(model)[0]
    norms = preceding_norms(model, blocks)
    assert len(norms) == 3
    for i, block in enumerate(blocks):
        norm = norms[block.place]
        assert norm.name == BEFORE[kind].format(i)
        assert norm.module is model.get_submodule(norm.name)
        assert norm.offset == (1 if kind in OFFSET_OF_1 else 0)
        assert (norm.weight is None) == (kind == "olmo")


@pytest.mark.parametrize("kind", ["olmo2", "exaone4"])
def test_a_block_that_gets_the_residual_stream_has_none(kind) -> None:
    model = tiny(kind)
    assert set(preceding_norms(model, find_blocks(model)[0]).values()) == {None}


def test_of_encoder_and_decoder() -> None:
    model = tiny_t5()
    hf_sparse.patch(model, "relu")
    names = [norm.name for norm in preceding_norms(model, find_blocks(model)[0]).values()]
    layers = ("encoder.block.{}.layer.1", "decoder.block.{}.layer.2")
    assert names == [f"{layer.format(i)}.layer_norm" for layer in layers for i in range(2)]


def test_the_model_itself_is_not_run(tiny_model) -> None:
    model = tiny_model("llama")

    def refuse(*_: object) -> None:
        raise AssertionError

    model.register_forward_pre_hook(refuse)
    state = torch.get_rng_state()
    preceding_norms(model, find_blocks(model)[0])
    assert torch.equal(torch.get_rng_state(), state)


class Scaled(nn.Module):
    """``change`` of a normalised input."""

    def __init__(self, change, size: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(F.layer_norm(x, x.shape[-1:]), self.weight)


@pytest.mark.parametrize(
    ("module", "offset"),
    [
        (nn.LayerNorm(8), 0),
        (nn.LayerNorm(8, bias=False), 0),
        (nn.RMSNorm(8), 0),
        (nn.LayerNorm(8, elementwise_affine=False), 1),
        (Scaled(lambda n, w: n * (1 + w)), 1),
        (Scaled(lambda n, w: n * w), 0),
        (Scaled(lambda n, w: n * (2 + w)), None),
        (Scaled(lambda n, w: n * w**2), None),
        (Scaled(lambda n, w: n * w.tanh()), None),
        (Scaled(lambda n, w: n + w), None),
        (Scaled(lambda n, w: n.relu() * w), None),
        (Scaled(lambda n, w: 2 * n * w), None),
        (nn.LayerNorm(4), None),
        (nn.Dropout(), None),
        (nn.Identity(), None),
        (nn.Linear(8, 8), None),
        (nn.BatchNorm1d(8), None),
        (nn.GELU(), None),
    ],
    ids=str,
)
def test_a_norm_is_told_by_what_it_computes(module, offset) -> None:
    assert norm_offset(module.eval(), 8) == offset
