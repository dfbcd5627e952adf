"""Another activation in a patched model, and ProSparse's threshold shift, which is that."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import ActivationConfig, PatchError, SparsityConfig
from hf_sparse.methods import Training
from hf_sparse.methods.threshold_shift import ThresholdShift
from hf_sparse.patching import set_activation


@pytest.mark.parametrize("kind", ["llama", "phi3", "mixtral", "opt"])
def test_it_is_the_model_that_a_patch_makes(tiny_model, kind, input_ids) -> None:
    model, other = tiny_model(kind), tiny_model(kind)
    other.load_state_dict(model.state_dict())
    hf_sparse.patch(model, "relu", layers=(0, 2))
    modules = dict(model.named_modules())
    set_activation(model, ActivationConfig(name="fatrelu", threshold=(0.5, 0.25)))
    hf_sparse.patch(other, "fatrelu", threshold=(0.5, 0.25), layers=(0, 2))
    assert torch.equal(model(input_ids).logits, other(input_ids).logits)
    assert hf_sparse.inspect(model).config == hf_sparse.inspect(other).config
    assert model.config.to_dict() == other.config.to_dict()
    for backend in ("dense", "torch"):
        with torch.no_grad(), hf_sparse.backend(backend):
            one = (input_ids[:1, :1], None)
            torch.testing.assert_close(model(*one).logits, other(*one).logits)
    replaced = {
        type(module).__name__ for name, module in modules.items() if model.get_submodule(name) is not module
    }
    assert replaced == {"ReLU"}


def test_other_parts_of_the_patch_stay(tiny_model, input_ids) -> None:
    """What is around the activation is around the new one; what was trained is not made anew."""
    parts = {"statistical_topk": {"sparsity": 0.3}, "topk": {"share": 0.5}, "zeroth_bias": {"positions": 32}}
    model, other = tiny_model("llama"), tiny_model("llama")
    for one, activation in ((model, "relu"), (other, {"name": "fatrelu", "threshold": 0.5})):
        hf_sparse.patch(one, SparsityConfig(activation=activation, **parts))
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.zeroth_bias.bias)
    other.load_state_dict(model.state_dict())
    set_activation(model, ActivationConfig(name="fatrelu", threshold=0.5))
    assert torch.equal(model(input_ids).logits, other(input_ids).logits)
    assert hf_sparse.inspect(model).config == hf_sparse.inspect(other).config


def test_back_to_relu_is_a_stock_model_again(tiny_model, input_ids, tmp_path) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, "relu")
    expected = model(input_ids).logits
    set_activation(model, ActivationConfig(name="fatrelu", threshold=0.5))
    assert model.config.hidden_act == "hf_sparse"
    assert not torch.equal(model(input_ids).logits, expected)
    set_activation(model, ActivationConfig(name="relu"))
    assert model.config.hidden_act == "relu"
    assert torch.equal(model(input_ids).logits, expected)


@pytest.mark.parametrize(
    ("patched", "activation", "message"),
    [
        (None, {"name": "relu"}, "not patched"),
        ("relu", {"name": "drelu"}, "differ in what they make of the up projection"),
        ("relu", {"name": "fatrelu", "threshold": (0.1, 0.2)}, "values for 2 of 3 blocks"),
    ],
)
def test_what_cannot_be_set_leaves_the_model_as_it_was(
    tiny_model, input_ids, patched, activation, message
) -> None:
    model = tiny_model("llama")
    if patched:
        hf_sparse.patch(model, patched)
    before, config = model(input_ids).logits, model.config.to_dict()
    with pytest.raises(PatchError, match=message):
        set_activation(model, ActivationConfig(**activation))
    assert torch.equal(model(input_ids).logits, before)
    assert model.config.to_dict() == config


def test_the_shift_comes_when_training_is_finished_and_is_saved(tiny_model, input_ids, tmp_path) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, "relu")
    before = hf_sparse.measure(model, [{"input_ids": input_ids}])
    acting = ThresholdShift(threshold=0.2).attach(Training(model, steps=1))
    acting.before_step(1)
    acting.after_step(1)
    assert hf_sparse.measure(model, [{"input_ids": input_ids}]) == before
    acting.finish()
    after = hf_sparse.measure(model, [{"input_ids": input_ids}])
    gates = [layer.mlp.gate_proj for layer in model.model.layers]
    seen: list[torch.Tensor] = []
    for gate in gates:
        gate.register_forward_hook(lambda _, args, output: seen.append(output))
    logits = model(input_ids).logits
    small = sum(int(((p > 0) & (p < 0.2)).sum()) for p in seen[:1])
    assert after.layers[0].zeros - before.layers[0].zeros == small > 0
    acting.finish()
    acting.detach()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids).logits, logits)
    assert hf_sparse.inspect(loaded).config == SparsityConfig.read("fatrelu", threshold=0.2)


@pytest.mark.parametrize("patched", [None, "jsrelu", "drelu"])
def test_only_relu_can_be_shifted(patched) -> None:
    config = None if patched is None else SparsityConfig.read(patched)
    with pytest.raises(ValueError, match=f"makes FATReLU of ReLU, but patch={patched or 'none'}"):
        ThresholdShift().check(config)
    ThresholdShift().check(SparsityConfig.read("relu"))
    with pytest.raises(ValueError, match=r"threshold_shift\.threshold=0\.0.*positive"):
        ThresholdShift(threshold=0.0)
