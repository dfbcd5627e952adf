"""The methods on flat minima: bounds on norms and zeroth biases after each update, and noise on weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_sparse
from hf_sparse.adapters import find_blocks
from hf_sparse.methods import ActingTogether, Training, read_methods
from hf_sparse.norms import Norm, preceding_norms
from support.flat_minima import BOUNDS, IDS, PATCH, RESCALED, patched, trained
from support.models import tiny
from support.peek import zeroth_biases
from support.runs import run_on_two
from support.twins import assert_close

FAMILIES = ("llama", "gpt_neox", "gpt2", "gemma", "nemotron")


def acting(model: nn.Module, methods: dict[str, Any], steps: int = 10) -> ActingTogether:
    return ActingTogether(read_methods(methods), Training(model, steps))


def norms_of(model: nn.Module) -> list[Norm]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return list(preceding_norms(base, find_blocks(base)[0]).values())


def set_gain(norm: Norm, gain: list[float]) -> None:
    with torch.no_grad():
        norm.weight.fill_(2.0 - norm.offset)[: len(gain)] = torch.tensor(gain) - norm.offset


def gain_of(norm: Norm, count: int) -> list[float]:
    return (norm.weight.detach() + norm.offset)[:count].tolist()


# ---- norms


@pytest.mark.parametrize("kind", FAMILIES)
def test_uplift_is_the_published_formula(kind) -> None:
    model = patched(kind)
    norms = norms_of(model)
    before = [0.0, 0.1, -0.1, 0.3, -0.3, 0.9, -0.9, 1.0, 1.5, -2.0]
    for norm in norms:
        set_gain(norm, before)
    other = {n: p.clone() for n, p in model.named_parameters() if all(p is not norm.weight for norm in norms)}
    at_work = acting(model, {"norm_uplift": {"until": 0.5}}, steps=8)
    for step, bound in ((1, 0.25), (3, 0.75), (4, 1.0), (8, 1.0)):
        at_work.before_step(step)
        assert at_work.values() == {"norm_bound": bound}
        at_work.after_step(step)
        expected = [(-1 if g < 0 else 1) * max(abs(g), bound) for g in before]
        for norm in norms:
            assert gain_of(norm, 10) == pytest.approx(expected, abs=1e-6)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in other.items())


@pytest.mark.parametrize("kind", [*FAMILIES, "opt", "phi3", "gemma3_text"])
def test_rescaled_gains_leave_the_function_as_it_is(kind) -> None:
    model = patched(kind, "relu" if kind == "opt" else PATCH)
    norms = norms_of(model)
    for norm in norms:
        set_gain(norm, [0.0, 0.1, -0.1, 0.3, -0.5, 0.9, 1.0, 1.5, -2.0])
    for table in zeroth_biases(model):
        nn.init.normal_(table)
    before = model.eval()(input_ids=IDS).logits
    at_work = acting(model, {"norm_rescale": {}})
    at_work.before_step(2)  # of a run that goes on
    assert gain_of(norms[0], 2) == pytest.approx([0.0, 0.1])
    at_work.before_step(1)
    for norm in norms:
        assert gain_of(norm, 9) == pytest.approx([0.0, 1.6, -1.6, 1.2, -1.0, 1.8, 1.0, 1.5, -2.0])
    after = model(input_ids=IDS).logits
    assert torch.equal(after, before) if norms[0].offset == 0 else torch.allclose(after, before, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "config", "why"),
    [
        ("phi", {}, r"self_attn reads model\.layers\.0\.input_layernorm"),
        ("mixtral", {}, r"layers\.0\.mlp reads model\.layers\.0\.post_attention_layernorm"),
        ("olmo2", {}, r"gets its input from no norm of its layer alone"),
        ("bloom", {}, r"h\.0\.mlp reads transformer\.h\.0\.post_attention_layernorm"),
        ("llama", {"inputs": {"mlp.up_proj": 0.1}}, r"up_proj \(SparseLinear\) is no plain linear layer"),
    ],
)
def test_norms_that_cannot_be_rescaled_alone_are_refused(kind, config, why) -> None:
    model = tiny(kind)
    hf_sparse.patch(model, {"activation": "relu", **config})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(hf_sparse.PatchError, match=f"methods.norm_rescale .*{why}.*leave the method out"):
        acting(model, {"norm_rescale": {}})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", FAMILIES)
def test_clamp_is_the_published_formula(kind) -> None:
    model = patched(kind)
    norms = norms_of(model)
    for norm in norms:
        set_gain(norm, [0.0, 0.5, -3.0, 1.0, 1.5])
    at_work = acting(model, {"norm_clamp": {}})
    at_work.before_step(1)
    for norm in norms:
        assert gain_of(norm, 5) == pytest.approx([1.0, 1.0, 1.0, 1.0, 1.5])
        assert norm.bias is None or not norm.bias.any()
        set_gain(norm, [0.5])
        if norm.bias is not None:
            nn.init.ones_(norm.bias)
    at_work.after_step(1)
    for norm in norms:
        assert gain_of(norm, 2) == pytest.approx([1.0, 2.0])
        assert norm.bias is None or not norm.bias.any()


@pytest.mark.parametrize("method", ["norm_uplift", "norm_clamp"])
def test_biases_of_these_norms_are_not_trained_meanwhile(method) -> None:
    model = patched("gpt_neox")
    frozen = [norm.bias for norm in norms_of(model)]
    at_work = acting(model, {method: {}})
    assert [p for p in model.parameters() if not p.requires_grad] == frozen
    at_work.detach()
    assert all(p.requires_grad for p in model.parameters())


def test_training_keeps_within_the_bounds() -> None:
    model = patched()
    start = {name: p.clone() for name, p in model.named_parameters()}
    trained(model, IDS)
    norms = norms_of(model)
    for norm, table in zip(norms, zeroth_biases(model), strict=True):
        gain = norm.weight.abs()
        assert (gain >= 1).all()
        assert (table[:16].abs() <= 0.1 * gain + 1e-7).all()
        assert table.abs().max() > 0.05
        assert torch.equal(norm.bias, start[f"{norm.name}.bias"])
    trained(free := patched(), IDS, {})
    assert any((norm.weight.abs() < 1).any() for norm in norms_of(free))
    assert max(table.abs().max() for table in zeroth_biases(free)) > 0.11


# ---- zeroth biases


@pytest.mark.parametrize("kind", FAMILIES)
def test_clipping_is_the_published_formula(kind) -> None:
    model = patched(kind)
    for table in zeroth_biases(model):
        nn.init.normal_(table)
    expected = []
    for norm, table in zip(norms_of(model), zeroth_biases(model), strict=True):
        set_gain(norm, [0.0, -1.0, 0.5])
        limit = 0.1 * (norm.weight + norm.offset).abs()
        expected.append(torch.stack([torch.minimum(torch.maximum(row, -limit), limit) for row in table]))
    at_work = acting(model, {"zeroth_clip": {}})
    at_work.after_step(1)
    for table, want in zip(zeroth_biases(model), expected, strict=True):
        assert torch.equal(table, want)
        assert not table[:, 0].any()


@pytest.mark.parametrize("kind", ["olmo", "olmo2"])
def test_without_a_gain_the_share_is_the_bound(kind) -> None:
    model = patched(kind)
    for table in zeroth_biases(model):
        nn.init.normal_(table)
    expected = [table.clamp(-0.3, 0.3) for table in zeroth_biases(model)]
    acting(model, {"zeroth_clip": {"share": 0.3}}).after_step(1)
    for table, want in zip(zeroth_biases(model), expected, strict=True):
        assert torch.equal(table, want)


# ---- weight noise


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_noise_is_that_of_weights_redrawn_for_each_token(kind) -> None:
    model = tiny(kind).train()
    hf_sparse.patch(model, "relu")
    block = find_blocks(model)[0][1]
    name = {"llama": "gate_proj", "gpt2": "c_fc", "opt": "fc1"}[kind]
    linear = block.module.get_submodule(name)
    x = torch.randn(4, 1, 32) * torch.tensor([0.5, 1.0, 2.0, 0.0]).view(4, 1, 1)
    clean = linear(x)
    at_work = acting(model, {"weight_noise": {"rho": 0.2}})
    noise = linear(x.expand(4, 3000, 32).contiguous()) - clean
    sigma = 0.2 * linear.weight.norm() / linear.weight.numel() ** 0.5
    assert torch.equal(noise[3], torch.zeros_like(noise[3]))
    expected = (sigma * x[:3, 0].norm(dim=-1)).detach()
    assert_close(noise[:3].std(dim=(1, 2)), expected, tolerance=0.01)
    assert noise[:3].mean(dim=(1, 2)).abs().max() < 0.01
    tokens, neurons = noise[0, :-1].flatten(), noise[0, 1:].flatten()
    assert abs(torch.corrcoef(torch.stack((tokens, neurons)))[0, 1]) < 0.01
    at_work.detach()
    assert torch.equal(linear(x), clean)


def test_noise_carries_no_gradient() -> None:
    model = patched("llama")
    linear = model.model.layers[0].mlp.gate_proj
    x = torch.randn(2, 5, 32, requires_grad=True)
    plain = torch.autograd.grad(linear(x).sum(), (x, linear.weight))
    acting(model, {"weight_noise": {}})
    for one, other in zip(torch.autograd.grad(linear(x).sum(), (x, linear.weight)), plain, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("linears", "count"), [("all", 6), ("first", 4)])
def test_noise_is_for_training_and_for_the_layers_that_are_named(linears, count) -> None:
    model = patched("llama")
    acting(model, {"weight_noise": {"linears": linears}})
    assert sum(len(one._forward_hooks) for one in model.modules() if isinstance(one, nn.Linear)) == count
    with torch.no_grad():
        noisy = [model(IDS).logits for _ in range(2)]
        quiet = [model.eval()(IDS).logits for _ in range(2)]
    assert not torch.allclose(*noisy, atol=1e-3)
    assert torch.equal(*quiet)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_layer_has_the_same_noise(reentrant) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = patched("llama")
        if checkpointing:
            kwargs = {"use_reentrant": reentrant}
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
        acting(model, {"weight_noise": {}})
        torch.manual_seed(7)
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        assert_close(one, other, tolerance=1e-6)


def test_noise_continues_bit_for_bit_from_the_state_of_the_generator() -> None:
    model = patched("llama")
    acting(model, {"weight_noise": {}})
    state = torch.get_rng_state()
    one = model(IDS).logits
    torch.set_rng_state(state)
    assert torch.equal(model(IDS).logits, one)


# ---- where they act


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_they_train_in_mixed_precision(precision) -> None:
    model = patched("llama")
    methods = {**BOUNDS, "weight_noise": {}}
    with torch.autocast("cpu", precision):
        trained(model, IDS, methods)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all((norm.weight.abs() >= 1).all() for norm in norms_of(model))


def test_under_lora_what_is_not_trained_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    config = {"r": 2, "target_modules": ["up_proj", "down_proj"]}
    model = get_peft_model(patched("llama"), LoraConfig(**config))
    before = copy.deepcopy(model.state_dict())
    for method in ("norm_uplift", "norm_clamp", "norm_rescale", "zeroth_clip"):
        with pytest.raises(ValueError, match=rf"methods.{method} changes .* not trained .* modules_to_save"):
            acting(model, {method: {}}).before_step(1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_under_lora_they_act_on_the_copies_that_are_trained() -> None:
    from peft import LoraConfig, get_peft_model

    saved = ["zeroth_bias", "post_attention_layernorm"]
    config = LoraConfig(r=2, target_modules=["up_proj", "down_proj"], modules_to_save=saved)
    model = get_peft_model(patched("llama"), config)
    base = {n: p.clone() for n, p in model.named_parameters() if "original_module" in n}
    trained(model, IDS, {**BOUNDS, "weight_noise": {}})
    own = {n: p for n, p in model.named_parameters() if "modules_to_save" in n}
    assert len(base) == len(own) == 4
    assert all(torch.equal(model.get_parameter(name), value) for name, value in base.items())
    assert all((p.abs() >= 1).all() for n, p in own.items() if "layernorm" in n)
    assert all(p.abs().max() > 0 for n, p in own.items() if "zeroth" in n)


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path) -> None:
    run_on_two("support.flat_minima", tmp_path / "found.pt")
    reference = trained(patched(), IDS).state_dict()
    found = torch.load(tmp_path / "found.pt")
    assert set(found) == {"ddp", "fsdp2", "fsdp2, rescaled"}
    rescaled = trained(patched(), IDS, RESCALED).state_dict()
    for wrapped, state in found.items():
        expected = rescaled if "rescaled" in wrapped else reference
        assert state.keys() == expected.keys()
        for name, value in state.items():
            assert_close(value, expected[name], tolerance=1e-5)
    assert any(not torch.equal(rescaled[name], value) for name, value in reference.items())


# ---- what they refuse


@pytest.mark.parametrize(
    ("kind", "method", "why"),
    [
        ("olmo2", "norm_clamp", r"at model\.layers\.0\.mlp no norm stands before it; leave the method out"),
        ("olmo", "norm_uplift", r"post_attention_layernorm has no weight"),
        ("mixtral", "weight_noise", r"the weights of .* are stacked experts"),
    ],
)
def test_models_for_which_they_mean_nothing(kind, method, why) -> None:
    model = tiny(kind)
    hf_sparse.patch(model, "relu")
    with pytest.raises(hf_sparse.PatchError, match=why):
        acting(model, {method: {}})


@pytest.mark.parametrize(
    "method", ["norm_uplift", "norm_clamp", "norm_rescale", "zeroth_clip", "weight_noise"]
)
def test_dense_baselines_have_none(method) -> None:
    (one,) = read_methods({method: {}})
    with pytest.raises(ValueError, match=f"methods.{method}"):
        one.check(None)
    with pytest.raises(hf_sparse.PatchError, match="patch the model first"):
        acting(tiny("llama"), {method: {}})


def test_without_a_zeroth_bias_there_is_nothing_to_clip() -> None:
    (one,) = read_methods({"zeroth_clip": {}})
    with pytest.raises(ValueError, match="the model has none"):
        one.check(hf_sparse.SparsityConfig())
    model = tiny("llama")
    hf_sparse.patch(model, "relu")
    with pytest.raises(ValueError, match="the model has none"):
        acting(model, {"zeroth_clip": {}})


@pytest.mark.parametrize(
    "fields",
    [
        {"norm_uplift": {"until": 1.1}},
        {"norm_uplift": {"until": True}},
        {"norm_clamp": {"until": 0.1}},
        {"zeroth_clip": {"share": 0}},
        {"weight_noise": {"rho": -0.1}},
        {"weight_noise": {"linears": "last"}},
    ],
)
def test_fields_out_of_range_are_refused(fields) -> None:
    ((method, given),) = fields.items()
    with pytest.raises(ValueError, match=f"methods.{method}.*{next(iter(given))}"):
        read_methods(fields)


def test_a_copy_of_a_parameter_that_an_optimizer_keeps_is_refused() -> None:
    model = patched("llama")
    at_work = acting(model, BOUNDS)
    norms_of(model)[0].weight.ds_id = 0
    with pytest.raises(ValueError, match=r"methods.norm_uplift .* DeepSpeed .* FSDP2"):
        at_work.after_step(1)
