"""``triton_ops.greedy_linear``: the bits of ``linear`` for what may be the largest, and the same argmax."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import triton_ops
from support.compiler import CPP, needs_compiler
from triton_ops import Certificate, certify
from triton_ops.cpu.backend import FEW

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_finds_the_largest(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """And returns which outputs were computed."""
    with torch.no_grad(), triton_ops.backend("cpp"):
        whole = triton_ops.linear(x, weight, bias)
        y = triton_ops.greedy_linear(x, weight, bias, certify(weight))
    assert y.shape == whole.shape
    assert y.dtype == whole.dtype
    kept = y != -torch.inf
    assert torch.equal(y[kept].view(torch.uint8), whole[kept].view(torch.uint8))
    assert torch.equal(y.argmax(-1), whole.argmax(-1))
    largest = whole == whole.amax(-1, keepdim=True)
    assert torch.equal(y[largest], whole[largest])
    return kept


@needs_compiler
@settings(deadline=None)
@given(
    tokens=st.sampled_from([1, 2, 3, FEW - 1, FEW, FEW + 1, 40]),
    outputs=st.integers(1, 700),
    inputs=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 100.0]),
    outlier=st.sampled_from([1.0, 1000.0]),
    steps=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 2**31),
)
def test_it_finds_the_largest(tokens, outputs, inputs, dtype, bias, scale, outlier, steps, seed) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(outputs, inputs) * torch.rand(outputs, 1)
    if steps is not None:  # values that are often equal
        weight = (weight * steps).round()
    x = torch.randn(tokens, inputs).sign() if steps else torch.randn(tokens, inputs)
    x[0, 0] *= outlier  # the large channel that real inputs of an output layer have
    own = torch.randn(outputs).to(dtype) if bias else None
    assert_finds_the_largest((x * scale).to(dtype), weight.to(dtype), own)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_are_read(dtype) -> None:
    """What cannot be the largest is not computed, whatever its row holds by now, such as NaN."""
    weight = (torch.randn(5000, 500) * 500**-0.5).to(dtype)
    x = torch.randn(3, 500).to(dtype)
    kept = assert_finds_the_largest(x, weight, None)
    assert kept.sum(1).max() < 100
    certificate = certify(weight)
    damaged = weight.clone()
    damaged[~kept.any(0)] = math.nan
    with torch.no_grad(), triton_ops.backend("cpp"):
        y = triton_ops.greedy_linear(x, damaged, None, certificate)
    assert not y.isnan().any()
    assert torch.equal(y.argmax(-1), (x.double() @ weight.double().T).to(dtype).argmax(-1))


@needs_compiler
def test_equal_outputs_are_all_found_and_the_first_is_the_largest() -> None:
    weight = torch.randn(64, 32)
    weight[50] = weight[20] = weight[40] = 3 * torch.ones(32)
    kept = assert_finds_the_largest(torch.ones(1, 32), weight, None)
    assert kept[0, [20, 40, 50]].all()


@needs_compiler
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["input", "weight", "bias"])
def test_what_is_not_finite_is_computed(place, value) -> None:
    x, weight, bias = torch.randn(2, 40), torch.randn(300, 40), torch.randn(300)
    {"input": x, "weight": weight, "bias": bias}[place].view(-1)[7] = value
    assert_finds_the_largest(x, weight, bias)


@needs_compiler
def test_threads_change_nothing() -> None:
    x, weight = torch.randn(2, 64), torch.randn(20000, 64)
    certificate, before = certify(weight), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with torch.no_grad(), triton_ops.backend("cpp"):
                found.append(triton_ops.greedy_linear(x, weight, None, certificate))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("backend", ["dense", "torch", CPP])
def test_elsewhere_it_is_the_dense_product(backend) -> None:
    """With gradient, in the layout for decoding, with a strange certificate, and by other backends."""
    x, weight = torch.randn(2, 40), torch.randn(300, 40)
    certificate = certify(weight)
    apart = Certificate(certificate.rows.t().contiguous().t(), certificate.bounds)
    with triton_ops.backend(backend):
        held = weight.clone().requires_grad_()
        assert torch.equal(triton_ops.greedy_linear(x, held, None, certificate), x @ weight.T)
        with torch.no_grad():
            for own, of in ((triton_ops.neuron_major_(weight.clone()), certificate), (weight, apart)):
                assert triton_ops.greedy_linear(x, own, None, of).isfinite().all()
            if backend != "cpp":
                assert torch.equal(triton_ops.greedy_linear(x, weight, None, certificate), x @ weight.T)


def test_a_certificate_of_another_weight_is_an_error() -> None:
    x, weight = torch.randn(2, 40), torch.randn(300, 40)
    good = certify(weight)
    for wrong, message in (
        (certify(torch.randn(301, 40)), r"certificate.rows has shape \[301, 40\]"),
        (Certificate(good.rows.float(), good.bounds), "certificate.rows is torch.float32"),
        (Certificate(good.rows, good.bounds[:, :2]), r"certificate.bounds has shape \[300, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            triton_ops.greedy_linear(x, weight, None, wrong)
