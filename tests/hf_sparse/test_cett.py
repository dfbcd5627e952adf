"""CETT by its definition, and the search for the sparsity at which perplexity is p % higher."""

from __future__ import annotations

import gzip
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse.metrics.cett import TARGETS, THRESHOLDS
from hf_sparse.metrics.tail import without_tails
from hf_sparse.observing import blocks_of
from support.models import tiny
from support.sites import padded, relu_model, seen

SIZES = {"sequence_length": 128, "max_tokens": 2048}


def error_by_hand(h, weight, threshold):
    """Mean over tokens, and the neurons left out: ``h [T, F]``, ``weight [D, F]``; in float64."""
    added = h.double()[:, None, :] * weight.double()  # [T, D, F]
    tail = added.norm(dim=1) <= threshold
    lost, whole = (added * tail[:, None]).sum(-1).norm(dim=1), added.sum(-1).norm(dim=1)
    return float((lost / whole).mean()), int(tail.sum())


def down_of(block):
    return [weight for weight, _ in block.weights()][-1].detach()


def curves_of(model, data, **options):
    return hf_sparse.measure(model, data, metrics=["cett"], **options).metrics["cett"].layers


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "silu llama", "gelu gpt2"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_errors_and_tails_are_those_of_the_definition(family, padding):
    model = tiny(family.split()[1]) if " " in family else relu_model(family)
    batch = padded(padding)
    blocks = blocks_of(model)
    for block, layer, one in zip(blocks, curves_of(model, [batch]), seen(model, [batch]), strict=True):
        h = torch.cat(one.h)
        for k in range(20, len(THRESHOLDS), 16):
            error, removed = error_by_hand(h, down_of(block), THRESHOLDS[k])
            assert layer.errors[k] / layer.tokens == pytest.approx(error, rel=1e-4, abs=1e-6)
            assert abs(layer.removed[k] - removed) <= 1e-5 * h.numel()  # on the other side by rounding
        assert layer.removed[-1] == h.numel()
        assert layer.errors[-1] == pytest.approx(len(h))
        for target in (0.02, 0.1, 0.3, 0.7):
            error, removed = error_by_hand(h, down_of(block), layer.threshold(target))
            assert error == pytest.approx(target, rel=0.02)
            assert removed / h.numel() == pytest.approx(layer.sparsity(target), abs=0.01)
        zeros = int((h == 0).sum()) / h.numel()
        assert layer.removed[0] == round(zeros * h.numel())
        assert layer.sparsity(0) == pytest.approx(zeros, abs=2e-4)
        assert layer.threshold(0) <= min(layer.threshold(target) for target in TARGETS)


@pytest.fixture(scope="module")
def texts(assets):
    with gzip.open(assets / "c4" / "c4-validation.00000-of-00001.json.gz", "rt") as lines:
        return [json.loads(line)["text"] for line, _ in zip(lines, range(20), strict=False)]


def real(assets, activation):
    model = AutoModelForCausalLM.from_pretrained(assets / "stories260K")
    if activation == "relu":
        hf_sparse.patch(model, "relu")
    return model


@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_the_real_llama_loses_the_target_in_every_layer(assets, texts, activation):
    model = real(assets, activation)
    inputs = {}
    for block in blocks_of(model):
        block.watch("h", lambda h, _, name=block.name: inputs.setdefault(name, []).append(h.flatten(0, -2)))
    layers = curves_of(model, texts, sequence_length=128, max_tokens=512)
    for block, layer in zip(blocks_of(model), layers, strict=True):
        h = torch.cat(inputs[block.name])
        assert len(h) == layer.tokens == 512
        for target in TARGETS:
            error, _ = error_by_hand(h, down_of(block), layer.threshold(target))
            assert error == pytest.approx(target, rel=0.01)


@pytest.mark.parametrize(
    ("activation", "p", "tolerance"), [("silu", 1, 0.02), ("silu", 10, 0.05), ("relu", 5, 0.1)]
)
def test_perplexity_of_the_real_llama_rises_by_p_percent(assets, texts, activation, p, tolerance):
    model = real(assets, activation)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = hf_sparse.measure(model, texts, **SIZES)
    report = hf_sparse.cett_sparsity(model, texts, p, tolerance=tolerance, **SIZES)
    assert report.rise == pytest.approx(p, rel=tolerance)
    assert report.perplexity_before == dense.perplexity
    assert report.zeros == pytest.approx(dense.sparsity)
    assert (report.tokens, report.sequence_length) == (2048, 128)
    curves = curves_of(model, texts, **SIZES)
    assert [one.threshold for one in report.layers] == [curve.threshold(report.cett) for curve in curves]

    removed, handles = 0, []

    def without_tail(module, args, threshold):
        nonlocal removed
        tail = args[0].abs() * module.weight.norm(dim=0) <= threshold
        removed += int(tail.sum())
        return (args[0] * ~tail,)

    for layer, one in zip(model.model.layers, report.layers, strict=True):
        hook = lambda module, args, threshold=one.threshold: without_tail(module, args, threshold)  # noqa: E731
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(hook))
    loss = hf_sparse.measure(model, texts, **SIZES).loss
    assert loss == pytest.approx(report.loss, rel=1e-4)
    assert removed / (2048 * 5 * 172) == pytest.approx(report.sparsity, rel=1e-4)
    for handle in handles:
        handle.remove()
    assert report.sparsity > report.zeros
    assert hf_sparse.measure(model, texts, **SIZES) == dense
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_report_is_a_table_and_json(assets, texts):
    report = hf_sparse.cett_sparsity(
        real(assets, "silu"), texts, tolerance=0.1, calibration_tokens=512, **SIZES
    )
    data = json.loads(json.dumps(report.to_dict()))
    assert data["perplexity"] == pytest.approx(math.exp(data["loss"]))
    assert data["rise"] == pytest.approx(100 * (data["perplexity"] / data["perplexity_before"] - 1))
    assert data["sparsity"] == pytest.approx(sum(layer["sparsity"] for layer in data["layers"]) / 5)
    assert (data["p"], data["zeros"], data["density"]) == (1.0, 0, 1 - data["sparsity"])
    text = str(report)
    assert f"{report.sparsity:.2%}" in text
    assert f"{report.layers[3].threshold:.3g}" in text
    assert "CETT-PPL-1 %" in text


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gpt_neox", "bert"])
def test_tails_are_left_out_of_blocks_of_every_kind_that_skip(family, backend, input_ids):
    model = tiny(family)
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model)
    blocks = blocks_of(model)
    with torch.no_grad(), hf_sparse.backend(backend):
        dense = model(input_ids).logits
        with without_tails(blocks, [0.0] * 3):
            torch.testing.assert_close(model(input_ids).logits, dense, rtol=1e-4, atol=1e-4)
        with without_tails(blocks, [1e9] * 3):
            nothing = model(input_ids).logits
        for block in blocks:
            block.module.get_submodule(block.roles.down).weight.zero_()
        torch.testing.assert_close(model(input_ids).logits, nothing)
    assert not torch.allclose(dense, nothing, atol=0.1)


def test_what_has_no_such_sparsity_is_refused():
    data = [padded("right")]
    experts = tiny("mixtral")
    with pytest.raises(hf_sparse.PatchError, match=r"model\.layers\.0\.mlp\.experts has stacked experts"):
        hf_sparse.cett_sparsity(experts, data)
    model = relu_model("llama")
    for options, message in (
        ({"p": 0}, "p=0 is no rise"),
        ({"p": math.inf}, "p=inf is no rise"),
        ({"tolerance": 1}, "tolerance=1 is out of range"),
        ({"calibration_tokens": 0}, "calibration_tokens=0 is out of range"),
        ({"max_tokens": 0}, "max_tokens=0"),
    ):
        with pytest.raises(ValueError, match=message):
            hf_sparse.cett_sparsity(model, data, **options)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    with pytest.raises(ValueError, match="rises by 0 % with nearly all neurons left out, and never"):
        hf_sparse.cett_sparsity(model, data)
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    with pytest.raises(ValueError, match="the loss of the model on this data is nan"):
        hf_sparse.cett_sparsity(model, data)
    curve = curves_of(relu_model("llama"), data)[0]
    with pytest.raises(ValueError, match="cett=1 is out of range"):
        curve.threshold(1)


def test_a_threshold_on_the_input_of_the_down_projection_is_refused_and_elsewhere_not(input_ids):
    for name, refused in (("mlp.up_proj", False), ("mlp.down_proj", True)):
        model = tiny("llama")
        hf_sparse.patch(model, hf_sparse.SparsityConfig(activation="original", inputs={name: 0.1}))
        if not refused:
            assert curves_of(model, [{"input_ids": input_ids}])[0].sparsity(0.1) > 0
            continue
        with pytest.raises(hf_sparse.PatchError, match=r"layers\.0\.mlp has a threshold on its inputs"):
            hf_sparse.cett_sparsity(model, [{"input_ids": input_ids}])


def test_contributions_beyond_the_candidates_have_no_threshold():
    model = relu_model("llama")
    down = model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        down.weight.mul_(1e9)
    report = hf_sparse.measure(model, [padded("none")], metrics=["cett"])
    shares = [layer["shares"]["at CETT 0.1"] for layer in report.to_dict()["metrics"]["cett"]["layers"]]
    assert shares[0] > 0.5
    assert shares[1] is None
    with pytest.raises(ValueError, match=r"some neurons of model\.layers\.1\.mlp add more than 65,536"):
        report.metrics["cett"].layers[1].threshold(0.1)
    with pytest.raises(ValueError, match=r"some neurons of model\.layers\.1\.mlp add more than 65,536"):
        hf_sparse.cett_sparsity(model, [padded("none")])


def test_a_step_in_perplexity_is_no_result(input_ids):
    """One sequence of few tokens: each value that is left out is a step."""
    with pytest.raises(ValueError, match=r"jumps from .* past p=1 % with tolerance=1e-09"):
        hf_sparse.cett_sparsity(tiny("llama"), [{"input_ids": input_ids}], tolerance=1e-9)


def test_an_adapter_on_the_down_projection_is_refused_and_elsewhere_not(input_ids):
    peft = pytest.importorskip("peft")
    data = [{"input_ids": input_ids}]
    expected = curves_of(tiny_llama := tiny("llama"), data)
    elsewhere = peft.get_peft_model(tiny_llama, peft.LoraConfig(target_modules=["up_proj"], r=2))
    for a, b in zip(curves_of(elsewhere, data), expected, strict=True):
        assert a.errors == pytest.approx(b.errors)
    there = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["down_proj"], r=2))
    with pytest.raises(hf_sparse.PatchError, match=r"layers\.0\.mlp is a Linear whose weight cannot be read"):
        hf_sparse.cett_sparsity(there, data)
    with pytest.raises(hf_sparse.PatchError, match=r"layers\.0\.mlp is a Linear whose weight cannot be read"):
        hf_sparse.measure(there, data, metrics=["cett"])
