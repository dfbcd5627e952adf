"""CATS in models: the own activation without its small values, from patch to skipping, saving and back."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse import ActivationConfig, PatchError, SparsityConfig
from hf_sparse.activations import CATSSiLU
from hf_sparse.adapters import find_blocks
from hf_sparse.patching import set_activation
from support.activations import OWN, own_field
from support.compiler import CPP
from support.models import tiny
from support.peek import certified
from support.skips import CountSkips

OF_TYPES = {
    "llama": "cats_silu",
    "phi3": "cats_silu",
    "mixtral": "cats_silu",
    "gpt_neox": "cats_gelu",
    "opt": "cats_gelu",
    "bert": "cats_gelu",
    "gemma2": "cats_gelu_tanh",
    "starcoder2": "cats_gelu_tanh",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", OF_TYPES)
def test_with_threshold_0_the_model_computes_the_bits_it_did(kind, dtype, input_ids) -> None:
    model = tiny(kind).to(dtype)
    with torch.no_grad(), hf_sparse.backend("dense"):
        expected = model(input_ids).logits
        hf_sparse.patch(model, OF_TYPES[kind], threshold=0)
        assert torch.equal(model(input_ids).logits, expected)
        hf_sparse.patch(model, OF_TYPES[kind], threshold=0.1)
        assert not torch.equal(model(input_ids).logits, expected)


@pytest.mark.parametrize("kind", ["phi", "gpt2", "bloom"])
def test_gelu_in_other_words_is_taken_for_what_it_is(kind, input_ids) -> None:
    """As torch computes that formula, which rounds less often."""
    model = tiny(kind)
    expected = model(input_ids).logits
    with pytest.raises(PatchError, match='use "cats_gelu_tanh"'):
        hf_sparse.patch(model, "cats_gelu")
    hf_sparse.patch(model, "cats_gelu_tanh")
    torch.testing.assert_close(model(input_ids).logits, expected)


@pytest.mark.parametrize(
    ("kind", "fields", "name", "message"),
    [
        ("llama", {}, "cats_gelu", r"keeps the large values of GELU, but model\.layers\.0\.mlp has SiLUActi"),
        ("llama", {"hidden_act": "gelu"}, "cats_silu", 'has GELUActivation: use "cats_gelu"'),
        ("llama", {"hidden_act": "quick_gelu"}, "cats_gelu", "has QuickGELUActivation: CATS is for SiLU and"),
        ("llama", {"hidden_act": "gelu_10"}, "cats_gelu", "has ClippedGELUActivation: CATS is for SiLU and"),
        ("opt", {"activation_function": "relu"}, "cats_silu", 'has ReLU: CATS .* such as "relu"'),
    ],
)
def test_another_activation_than_the_models_own_is_refused(kind, fields, name, message, input_ids) -> None:
    model = tiny(kind, **fields)
    expected = model(input_ids).logits
    with pytest.raises(PatchError, match=message):
        hf_sparse.patch(model, name, threshold=0.1)
    assert torch.equal(model(input_ids).logits, expected)
    assert not hasattr(model.config, "hf_sparse")
    hf_sparse.patch(model, "relu")
    with pytest.raises(PatchError, match=message):
        set_activation(model, ActivationConfig(name=name, threshold=0.1))


def test_a_checkpoint_that_names_another_one_is_not_loaded(tmp_path) -> None:
    model = tiny("llama")
    hf_sparse.patch(model, "cats_silu", threshold=0.1)
    model.config.hf_sparse["activation"]["name"] = "cats_gelu"
    with pytest.raises(ValueError, match=r"config cannot be used.*use \"cats_silu\""):
        AutoModelForCausalLM.from_config(model.config)


@pytest.mark.parametrize("backend", ["torch", CPP])
@pytest.mark.parametrize("name", OWN)
def test_thresholds_of_each_block_from_patch_to_unpatch(name, backend, input_ids, tmp_path) -> None:
    model = tiny("llama", **own_field(name))
    stock = model(input_ids).logits
    report = hf_sparse.patch(model, name, threshold=(0.05, 0.1, 0.2))
    assert [block.activation.threshold for block in report.blocks] == [0.05, 0.1, 0.2]
    expected = model(input_ids).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert hf_sparse.inspect(loaded).config == SparsityConfig.read(name, threshold=(0.05, 0.1, 0.2))
    assert torch.equal(loaded(input_ids).logits, expected)
    prompt, tokens = torch.randint(3, 128, (1, 6)), []
    for way in ("dense", backend):
        with hf_sparse.backend(way), CountSkips() as skips:
            tokens.append(loaded.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False))
    assert torch.equal(*tokens)
    assert skips.count == 8 * 3
    hf_sparse.unpatch(loaded)
    assert torch.equal(loaded(input_ids).logits, stock)


def test_mixing_begins_with_the_own_activation(input_ids) -> None:
    model = tiny("llama")
    stock = model(input_ids).logits
    hf_sparse.patch(model, "cats_silu", threshold=0.2, mix=0.0)
    torch.testing.assert_close(model(input_ids).logits, stock)
    hf_sparse.set_mix(model, 0.5)
    p, act = torch.linspace(-4, 4, 41), find_blocks(model)[0][0].activation
    kept = F.silu(p).abs() >= 0.2
    torch.testing.assert_close(act(p), F.silu(p) * (1 + kept) / 2)
    hf_sparse.set_mix(model, 1.0)
    assert type(find_blocks(model)[0][0].activation) is CATSSiLU


def test_the_share_of_silent_neurons_is_that_of_small_gates() -> None:
    model = tiny("llama")
    ids = torch.randint(3, 128, (2, 17))
    hf_sparse.patch(model, "cats_silu", threshold=0.3)
    gates: list[torch.Tensor] = []
    handles = [block.watch("p", lambda p, _: gates.append(p)) for block in find_blocks(model)[0]]
    model(ids)
    for handle in handles:
        handle.remove()
    small = [int((F.silu(p).abs() < 0.3).sum()) for p in gates]
    report = hf_sparse.measure(model, [{"input_ids": ids}])
    assert [layer.zeros for layer in report.layers] == small
    assert all(0.1 < layer.sparsity < 0.9 for layer in report.layers)


@torch.no_grad()
def silence(block) -> None:
    """Neuron 5 has the activation 0, and NaN for what it would add."""
    (first, bias), *up, (down, _) = block.weights()
    first[5] = 0
    if bias is not None:
        bias[5] = 0
    for weight, _ in up:
        weight[5] = math.nan
    down[:, 5] = math.nan


@pytest.mark.parametrize("backend", ["torch", CPP])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_what_silent_neurons_own_is_not_read(kind, tokens, backend) -> None:
    model = tiny(kind)
    hf_sparse.patch(model, OF_TYPES[kind], threshold=0.1)
    for block in find_blocks(model)[0]:
        silence(block)
    ids = torch.randint(3, 128, (1, tokens))
    with torch.no_grad(), hf_sparse.backend(backend):
        assert model(ids).logits.isfinite().all()
    with torch.no_grad(), hf_sparse.backend("dense"):
        assert model(ids).logits.isnan().any()


def test_there_is_no_certificate_of_it(input_ids) -> None:
    model = tiny("llama")
    hf_sparse.patch(model, "cats_silu", threshold=0.1)
    with pytest.raises(PatchError, match="with cats_silu a neuron may be active below where it is silent"):
        hf_sparse.prepare(model, certify=True)
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model, certify=True)
    set_activation(model, ActivationConfig(name="cats_silu", threshold=0.1))
    prompt = torch.randint(3, 128, (1, 6))
    with hf_sparse.backend("torch"), CountSkips() as skips:
        model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert (skips.count, skips.certified) == (4 * 3, 0)
    assert not any(certified(model))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", CPP])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_llama_at_half_its_neurons_gives_the_dense_tokens(assets, dtype, backend) -> None:
    folder = assets / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("Once upon a time, there was", return_tensors="pt").input_ids
    values: dict[str, list[torch.Tensor]] = {}
    blocks = find_blocks(model)[0]
    handles = [
        block.watch("a", lambda a, _, name=block.name: values.setdefault(name, []).append(a.abs().flatten()))
        for block in blocks
    ]
    story = model.generate(prompt, max_new_tokens=60, do_sample=False)
    for handle in handles:
        handle.remove()
    thresholds = [torch.cat(values[block.name]).float().quantile(0.5).item() for block in blocks]
    hf_sparse.patch(model, "cats_silu", threshold=thresholds)
    report = hf_sparse.measure(model, [{"input_ids": story}])
    assert 0.45 < report.sparsity < 0.55
    tokens = []
    for way in ("dense", backend):
        with hf_sparse.backend(way):
            tokens.append(model.generate(prompt, max_new_tokens=40, do_sample=False))
    assert torch.equal(*tokens)
