"""Layers removed, repeated, exchanged, patched in part: saved is what the model computes, or nothing is."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, PreTrainedModel, T5Config
from transformers.activations import ACT2FN

import hf_sparse
from hf_sparse import PatchError, SparsityConfig
from hf_sparse.adapters import find_blocks
from hf_sparse.modules import SparseMLP
from support.models import tiny

LAYERS = 4
IDS = torch.arange(3, 20)[None]
CONFIGS = (
    SparsityConfig(activation="relu"),
    SparsityConfig(activation={"name": "fatrelu", "threshold": 0.1}),
    SparsityConfig(activation={"name": "fatrelu", "threshold": (0.1, 0.2, 0.3, 0.4)}),
    SparsityConfig(activation="relu", layers=(0, 2)),
    SparsityConfig(activation={"name": "fatrelu", "threshold": (0.1, 0.4)}, layers=(1, 3)),
)


def model_of(config: SparsityConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = tiny("llama", num_hidden_layers=LAYERS)
    hf_sparse.patch(model, config)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def loaded(folder: str | Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


# What people do to the layers of a model; each takes it and a layer's number.
def remove(model: PreTrainedModel, i: int) -> None:
    if len(model.model.layers) > 1:
        del model.model.layers[i]


def reverse(model: PreTrainedModel, _: int) -> None:
    model.model.layers = model.model.layers[::-1]


def repeat(model: PreTrainedModel, i: int) -> None:
    model.model.layers.insert(i, copy.deepcopy(model.model.layers[i]))


def share(model: PreTrainedModel, i: int) -> None:
    model.model.layers[i].mlp = model.model.layers[0].mlp


def exchange_with_stock(model: PreTrainedModel, i: int) -> None:
    torch.manual_seed(1)
    model.model.layers[i].mlp = tiny("llama", num_hidden_layers=1).model.layers[0].mlp


def exchange_with_patched(model: PreTrainedModel, i: int) -> None:
    torch.manual_seed(2)
    other = tiny("llama", num_hidden_layers=1)
    hf_sparse.patch(other, "fatrelu", threshold=0.2)
    model.model.layers[i].mlp = other.model.layers[0].mlp


def restore_one(model: PreTrainedModel, i: int) -> None:
    mlp = model.model.layers[i].mlp
    if isinstance(mlp, SparseMLP):
        model.model.layers[i].mlp = mlp.restore()


def freeze_the_rest(model: PreTrainedModel, i: int) -> None:
    for parameter in model.model.layers[i].parameters():
        parameter.requires_grad_(False)


CHANGES = (
    remove,
    reverse,
    repeat,
    exchange_with_stock,
    exchange_with_patched,
    restore_one,
    freeze_the_rest,
)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(CONFIGS),
    st.lists(st.tuples(st.sampled_from(CHANGES), st.integers(0, LAYERS - 1)), min_size=1, max_size=4),
)
@pytest.mark.slow
def test_what_is_saved_is_what_runs_or_is_refused(
    config: SparsityConfig, changes: list[tuple[Callable[[PreTrainedModel, int], None], int]]
) -> None:
    model = model_of(config)
    for change, i in changes:
        change(model, i % len(model.model.layers))
    model.config.num_hidden_layers = len(model.model.layers)
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    want = logits(model)
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
        except PatchError:
            assert not list(Path(folder).iterdir())  # nothing half-saved
            return
        again = loaded(folder)
    torch.testing.assert_close(logits(again), want)
    kinds = [[isinstance(layer.mlp, SparseMLP) for layer in one.model.layers] for one in (again, model)]
    assert kinds[0] == kinds[1]


def test_thresholds_follow_their_layers(tmp_path: Path) -> None:
    model = model_of(CONFIGS[2])
    del model.model.layers[1]
    model.config.num_hidden_layers = LAYERS - 1
    model.save_pretrained(tmp_path)
    config = hf_sparse.inspect(loaded(tmp_path)).config
    assert config is not None
    assert config.activation.threshold == (0.1, 0.3, 0.4)


def test_a_shared_block_where_blocks_are_told_apart_is_refused(tmp_path: Path) -> None:
    model = model_of(CONFIGS[2])
    share(model, 2)
    with pytest.raises(PatchError, match="Give each layer a block of its own"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("patched", [True, False])
def test_an_activation_put_in_by_hand_is_refused(patched: bool, tmp_path: Path) -> None:
    model = model_of(CONFIGS[3])
    block = find_blocks(model)[0][0 if patched else 1]
    owner = block.module.stock if patched else block.module
    owner.act_fn = ACT2FN["gelu"]
    for look in (lambda: hf_sparse.inspect(model), lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(PatchError, match=r"the config says that .*silu.* but it is"):
            look()


def test_a_new_activation_put_in_by_hand_is_refused(tmp_path: Path) -> None:
    model = model_of(CONFIGS[0])
    model.model.layers[1].mlp.act_fn = ACT2FN["gelu"]
    with pytest.raises(PatchError, match="which no config can say"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


class TestConfigObjects:
    """The config of a patched model replaced, copied or shared."""

    def test_a_config_without_the_block_is_refused(self, tmp_path: Path) -> None:
        model = model_of(CONFIGS[0])
        model.config = LlamaConfig(**tiny("llama", num_hidden_layers=LAYERS).config.to_dict())
        with pytest.raises(PatchError, match="it was replaced after the patch"):
            model.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())

    def test_a_copy_of_the_config_is_as_good(self, tmp_path: Path) -> None:
        model = model_of(CONFIGS[2])
        model.config = copy.deepcopy(model.config)
        del model.model.layers[0]
        model.config.num_hidden_layers = LAYERS - 1
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = i
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(logits(loaded(tmp_path)), logits(model))

    def test_the_stock_half_of_a_shared_config_is_saved_as_stock(self, tmp_path: Path) -> None:
        stock = tiny("llama", num_hidden_layers=LAYERS)
        model = type(stock)(stock.config).eval()
        hf_sparse.patch(model, "fatrelu", threshold=0.1)  # and with it the config of both
        want = logits(stock)
        stock.save_pretrained(tmp_path)
        again = loaded(tmp_path)
        torch.testing.assert_close(logits(again), want)
        assert not any(isinstance(module, SparseMLP) for module in again.modules())
        assert hf_sparse.inspect(model).config is not None


def test_an_encoder_decoder_whose_decoder_lost_a_layer(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "d_ff": 88, "d_kv": 8, "num_heads": 4, "vocab_size": 128}
    config = T5Config(**sizes, num_layers=2, num_decoder_layers=3, decoder_start_token_id=0)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    hf_sparse.patch(model, "fatrelu", threshold=(0.1, 0.2, 0.3, 0.4, 0.5))
    del model.decoder.block[1]
    model.config.num_decoder_layers = model.decoder.config.num_layers = 2

    def run(one: nn.Module) -> Tensor:
        with torch.no_grad():
            return one(input_ids=IDS, decoder_input_ids=IDS, use_cache=False).logits

    want = run(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(run(again), want)
    config_again = hf_sparse.inspect(again).config
    assert config_again is not None
    assert config_again.activation.threshold == (0.1, 0.2, 0.3, 0.5)


class OtherTool(nn.Module):
    """A block that is none of a known shape, as kernels of other tools are."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x).clamp(max=50))


class Same(OtherTool):
    """The stock block in other words."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def test_a_block_that_another_tool_has_rewritten_is_the_stock_one(tmp_path: Path) -> None:
    model = model_of(CONFIGS[0])
    model.model.layers[2].mlp = Same(model.model.layers[2].mlp)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), expected)
    assert len(hf_sparse.inspect(again).blocks) == len(model.model.layers) - 1


def test_a_block_that_another_tool_has_replaced_is_told(tmp_path: Path) -> None:
    model = model_of(CONFIGS[0])
    model.model.layers[2].mlp = OtherTool(model.model.layers[2].mlp)
    for look in (lambda: hf_sparse.inspect(model), lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(PatchError, match=r"model.layers.2.mlp is a OtherTool"):
            look()
    assert not list(tmp_path.iterdir())
