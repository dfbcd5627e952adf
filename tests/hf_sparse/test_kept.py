"""Blocks whose module stays: OPT, BERT and others, from patch to skipping, saving and back."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import PatchError, SparsityConfig
from hf_sparse.adapters import find_blocks
from hf_sparse.adapters.kept import MARK
from hf_sparse.modules import KeptChange, SparseLinear
from hf_sparse.objectives import L1Penalty
from support.activations import fits
from support.by_hand import config_for, logits, swapped_by_hand
from support.compiler import CPP
from support.models import tiny
from support.peek import layouts
from support.skips import CountSkips
from triton_ops.activations import TABLE

ZAMBA = ["linear_attention", "hybrid"] * 3
NAMES = [name for name, row in TABLE.items() if not row.relu_up]


@pytest.mark.parametrize("backend", ["torch", CPP])
@pytest.mark.parametrize("activation", NAMES)
def test_it_computes_the_stock_model_with_that_activation(kept_type, activation, backend, input_ids) -> None:
    model = tiny(kept_type)
    if not fits(activation, find_blocks(model)[0][0].activation):
        with pytest.raises(PatchError, match=r"CATS is for|keeps the large"):
            hf_sparse.patch(model, config_for(activation))
        return
    expected = logits(swapped_by_hand(model, activation), input_ids, "dense")
    hf_sparse.patch(model, config_for(activation))
    assert torch.equal(logits(model, input_ids, "dense"), expected)
    assert layouts(model) == {False}
    with CountSkips() as skips:
        torch.testing.assert_close(logits(model, input_ids, backend), expected, atol=1e-4, rtol=1e-4)
    assert skips.count == 3
    assert layouts(model) == {True}
    # Once stored neuron by neuron, by whatever torch or the kernels do with that.
    torch.testing.assert_close(logits(model, input_ids, "dense"), expected, atol=1e-4, rtol=1e-4)


def test_a_model_that_is_sparse_as_it_comes_skips_with_its_own_activation(input_ids) -> None:
    model = tiny("opt", activation_function="relu")
    expected = logits(model, input_ids, "dense")
    hf_sparse.patch(model, "original")
    with CountSkips() as skips:
        torch.testing.assert_close(logits(model, input_ids, "torch"), expected)
    assert skips.count == 3
    hf_sparse.unpatch(model)
    hf_sparse.patch(tiny("opt"), "original")
    with CountSkips() as skips:
        logits(tiny("opt"), input_ids, "torch")
    assert skips.count == 0


def test_generating_gives_the_dense_tokens(kept_type) -> None:
    model = tiny(kept_type)
    hf_sparse.patch(model, "relu")
    prompt = torch.randint(3, 128, (1, 6))
    tokens = []
    for backend in ("dense", "torch"):
        with hf_sparse.backend(backend), CountSkips() as skips:
            tokens.append(model.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False))
    assert torch.equal(*tokens)
    assert skips.count == 8 * 3


CONFIGS = {
    "relu": SparsityConfig(),
    "original": SparsityConfig(activation="original"),
    "thresholds": SparsityConfig.read("fatrelu", threshold=(0.1, 1 / 3, 0.2)),
    "some layers": SparsityConfig(layers=(0, 2)),
    "mixed": SparsityConfig.read("jsrelu", mix=0.3),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_saved_comes_back(kept_type, name, input_ids, tmp_path) -> None:
    model = tiny(kept_type)
    stock = logits(model, input_ids, "dense")
    hf_sparse.patch(model, CONFIGS[name])
    expected = logits(model, input_ids, "dense")
    if name != "mixed":
        logits(model, input_ids, "torch")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, input_ids, "dense"), expected)
    assert hf_sparse.inspect(loaded).config == CONFIGS[name]
    with CountSkips() as skips:
        logits(loaded, input_ids, "torch")
    natively = kept_type == "bitnet"
    assert skips.count == {"original": 3 * natively, "some layers": 2, "mixed": 0}.get(name, 3)
    hf_sparse.unpatch(loaded)
    assert torch.equal(logits(loaded, input_ids, "dense"), stock)


def test_stock_transformers_loads_what_it_can_say(input_ids, tmp_path) -> None:
    model = tiny("opt")
    hf_sparse.patch(model, "relu")
    assert model.config.activation_function == "relu"
    model.save_pretrained(tmp_path)
    hf_sparse.uninstall()
    try:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    finally:
        hf_sparse.install()
    assert not any(isinstance(module, SparseLinear) or MARK in vars(module) for module in plain.modules())
    assert torch.equal(logits(plain, input_ids, "dense"), logits(model, input_ids, "dense"))
    hf_sparse.patch(model, "fatrelu", threshold=0.1)
    assert model.config.activation_function == "hf_sparse"


def test_the_head_of_a_bert_keeps_its_activation(input_ids) -> None:
    model = tiny("bert")
    head = model.cls.predictions.transform.transform_act_fn
    hf_sparse.patch(model, "relu")
    assert model.cls.predictions.transform.transform_act_fn is head
    assert model.config.hidden_act == "hf_sparse"  # which sets both


def test_the_mix_can_be_set(kept_type, input_ids) -> None:
    model = tiny(kept_type)
    dense = logits(model, input_ids, "dense")
    hf_sparse.patch(model, SparsityConfig.read("fatrelu", threshold=0.1, mix=0.0))
    torch.testing.assert_close(logits(model, input_ids, "torch"), dense)
    hf_sparse.set_mix(model, 0.5)
    with CountSkips() as skips:
        half = logits(model, input_ids, "torch")
    assert skips.count == 0
    assert not torch.allclose(half, dense)
    hf_sparse.set_mix(model, 1.0)
    with CountSkips() as skips:
        full = logits(model, input_ids, "torch")
    assert skips.count == 3
    hf_sparse.unpatch(model)
    hf_sparse.patch(model, "fatrelu", threshold=0.1)
    torch.testing.assert_close(full, logits(model, input_ids, "dense"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "message"), [("opt", "needs a gated MLP"), ("bitnet", "computes the block")]
)
def test_a_second_relu_is_refused(family, message, input_ids) -> None:
    model = tiny(family)
    before = logits(model, input_ids, "dense")
    with pytest.raises(PatchError, match=message):
        hf_sparse.patch(model, "drelu")
    assert torch.equal(logits(model, input_ids, "dense"), before)
    assert not any(MARK in vars(module) for module in model.modules())


def test_measuring_counts_the_zeros_that_reach_the_down_projections(kept_type, input_ids) -> None:
    model = tiny(kept_type)
    hf_sparse.patch(model, "relu")
    zeros: list[Tensor] = []
    handles = [
        block.activation.register_forward_hook(lambda _, args, out: zeros.append(out == 0))
        for block in find_blocks(model)[0]
    ]
    report = hf_sparse.measure(model, [{"input_ids": input_ids}])
    for handle in handles:
        handle.remove()
    found = [layer.zeros for layer in report.layers]
    assert found == [int(one.sum()) for one in zeros]
    assert all(layer.tokens == input_ids.numel() and layer.neurons == 88 for layer in report.layers)
    assert min(found) > 0


def test_the_l1_penalty_is_the_mean_of_what_reaches_the_down_projections(input_ids) -> None:
    model = tiny("opt").train()
    hf_sparse.patch(model, "relu")
    seen: list[Tensor] = []
    for block in find_blocks(model)[0]:
        block.activation.register_forward_hook(lambda _, args, out: seen.append(out))
    with L1Penalty(model) as l1:
        model(input_ids)
        expected = torch.stack([out.abs().mean() for out in seen]).sum()
        torch.testing.assert_close(l1.value(), expected)
        l1.value().backward()
    assert model.model.decoder.layers[0].fc1.weight.grad.abs().sum() > 0


def test_tuning_names_the_shape_and_keeps_the_density(input_ids, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = tiny("opt")
    hf_sparse.patch(model, "relu")
    measured = hf_sparse.measure(model, [{"input_ids": input_ids}])
    report = hf_sparse.tune(model, [{"input_ids": input_ids}], tokens=(1,))
    assert [layer.density for layer in report.layers] == [layer.density for layer in measured.layers]
    assert {m.problem.form for m in report.measurements} <= {"linear"}
    linear = vars(model.model.decoder.layers[1])["_modules"]["fc2"]
    assert linear.density == measured.layers[1].density


def test_patching_again_and_some_layers_start_from_the_stock_modules(kept_type, input_ids) -> None:
    model, other = tiny(kept_type), None
    modules = dict(model.named_modules())
    other = copy.deepcopy(model)
    hf_sparse.patch(model, "relu")
    logits(model, input_ids, "torch")
    config = SparsityConfig(activation="jsrelu", layers=(1,))
    hf_sparse.patch(model, config)
    hf_sparse.patch(other, config)
    assert torch.equal(logits(model, input_ids, "dense"), logits(other, input_ids, "dense"))
    assert sum(isinstance(module, SparseLinear) for module in model.modules()) == 1
    hf_sparse.unpatch(model)
    assert dict(model.named_modules()) == modules


def test_copies_and_pickles_have_weights_of_their_own(kept_type, input_ids) -> None:
    model = tiny(kept_type)
    hf_sparse.patch(model, "relu")
    expected = logits(model, input_ids, "torch")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twins = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for twin in twins:
        torch.testing.assert_close(logits(twin, input_ids, "torch"), expected)
        hf_sparse.unpatch(twin)
        downs = [block.module.get_submodule(block.roles.down) for block in find_blocks(twin)[0]]
        assert all(type(down) is nn.Linear and down.weight.any() for down in downs)


@pytest.mark.parametrize("family", ["bloom", "mpt", "cpmant"])
def test_modules_without_a_field_in_the_config(family, input_ids) -> None:
    """Their blocks are recognised and exchanged; it is the config that cannot say so."""
    model = tiny(family)
    expected = logits(swapped_by_hand(model, "relu"), input_ids, "dense")
    blocks, _ = find_blocks(model)
    assert len(blocks) == 3
    for block in blocks:
        KeptChange.to_sparse(block, nn.ReLU(), 1.0).make()
    assert torch.equal(logits(model, input_ids, "dense"), expected)
    with CountSkips() as skips:
        torch.testing.assert_close(logits(model, input_ids, "torch"), expected, atol=1e-4, rtol=1e-4)
    assert skips.count == 3


def test_a_model_with_blocks_of_both_kinds(input_ids, tmp_path) -> None:
    """DeepSeek-V4 has routed experts, and a shared one whose module stays, for its limits."""
    model = tiny("deepseek_v4", num_local_experts=4)
    stays = [block.stays for block in find_blocks(model)[0]]
    assert stays == [False, True] * 3
    expected = logits(swapped_by_hand(model, "relu"), input_ids, "dense")
    hf_sparse.patch(model, "relu")
    assert torch.equal(logits(model, input_ids, "dense"), expected)
    with CountSkips() as skips:
        torch.testing.assert_close(logits(model, input_ids, "torch"), expected, atol=1e-4, rtol=1e-4)
    assert skips.count >= 6
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, input_ids, "dense"), expected)


def test_layers_that_share_weights(input_ids, tmp_path) -> None:
    """Zamba2 has the weights of two MLPs for all its layers, which add a small product of their own each.

    A weight that two layers have is stored as torch does, so these run dense.
    """
    model = tiny("zamba2", hybrid_layer_ids=[1, 3, 5], num_hidden_layers=6, layers_block_type=ZAMBA)
    expected = logits(swapped_by_hand(model, "relu"), input_ids, "dense")
    assert not torch.equal(logits(model, input_ids, "dense"), expected)
    report = hf_sparse.patch(model, "relu")
    assert {block.stock_class.__name__ for block in report.blocks} == {"Zamba2MLP"}
    assert torch.equal(logits(model, input_ids, "dense"), expected)
    with CountSkips() as skips:
        torch.testing.assert_close(logits(model, input_ids, "torch"), expected, atol=1e-4, rtol=1e-4)
    assert skips.count == 1
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, input_ids, "dense"), expected)
