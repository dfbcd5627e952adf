"""What else is done to models whose layers stay: adapters, other forwards, layers moved and removed."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import PatchError
from hf_sparse.adapters.kept import MARK
from hf_sparse.modules import SparseLinear
from support.by_hand import logits, swapped_by_hand
from support.models import tiny
from support.skips import CountSkips


def test_a_down_projection_that_is_no_plain_linear_layer_is_left(input_ids) -> None:
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = tiny("opt")
    for layer in model.model.decoder.layers:
        scaled = Scaled(88, 32)
        scaled.load_state_dict(layer.fc2.state_dict())
        layer.fc2 = scaled
    expected = logits(swapped_by_hand(model, "relu"), input_ids, "dense")
    hf_sparse.patch(model, "relu")
    with CountSkips() as skips:
        assert torch.equal(logits(model, input_ids, "torch"), expected)
    assert skips.count == 0
    assert "no plain linear layer" in str(hf_sparse.tune(model, tokens=(1,)))
    hf_sparse.unpatch(model)
    assert not any(MARK in vars(module) for module in model.modules())


def test_a_down_projection_whose_forward_was_replaced_is_left(input_ids) -> None:
    model = tiny("opt")
    for layer in model.model.decoder.layers:
        layer.fc2.forward = lambda x, fc2=layer.fc2: nn.Linear.forward(fc2, x) * 3
    expected = logits(swapped_by_hand(tiny("opt"), "relu"), input_ids, "dense")
    hf_sparse.patch(model, "relu")
    assert not any(isinstance(module, SparseLinear) for module in model.modules())
    assert not torch.allclose(logits(model, input_ids, "torch"), expected)


@pytest.mark.parametrize("where", ["the layer", "a part of it", "its class"])
def test_a_forward_that_another_tool_replaces(where, input_ids, tmp_path, monkeypatch) -> None:
    model = tiny("bert")
    layer = model.bert.encoder.layer[1]
    hf_sparse.patch(model, "relu")

    def other(self, x, *args, **kwargs):
        return x

    if where == "its class":
        monkeypatch.setattr(type(layer), "forward", other)
    else:
        module = layer if where == "the layer" else layer.intermediate
        module.forward = other.__get__(module)
    assert "was replaced by" in str(hf_sparse.inspect(model))
    with pytest.warns(UserWarning, match="was replaced by .*other: what is saved computes"):
        model.save_pretrained(tmp_path)
    with pytest.raises(PatchError, match="was replaced by"):
        hf_sparse.patch(model, "relu2")


def test_a_parametrised_down_projection_is_called_as_it_is(input_ids) -> None:
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = tiny("opt")
    expected = copy.deepcopy(model)
    hf_sparse.patch(model, "relu")
    hf_sparse.patch(expected, "relu")
    layer = model.model.decoder.layers[1]
    logits(model, input_ids, "torch")
    torch.nn.utils.parametrize.register_parametrization(layer.fc2, "weight", Twice())
    with torch.no_grad():
        expected.model.decoder.layers[1].fc2.weight.mul_(2)
    with CountSkips() as skips:
        found = logits(model, input_ids, "torch")
    assert skips.count == 2
    torch.testing.assert_close(found, logits(expected, input_ids, "dense"), atol=1e-4, rtol=1e-4)
    with pytest.raises(hf_sparse.PatchError, match="are parametrised"):
        hf_sparse.unpatch(model)
    assert torch.equal(logits(model, input_ids, "torch"), found)
    torch.nn.utils.parametrize.remove_parametrizations(layer.fc2, "weight")
    hf_sparse.unpatch(model)
    hf_sparse.unpatch(expected)
    assert type(layer.fc2) is nn.Linear
    found = logits(model, input_ids, "torch")
    torch.testing.assert_close(found, logits(expected, input_ids, "dense"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change", ["fewer", "repeated", "shared", "exchanged", "by hand"])
def test_layers_that_were_changed_are_saved_as_they_are(change, input_ids, tmp_path) -> None:
    model = tiny("opt")
    hf_sparse.patch(model, "fatrelu", threshold=(0.1, 0.2, 0.3))
    layers = model.model.decoder.layers
    if change == "fewer":
        del layers[1]
    elif change == "repeated":
        layers.append(copy.deepcopy(layers[0]))
    elif change == "shared":
        layers.append(layers[0])
    elif change == "exchanged":
        layers[0], layers[2] = layers[2], layers[0]
    else:
        layers[1].activation_fn = nn.SiLU()
    model.config.num_hidden_layers = len(layers)
    if change in ("shared", "by hand"):
        with pytest.raises(PatchError, match=r"copy\.deepcopy|has SiLU"):
            model.save_pretrained(tmp_path)
        return
    expected = logits(model, input_ids, "dense") if change != "repeated" else None
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    thresholds = [layer.activation_fn.threshold for layer in loaded.model.decoder.layers]
    assert thresholds == {"fewer": [0.1, 0.3], "exchanged": [0.3, 0.2, 0.1]}.get(change, [0.1, 0.2, 0.3, 0.1])
    if expected is not None:
        assert torch.equal(logits(loaded, input_ids, "dense"), expected)


class TestPeft:
    def lora(self, model: nn.Module, **options: object) -> nn.Module:
        return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **options)).eval()

    @pytest.mark.parametrize("first", ["patch", "lora"])
    def test_lora_on_both_projections(self, input_ids, first) -> None:
        torch.manual_seed(0)
        model = tiny("opt")
        reference = swapped_by_hand(model, "relu")
        torch.manual_seed(1)
        reference = self.lora(reference, target_modules=["fc1", "fc2"])
        expected = logits(reference, input_ids, "dense")
        torch.manual_seed(1)
        if first == "patch":
            hf_sparse.patch(model, "relu")
            wrapped = self.lora(model, target_modules=["fc1", "fc2"])
        else:
            wrapped = self.lora(model, target_modules=["fc1", "fc2"])
            hf_sparse.patch(wrapped, "relu")
        assert torch.equal(logits(wrapped, input_ids, "dense"), expected)
        with CountSkips() as skips:
            torch.testing.assert_close(logits(wrapped, input_ids, "torch"), expected, atol=1e-4, rtol=1e-4)
        assert skips.count == 3  # under the adapter
        merged = wrapped.merge_and_unload()
        with CountSkips() as skips:
            torch.testing.assert_close(logits(merged, input_ids, "torch"), expected, atol=1e-3, rtol=1e-3)
        assert skips.count == 3
        hf_sparse.unpatch(merged)
        assert all(type(layer.fc2) is nn.Linear for layer in merged.model.decoder.layers)

    @pytest.mark.parametrize("first", ["patch", "peft"])
    @pytest.mark.parametrize(
        ("family", "part"), [("opt", "fc2"), ("bert", "intermediate"), ("bert", "output.dense")]
    )
    def test_copies_of_a_part(self, input_ids, family, part, first) -> None:
        model = tiny(family)
        original = copy.deepcopy(model.state_dict())
        target = "q_proj" if family == "opt" else "query"
        options = {"target_modules": [target], "modules_to_save": [part]}
        if first == "patch":
            hf_sparse.patch(model, "relu")
            wrapped = self.lora(model, **options)
        else:
            wrapped = self.lora(model, **options)
            hf_sparse.patch(wrapped, "relu")
        expected = logits(wrapped, input_ids, "dense")
        torch.testing.assert_close(logits(wrapped, input_ids, "torch"), expected, atol=1e-4, rtol=1e-4)
        with wrapped.disable_adapter():
            bare = logits(wrapped, input_ids, "torch")
        plain = tiny(family)
        plain.load_state_dict(original)
        hf_sparse.patch(plain, "relu")
        torch.testing.assert_close(bare, logits(plain, input_ids, "dense"), atol=1e-4, rtol=1e-4)
        hf_sparse.set_mix(wrapped, 0.0)
        with wrapped.disable_adapter():
            unmixed = logits(wrapped, input_ids, "dense")
        hf_sparse.unpatch(plain)
        torch.testing.assert_close(unmixed, logits(plain, input_ids, "dense"), atol=1e-4, rtol=1e-4)
        hf_sparse.unpatch(wrapped)
        assert not any(isinstance(module, SparseLinear) for module in wrapped.modules())
        with wrapped.disable_adapter():
            assert torch.equal(logits(wrapped, input_ids, "dense"), logits(plain, input_ids, "dense"))
