"""Statistical top-k before an activation: as Gemma-3n has it, and as everything else in a patch."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.activations import StatisticalTopK
from support.by_hand import logits
from support.models import tiny
from support.skips import CountSkips


def config(activation: str = "original", sparsity: object = 0.9) -> SparsityConfig:
    return SparsityConfig(activation=activation, statistical_topk={"sparsity": sparsity})


def gemmas(p: torch.Tensor, sparsity: float) -> torch.Tensor:
    """What transformers computes in Gemma-3n."""
    mlp = object.__new__(Gemma3nTextMLP)
    mlp.__dict__.update(activation_sparsity=sparsity)
    return mlp._gaussian_topk(p)


def test_the_formula() -> None:
    p = torch.tensor([[-1.0, 0.0, 1.0, 4.0]], dtype=torch.float64)  # mean 1, variance 14 / 4
    cutoff = 1 + math.sqrt(14 / 4) * 0.6744897501960817  # the 75th percentile of a normal distribution
    expected = torch.tensor([[0.0, 0.0, 0.0, 4 - cutoff]], dtype=torch.float64)
    found = StatisticalTopK(nn.Identity(), 0.75, neurons=4)(p)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    st.floats(1e-6, 1 - 1e-6),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 99),
)
def test_it_has_the_bits_of_gemma_3n(sparsity, dtype, seed) -> None:
    p = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(seed)).mul(4).to(dtype)
    assert torch.equal(StatisticalTopK(nn.Identity(), sparsity, neurons=64)(p), gemmas(p, sparsity))


def test_the_gradient_is_that_of_the_formula() -> None:
    p = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(StatisticalTopK(nn.GELU(), 0.4, neurons=6), p)


def test_nan_is_not_silent_and_stays_in_its_token() -> None:
    p = torch.randn(2, 8)
    p[0, 3] = math.nan
    y = StatisticalTopK(nn.SiLU(), 0.9, neurons=8)(p)
    assert y[0].isnan().all()
    assert not y[1].isnan().any()


def test_a_part_of_the_neurons_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"the 8 neurons .* 4 of them are here \(tensor parallelism"):
        StatisticalTopK(nn.SiLU(), 0.9, neurons=8)(torch.ones(1, 4))


@pytest.mark.parametrize("activation", ["original", "relu2"])
def test_a_model_computes_the_formula(unrouted_type, activation, input_ids) -> None:
    model = tiny(unrouted_type)
    reference = copy.deepcopy(model)
    hf_sparse.patch(reference, activation)
    for block in hf_sparse.inspect(reference).blocks:
        block.activation.register_forward_pre_hook(lambda _, args: (gemmas(args[0], 0.9),))
    hf_sparse.patch(model, config(activation))
    torch.testing.assert_close(model(input_ids).logits, reference(input_ids).logits)


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2", "mixtral", "opt", "bitnet"])
def test_about_that_share_is_silent_and_is_skipped(kind, input_ids) -> None:
    model = tiny(kind)
    hf_sparse.patch(model, config())
    assert hf_sparse.measure(model, [{"input_ids": input_ids}]).sparsity == pytest.approx(0.9, abs=0.03)
    with CountSkips() as skips:
        skipping = logits(model, input_ids[:1, :1], "torch")
    assert skips.count >= 3
    torch.testing.assert_close(skipping, logits(model, input_ids[:1, :1], "dense"))


def test_weights_of_silent_neurons_are_not_read() -> None:
    model = tiny("llama")
    hf_sparse.patch(model, config())
    mlp, x = model.model.layers[0].mlp, torch.randn(1, 32)
    with torch.no_grad(), hf_sparse.backend("torch"):
        expected = mlp(x)
        mlp.down_proj.weight[:, mlp.hidden(x)[0] == 0] = math.nan
        assert torch.equal(mlp(x), expected)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "opt"])
def test_what_is_saved_comes_back_and_can_be_undone(kind, input_ids, tmp_path) -> None:
    model = tiny(kind)
    stock = model(input_ids).logits
    given = config("original", [0.95, 0.5, 0.0])
    hf_sparse.patch(model, given)
    expected = model(input_ids).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids).logits, expected)
    assert hf_sparse.inspect(loaded).config == given
    assert hf_sparse.inspect(loaded).stock_name is None
    hf_sparse.unpatch(loaded)
    assert torch.equal(loaded(input_ids).logits, stock)


def test_it_is_mixed_in_with_the_activation(input_ids) -> None:
    model = tiny("llama")
    hf_sparse.patch(model, SparsityConfig.read("relu", mix=0.25, statistical_topk={"sparsity": 0.9}))
    p = torch.randn(4, 88)
    expected = 0.75 * nn.functional.silu(p) + 0.25 * gemmas(p, 0.9)
    torch.testing.assert_close(model.model.layers[0].mlp.activation(p), expected)
    hf_sparse.set_mix(model, 1.0)
    assert torch.equal(model.model.layers[0].mlp.activation(p), gemmas(p, 0.9))
    assert hf_sparse.inspect(model).config == config("relu")


def test_with_topk_both_hold(input_ids) -> None:
    model = tiny("llama")
    both = {"statistical_topk": {"sparsity": 0.5}, "topk": {"k": 4}}
    hf_sparse.patch(model, SparsityConfig(activation="drelu", **both))
    assert hf_sparse.measure(model, [{"input_ids": input_ids}]).sparsity >= 1 - 4 / 88
    assert hf_sparse.inspect(model).config == SparsityConfig(activation="drelu", **both)


def test_an_activation_that_is_not_zero_at_zero_is_refused() -> None:
    model = tiny("llama")
    given = SparsityConfig.read("shifted_relu", shift=-1.0, statistical_topk={"sparsity": 0.9})
    with pytest.raises(hf_sparse.PatchError, match=r"ShiftedReLU of model\.layers\.0\.mlp is 1; use an"):
        hf_sparse.patch(model, given)
    assert hf_sparse.inspect(model).config is None


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"sparsity": 1.0}, r"statistical_topk\.sparsity=1\.0 is out of range; it is 0, or from 0\.000001"),
        ({"sparsity": -0.5}, r"statistical_topk\.sparsity=-0\.5 is out of range"),
        ({"sparsity": [0.5, "x"]}, r"statistical_topk\.sparsity='x' is not a finite number"),
        ({}, r"statistical_topk\.sparsity is missing"),
        ({"share": 0.1}, "unknown fields in statistical_topk: share"),
        (0.9, "statistical_topk is a mapping, not float"),
    ],
)
def test_errors_name_the_field_and_the_value(part, message) -> None:
    with pytest.raises(ValueError, match=message):
        SparsityConfig(statistical_topk=part)
