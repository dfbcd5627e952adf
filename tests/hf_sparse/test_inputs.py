"""Thresholds on the inputs of linear layers: what is computed, how it lives, what is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import PatchError, SparsityConfig
from hf_sparse.adapters.pruning import Pruning
from hf_sparse.modules import SparseLinear
from support.models import tiny
from support.skips import CountSkips

THRESHOLDS = {"self_attn.q_proj": 0.5, "self_attn.o_proj": (0.02, 0.01, 0.0), "mlp.gate_proj": 0.3}
ALL = {**THRESHOLDS, "mlp.down_proj": (0.0002, 0.001, 0.004)}


def config(**inputs) -> SparsityConfig:
    return SparsityConfig(activation="original", inputs=inputs or ALL)


def by_hand(model: nn.Module, thresholds=ALL) -> nn.Module:
    """The same, with hooks on stock layers."""

    def prune(threshold: float):
        return lambda _, args: (args[0] * (args[0].abs() > threshold),)

    for index, layer in enumerate(model.model.layers):
        for name, each in thresholds.items():
            threshold = each[index] if isinstance(each, tuple) else each
            layer.get_submodule(name).register_forward_pre_hook(prune(threshold))
    return model


def test_small_inputs_are_taken_for_zero_and_unpatch_brings_the_stock_layers_back(input_ids) -> None:
    model = tiny("llama")
    stock, layers = model(input_ids).logits, list(model.modules())
    expected = by_hand(copy.deepcopy(model))(input_ids).logits
    assert not torch.allclose(expected, stock)
    keys = list(model.state_dict())
    hf_sparse.patch(model, config())
    assert torch.equal(model(input_ids).logits, expected)
    assert list(model.state_dict()) == keys
    hf_sparse.patch(model, config(**{"mlp.up_proj": 0.1}))  # no threshold of before stays
    other = by_hand(copy.deepcopy(hf_sparse_unpatched(model)), {"mlp.up_proj": 0.1})(input_ids).logits
    assert torch.equal(model(input_ids).logits, other)
    hf_sparse.unpatch(model)
    assert torch.equal(model(input_ids).logits, stock)
    assert list(model.modules()) == layers


def hf_sparse_unpatched(model: nn.Module) -> nn.Module:
    stock = copy.deepcopy(model)
    hf_sparse.unpatch(stock)
    return stock


def test_prepare_stores_them_for_skipping_and_says_who_holds_them(input_ids) -> None:
    model = tiny("llama")
    hf_sparse.patch(model, config(**{"self_attn.q_proj": 0.5, "mlp.up_proj": 0.1}))
    hf_sparse.prepare(model)

    def strides(index: int) -> list[int]:
        layer = model.model.layers[index]
        return [
            vars(one)["_parameters"]["weight"].stride(0)
            for one in (layer.self_attn.q_proj, vars(layer.mlp)["_modules"]["up_proj"])
        ]

    assert [strides(index) for index in range(3)] == [[1, 1]] * 3
    kept = list(model.parameters())
    assert [strides(index) for index in range(3)] == [[32, 32]] * 3
    with pytest.warns(UserWarning, match="6 linear layers with thresholds"):
        hf_sparse.prepare(model)
    del kept
    hf_sparse.prepare(model)
    assert strides(2) == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_tokens_skip_and_give_what_dense_gives(input_ids, dtype) -> None:
    model = tiny("llama").to(dtype)
    hf_sparse.patch(model, config())
    token = input_ids[:1, :1]
    with torch.no_grad():  # a graph would hold the weights
        dense = model(token).logits
    with torch.no_grad(), hf_sparse.backend("cpp"), CountSkips() as skips:
        skipped = model(token).logits
    assert skips.count == 3 + 2 + 3 + 3  # the last o_proj has no threshold
    torch.testing.assert_close(skipped, dense, rtol=0, atol=2e-6 if dtype is torch.float32 else 5e-3)
    with hf_sparse.backend("cpp"):
        generated = model.generate(input_ids[:, :4], max_new_tokens=6, do_sample=False)
    assert torch.equal(generated, model.generate(input_ids[:, :4], max_new_tokens=6, do_sample=False))


def test_it_is_saved_loaded_and_inspected(input_ids, tmp_path) -> None:
    model = tiny("llama")
    hf_sparse.patch(model, config())
    expected = model(input_ids).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids).logits, expected)
    assert hf_sparse.inspect(loaded).config == config()
    assert "mlp.gate_proj 0.3" in str(hf_sparse.inspect(loaded))
    loaded.model.layers[1].mlp.gate_proj.pruning = Pruning(0.2)
    with pytest.raises(PatchError, match="patch the model again"):
        loaded.save_pretrained(tmp_path)


def test_gradients_are_those_of_the_pruned_function(input_ids) -> None:
    model = tiny("llama").train()
    reference = by_hand(copy.deepcopy(model))
    hf_sparse.patch(model, config())
    with torch.no_grad(), hf_sparse.backend("cpp"):
        model.eval()(input_ids[:1, :1])  # weights are in another layout from here
    for one in (model.train(), reference):
        one(input_ids, labels=input_ids).loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def test_adapters_get_the_whole_input_and_merge(input_ids) -> None:
    torch.manual_seed(0)
    model = tiny("llama")
    lora = LoraConfig(target_modules=["q_proj", "gate_proj"], init_lora_weights=False)
    reference = get_peft_model(copy.deepcopy(model), lora)
    for wrapped in (m for m in reference.modules() if type(m).__name__ == "Linear" and hasattr(m, "lora_A")):
        threshold = 0.5 if wrapped.out_features == 32 else 0.3
        wrapped.base_layer.register_forward_pre_hook(lambda _, a, t=threshold: (a[0] * (a[0].abs() > t),))
    own = {k: v for k, v in THRESHOLDS.items() if not isinstance(v, tuple)}
    hf_sparse.patch(model, config(**own))
    adapted = get_peft_model(model, lora)
    adapted.load_state_dict(reference.state_dict())
    torch.testing.assert_close(adapted(input_ids).logits, reference(input_ids).logits)
    hf_sparse.patch(adapted, config(**own, **{"mlp.up_proj": 0.0}))
    torch.testing.assert_close(adapted(input_ids).logits, reference(input_ids).logits)
    merged = adapted.merge_and_unload()
    assert hf_sparse.inspect(merged).config.parts["inputs"].at(0)["self_attn.q_proj"].threshold == 0.5
    hf_sparse.unpatch(merged)
    assert {type(m) for m in merged.modules() if isinstance(m, nn.Linear)} == {nn.Linear}


def test_with_an_activation_that_skips_both_hold(input_ids) -> None:
    model = tiny("llama")
    reference = copy.deepcopy(model)
    hf_sparse.patch(reference, "relu")
    by_hand(reference, THRESHOLDS)
    hf_sparse.patch(model, SparsityConfig(activation="relu", inputs=THRESHOLDS))
    assert torch.equal(model(input_ids).logits, reference(input_ids).logits)
    with torch.no_grad(), hf_sparse.backend("cpp"):
        torch.testing.assert_close(model(input_ids[:1, :1]).logits, reference(input_ids[:1, :1]).logits)
    with torch.no_grad():
        hf_sparse.measure(model, [{"input_ids": input_ids}])
    hf_sparse.unpatch(model)
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({}, "names no layer"),
        ({"mlp.up_proj": -0.1}, "is negative"),
        ({"mlp.up_proj": float("nan")}, "not a finite number"),
        ({"mlp..up": 0.1}, "no name of a module"),
        ({"mlp.up_proj": (0.1, 0.2), "mlp.down_proj": (0.1,)}, "for 1 and 2 blocks"),
        ("mlp.up_proj", "is a mapping"),
    ],
)
def test_a_config_that_says_nothing_clear_is_refused(inputs, named) -> None:
    with pytest.raises(ValueError, match=named):
        SparsityConfig(activation="original", inputs=inputs)


@pytest.mark.parametrize(
    ("kind", "inputs", "named"),
    [
        ("llama", {"mlp.w1": 0.1}, "no such module; its linear layers are self_attn.q_proj, "),
        ("llama", {"mlp": 0.1}, "no nn.Linear"),
        ("llama", {"mlp.up_proj": (0.1, 0.2)}, "3 are to be patched"),
        ("gpt2", {"mlp.c_fc": 0.1}, "is a Conv1D and no nn.Linear"),
        ("mixtral", {"self_attn.q_proj": 0.1}, "stacked experts"),
        ("opt", {"fc1": 0.1}, "stays a"),
    ],
)
def test_what_a_model_cannot_have_is_refused_and_changes_nothing(kind, inputs, named, input_ids) -> None:
    model = tiny(kind)
    stock, modules = model(input_ids).logits, list(model.modules())
    with pytest.raises(PatchError, match=named):
        hf_sparse.patch(model, config(**inputs))
    assert list(model.modules()) == modules
    assert torch.equal(model(input_ids).logits, stock)


def test_no_program_that_ignores_them_gets_the_model(tmp_path) -> None:
    model = tiny("llama")
    hf_sparse.patch(model, config())
    with pytest.raises(PatchError):
        hf_sparse.export(model, tmp_path / "dense")
    with pytest.raises(PatchError):
        hf_sparse.export(model, tmp_path / "model.gguf", format="gguf")


def test_quantised_loading_would_lose_them_and_is_refused(tmp_path) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = tiny("llama")
    hf_sparse.patch(model, config())
    model.save_pretrained(tmp_path)
    with pytest.raises(PatchError, match="cannot be quantised while loading"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
        )


def test_measured_sparsity_has_what_the_down_projection_takes_for_zero(input_ids) -> None:
    model = tiny("llama")
    reference = by_hand(copy.deepcopy(model))
    hf_sparse.patch(model, config())
    zeros = []
    for layer in reference.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, args: zeros.append((args[0] == 0).float().mean())
        )
    reference(input_ids)
    report = hf_sparse.measure(model, [{"input_ids": input_ids}])
    assert [layer.sparsity for layer in report.layers] == pytest.approx([float(z) for z in zeros])
    assert min(zeros) > 0


def test_a_forward_that_another_tool_put_there_is_refused(input_ids) -> None:
    model = tiny("llama")
    q = model.model.layers[0].self_attn.q_proj
    q.forward = lambda x: 2 * nn.functional.linear(x, q.weight)
    stock = model(input_ids).logits
    with pytest.raises(PatchError, match="forward was replaced"):
        hf_sparse.patch(model, config(**{"self_attn.q_proj": 0.5}))
    assert torch.equal(model(input_ids).logits, stock)
    del q.forward
    hf_sparse.patch(model, config(**{"self_attn.q_proj": 0.5}))
    model.model.layers[0].self_attn.q_proj.forward = lambda x: x
    with pytest.raises(PatchError, match="take that back first"):
        hf_sparse.unpatch(model)


def test_what_was_compiled_by_itself_does_not_run_on_without_the_patch(input_ids) -> None:
    model = tiny("llama")
    reference = by_hand(copy.deepcopy(model), {"self_attn.q_proj": 0.5})
    model.model.layers[0].self_attn.q_proj.compile(backend="eager")
    hf_sparse.patch(model, config(**{"self_attn.q_proj": 0.5}))
    assert torch.equal(model(input_ids).logits, reference(input_ids).logits)
    model, reference = tiny("llama"), None
    stock = model(input_ids).logits
    model.model.layers[0].mlp.compile(backend="eager")
    hf_sparse.patch(model, SparsityConfig(activation="relu", layers=[0]))
    assert not torch.allclose(model(input_ids).logits, stock)


def test_what_has_ended_while_patched_does_not_come_back(input_ids) -> None:
    model = tiny("llama")
    prune.l1_unstructured(model.model.layers[0].self_attn.q_proj, "weight", 0.5)
    hf_sparse.patch(model, config(**{"self_attn.q_proj": 0.5}))
    prune.remove(model.model.layers[0].self_attn.q_proj, "weight")
    hf_sparse.unpatch(model)
    q = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        q.weight.zero_()
    assert q(torch.randn(2, 32)).abs().max() == 0


def test_copies_of_adapters_have_thresholds_and_a_threshold_taken_away_is_noticed(input_ids) -> None:
    model = tiny("llama")
    hf_sparse.patch(model, config(**{"mlp.down_proj": 0.001}))
    expected = model(input_ids).logits
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["down_proj"]))
    torch.testing.assert_close(adapted(input_ids).logits, expected)
    assert hf_sparse.inspect(adapted).config == config(**{"mlp.down_proj": 0.001})
    hf_sparse.patch(adapted, config(**{"mlp.down_proj": 0.002}))
    hf_sparse.unpatch(adapted)
    assert not any(isinstance(module, SparseLinear) for module in adapted.modules())
    model = tiny("llama")
    hf_sparse.patch(model, config(**{"self_attn.q_proj": 0.5}))
    model.model.layers[1].self_attn.q_proj.pruning = Pruning(0.25)
    with pytest.raises(PatchError, match="patch the model again"):
        hf_sparse.inspect(model)
    hf_sparse.unpatch(model)
    assert not any(isinstance(module, SparseLinear) for module in model.modules())


def test_nan_is_not_taken_for_zero(input_ids) -> None:
    model = tiny("llama")
    hf_sparse.patch(model, config())
    x: Tensor = torch.full((1, 32), 0.1)
    x[0, 3] = float("nan")
    assert model.model.layers[0].mlp.gate_proj(x).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("threshold", [1e-38, 0.01, 0.0098569, 1.0, math.inf])
def test_values_at_the_threshold_are_taken_for_zero_in_every_dtype(dtype, threshold) -> None:
    special = [threshold, -threshold, 0.0, -0.0, math.nan, math.inf, -math.inf]
    x = torch.cat([torch.randn(2000), torch.linspace(-1, 1, 201), torch.tensor(special)]).to(dtype)
    expected = x.masked_fill(x.abs() <= threshold, 0.0)
    found = Pruning(threshold).values(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit(), expected.signbit())
