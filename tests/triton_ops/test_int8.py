"""Weights of int8 rows with a scale each: right numbers, and nothing read that silent neurons own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

import triton_ops
from support.backends import change_backend
from support.compiler import CPP, needs_compiler
from triton_ops import Int8Weight, int8_kernels, int8_linear, int8_mlp, int8_sparse_linear, reference
from triton_ops.activations import TABLE
from triton_ops.backends import REGISTRY
from triton_ops.cpu import backend
from triton_ops.int8 import INT8_TOKENS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATHS = ["dense", CPP]
# What inputs in fixed point add in bfloat16, in parts of the largest input: half a step of 1 / 32767.
STEP = {torch.float32: 0.0, torch.float16: 0.0, torch.bfloat16: 0.5 / 32767}


def rows(outputs: int, inputs: int) -> Int8Weight:
    scale = (torch.rand(outputs) + 0.1) * inputs**-0.5 / 64
    return Int8Weight(torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8), scale)


def neuron_major(weight: Int8Weight) -> Int8Weight:
    return Int8Weight(triton_ops.neuron_major_(weight.rows.clone()), weight.scale)


def exact(x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    return F.linear(x.double(), weight.rows.double() * weight.scale.double()[:, None], wide(bias))


def wide(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.double()


def assert_right(y: Tensor, x: Tensor, weight: Int8Weight, bias: Tensor | None, step: float) -> None:
    """Within one rounding of the result, those of a float32 sum of its terms, and those of the inputs."""
    one, magnitudes = exact(x, weight, bias), weight.rows.double().abs() * weight.scale.double()[:, None]
    terms = F.linear(x.double().abs(), magnitudes, None if bias is None else bias.double().abs())
    largest = x.double().abs().amax(-1, keepdim=True) if x.numel() else x.double()
    inputs = step * largest * magnitudes.sum(1)
    eps, eps32 = torch.finfo(y.dtype).eps, torch.finfo(torch.float32).eps
    allowed = eps * one.abs() + (weight.rows.shape[1] + 3) * eps32 * terms + inputs + 1e-30
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    assert ((y.double() - one).abs() <= allowed).all()


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 200),
    st.integers(1, 300),
    st.booleans(),
    st.integers(0, 2**30),
)
def test_linear(backend, dtype, tokens, outputs, inputs, biased, seed) -> None:
    torch.manual_seed(seed)
    weight, x = rows(outputs, inputs), torch.randn(tokens, inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype) if biased else None
    with torch.inference_mode(), triton_ops.backend(backend):
        y = int8_linear(x, weight, bias)
        assert_right(y, x, weight, bias, STEP[dtype])
        assert torch.equal(int8_linear(x[None], weight, bias), y[None])


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, INT8_TOKENS),
    st.integers(1, 200),
    st.integers(1, 300),
    st.booleans(),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.integers(0, 2**30),
)
def test_sparse_linear(backend, dtype, tokens, outputs, inputs, biased, density, seed) -> None:
    torch.manual_seed(seed)
    h = (torch.randn(tokens, inputs) * (torch.rand(tokens, inputs) < density)).to(dtype)
    weight = neuron_major(rows(outputs, inputs))
    bias = torch.randn(outputs).to(dtype) if biased else None
    with torch.inference_mode(), triton_ops.backend(backend):
        assert_right(int8_sparse_linear(h, weight, bias), h, weight, bias, 0.0)  # no input is rounded


MLPS = [
    pytest.param(
        name, each, up, id=f"{name}-{'one each' if each else 'one threshold'}-{'gated' if up else 'plain'}"
    )
    for name, row in TABLE.items()
    for each in ((False, True) if row.parameter else (False,))
    for up in ((True,) if row.relu_up else (True, False))
]


@needs_compiler
@pytest.mark.parametrize(("activation", "each", "up"), MLPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp(dtype, activation, each, up) -> None:
    """As the formula, which rounds where a dense computation does."""
    torch.manual_seed(0)
    hidden, neurons = 72, 333
    first, second, down = rows(neurons, hidden), rows(neurons, hidden), neuron_major(rows(hidden, neurons))
    weights = first, second if up else None, down
    biases = [torch.randn(n).to(dtype) * 0.1 for n in (neurons, neurons, hidden)]
    if not up:
        biases[1] = None  # type: ignore[call-overload]
    threshold: Any = 0.05 if TABLE[activation].parameter else 0.0
    if each:
        threshold = torch.linspace(0.0, 0.2, neurons).to(dtype)
    kinds = {"activation": activation, "threshold": threshold}
    for tokens in (1, 3, 9, INT8_TOKENS):
        x = torch.randn(tokens, hidden).to(dtype)
        with torch.inference_mode(), triton_ops.backend("cpp"):
            y = int8_mlp(x, *weights, *biases, **kinds)
        expected = reference.int8_mlp(x, *weights, *biases, **kinds)
        size = expected.float().square().mean().sqrt().item()
        # A pre-activation that is another by one rounding may turn a neuron on or off.
        error = (y.float() - expected.float()).square().mean().sqrt().item() / size
        assert error <= 8 * torch.finfo(dtype).eps


@needs_compiler
def test_of_silent_neurons_only_the_gate_is_read() -> None:
    """Scales that are not a number show where a row was used."""
    torch.manual_seed(0)
    hidden, neurons = 64, 300
    first, up, down = rows(neurons, hidden), rows(neurons, hidden), neuron_major(rows(hidden, neurons))
    x = torch.randn(2, hidden, dtype=torch.bfloat16)
    with torch.inference_mode(), triton_ops.backend("cpp"):
        expected = int8_mlp(x, first, up, down, activation="relu")
        silent = (int8_linear(x, first) <= 0).all(0)
        assert 20 < silent.sum() < 280
        up.scale[silent] = math.nan
        assert torch.equal(int8_mlp(x, first, up, down, activation="relu"), expected)
        up.scale[:] = math.nan
        assert int8_mlp(x, first, up, down, activation="relu").isnan().any()


@needs_compiler
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_that_are_not_finite(dtype, value) -> None:
    torch.manual_seed(0)
    weight, x = rows(40, 100), torch.randn(3, 100).to(dtype)
    x[1, 7] = value
    first, up, down = rows(50, 100), rows(50, 100), neuron_major(rows(100, 50))
    with torch.inference_mode(), triton_ops.backend("cpp"):
        y = int8_linear(x, weight)
        expected = reference.int8_linear(x, weight)
        assert torch.equal(y.isfinite(), expected.isfinite())
        torch.testing.assert_close(y, expected, equal_nan=True, rtol=0.02, atol=0.02)
        out = int8_mlp(x, first, up, down, activation="relu")
        expected = reference.int8_mlp(x, first, up, down, activation="relu")
        assert torch.equal(out.isfinite(), expected.isfinite())


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_neither_on_other_tokens_nor_on_threads(dtype) -> None:
    torch.manual_seed(0)
    weight, x = rows(300, 200), torch.randn(INT8_TOKENS, 200).to(dtype)
    first, up, down = rows(500, 200), rows(500, 200), neuron_major(rows(200, 500))
    before = torch.get_num_threads()
    with torch.inference_mode(), triton_ops.backend("cpp"):
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append((int8_linear(x, weight), int8_mlp(x, first, up, down, activation="relu")))
        torch.set_num_threads(before)
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
        for t in (0, 13):
            assert torch.equal(int8_linear(x[t], weight), found[0][0][t])
            assert torch.equal(int8_mlp(x[t], first, up, down, activation="relu"), found[0][1][t])
        x[5, 3] = math.nan  # nothing to the others
        others = torch.arange(INT8_TOKENS) != 5
        assert torch.equal(int8_linear(x, weight)[others], found[0][0][others])
        assert torch.equal(int8_mlp(x, first, up, down, activation="relu")[others], found[0][1][others])


@needs_compiler
def test_large_inputs_and_rows_are_summed_without_overflow() -> None:
    """Products of one sign, in a row longer than int32 holds, of inputs near both ends of bfloat16."""
    weight = Int8Weight(torch.full((2, 20_000), -127, dtype=torch.int8), torch.tensor([1.0, 1e-30]))
    for size in (1.0, 3e38, 1e-30, 1e-38, 1e-40, 0.0):
        x = torch.full((1, 20_000), size, dtype=torch.bfloat16)
        with torch.inference_mode(), triton_ops.backend("cpp"):
            y = int8_linear(x, weight).double()
        expected = exact(x, weight, None).to(torch.bfloat16).double()
        tiny = 127 * 20_000 * 1e-37  # smaller steps are no normal numbers
        assert ((y == expected) | ((y - expected).abs() <= expected.abs() / 100 + tiny)).all()


@needs_compiler
@pytest.mark.parametrize("size", [1.0, 30.0, 1e3, 1e6])
def test_one_input_that_is_much_larger_than_the_others(size) -> None:
    """Rows that do not look at it are as exact as without it, for one token and beside others."""
    torch.manual_seed(0)
    weight, x = rows(300, 1000), torch.randn(3, 1000, dtype=torch.bfloat16)
    weight.rows[:, 7] = 0
    with torch.inference_mode(), triton_ops.backend("cpp"):
        x[1, 7] = size
        y = int8_linear(x, weight)
        assert torch.equal(int8_linear(x[1], weight), y[1])
    expected = exact(x, weight, None)
    error = (y.double() - expected).square().mean(1).sqrt() / expected.square().mean(1).sqrt()
    assert (error <= 0.5 * torch.finfo(torch.bfloat16).eps).all()


@needs_compiler
def test_another_thread_may_store_the_rows_in_another_way_meanwhile(monkeypatch) -> None:
    torch.manual_seed(0)
    weight, x = rows(16, 24), torch.randn(1, 24)
    contiguous = backend._rows

    def late(given: Tensor) -> Tensor:
        found = contiguous(given)
        triton_ops.neuron_major_(weight.rows)
        return found

    monkeypatch.setattr(backend, "_rows", late)
    with torch.inference_mode(), triton_ops.backend("cpp"):
        assert_right(int8_linear(x, weight), x, weight, None, 0.0)
    assert triton_ops.is_neuron_major(weight.rows)


class TestWhereNoKernelRuns:
    def arguments(self) -> tuple[Tensor, Int8Weight]:
        torch.manual_seed(0)
        return torch.randn(2, 24), rows(16, 24)

    @needs_compiler
    def test_is_asked(self) -> None:
        x, _ = self.arguments()
        with triton_ops.backend("cpp"):
            assert int8_kernels(x) is None  # with gradient
            with torch.inference_mode():
                assert int8_kernels(x) is REGISTRY["cpp"]
                assert int8_kernels(torch.randn(INT8_TOKENS + 1, 24)) is None
                assert int8_kernels(torch.randn(0, 24)) is None
                assert int8_kernels(torch.randn(2, 0)) is None
                assert int8_kernels(x.double()) is None
                assert int8_kernels(x.to("meta")) is None
                with torch.autocast("cpu"):
                    assert int8_kernels(x) is None
                with forward_ad.dual_level():
                    assert int8_kernels(x) is None
            with torch.no_grad(), torch.profiler.profile():
                assert int8_kernels(x) is None
        with torch.inference_mode():
            assert int8_kernels(x) is REGISTRY["cpp"]
            for name in ("dense", "torch"):
                with triton_ops.backend(name):
                    assert int8_kernels(x) is None

    def test_the_formula_does(self) -> None:
        x, weight = self.arguments()
        x.requires_grad_()
        int8_linear(x, weight).sum().backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad, (weight.rows * weight.scale[:, None]).sum(0).expand(2, -1))
        with torch.inference_mode():
            for tokens in (0, 50):
                y = int8_linear(torch.randn(tokens, 24), weight)
                assert y.shape == (tokens, 16)

    @needs_compiler
    def test_a_down_projection_that_is_stored_by_rows(self, monkeypatch) -> None:
        change_backend(monkeypatch, "cpp", int8_mlp=None, int8_sparse_linear=None)
        x, down = self.arguments()
        with torch.inference_mode():
            assert_right(int8_sparse_linear(x, down), x, down, None, 0.0)


class TestErrors:
    def test_name_what_does_not_fit(self) -> None:
        x, weight = torch.randn(2, 24), rows(16, 24)
        for bad, message in (
            (weight._replace(rows=weight.rows[:, :8]), r"weight\.rows is torch\.int8 of shape \[16, 8\]"),
            (weight._replace(rows=weight.rows.float()), r"weight\.rows is torch\.float32"),
            (weight._replace(scale=weight.scale.double()), r"weight\.scale is torch\.float64"),
            (
                weight._replace(scale=weight.scale[:3]),
                r"weight\.scale .* expected .* \[16\], scale of",
            ),
            (weight._replace(scale=weight.scale.to("meta")), r"weight\.scale is on meta"),
        ):
            with pytest.raises(ValueError, match=message):
                int8_linear(x, bad)
        with pytest.raises(ValueError, match=r"bias has shape \[3\]"):
            int8_linear(x, weight, torch.randn(3))
        with pytest.raises(ValueError, match=r"down\.rows .* expected .* \[24, 16\]"):
            int8_mlp(x, weight, None, rows(16, 24), activation="relu")
        with pytest.raises(ValueError, match="activation"):
            int8_mlp(x, weight, None, rows(24, 16), activation="gelu")


class TestOperators:
    """What graphs call: the same numbers, whoever has changed a layout since."""

    @pytest.mark.parametrize("backend", PATHS)
    @pytest.mark.parametrize("tokens", [1, INT8_TOKENS + 1])
    @pytest.mark.parametrize("stored", ["rows", "neurons"])
    def test_are_the_functions(self, backend, tokens, stored) -> None:
        lie = neuron_major if stored == "neurons" else lambda weight: weight
        weight, bias = rows(30, 50), torch.randn(30)
        first, up, down, biases = rows(60, 50), rows(60, 50), lie(rows(50, 60)), torch.randn(60)
        x, h = torch.randn(tokens, 50), torch.randn(tokens, 50).relu()
        thresholds = torch.rand(60)
        ops = torch.ops.hf_sparse
        with torch.no_grad(), triton_ops.backend(backend):
            for given in (bias, None):
                y = ops.int8_linear.default(x, *weight, given)
                torch.testing.assert_close(y, int8_linear(x, weight, given))
                torch.library.opcheck(ops.int8_linear.default, (x, *weight, given))
                own = lie(weight)
                y = ops.int8_sparse_linear.default(h, *own, given)
                torch.testing.assert_close(y, int8_sparse_linear(h, own, given))
                torch.library.opcheck(ops.int8_sparse_linear.default, (h, *own, given))
            for second in (up, None):
                for each in (thresholds, None):
                    two = (None, None) if second is None else second
                    call = (x, *first, *two, *down, biases, None, None, each, "shifted_relu", 0.3)
                    theta = 0.3 if each is None else each
                    expected = int8_mlp(
                        x, first, second, down, biases, activation="shifted_relu", threshold=theta
                    )
                    torch.testing.assert_close(ops.int8_mlp.default(*call), expected)
                    torch.library.opcheck(ops.int8_mlp.default, call)

    def test_refuse_what_does_not_fit(self) -> None:
        weight = rows(30, 50)
        with pytest.raises(ValueError, match=r"weight\.rows is torch\.int8 of shape"):
            torch.ops.hf_sparse.int8_linear.default(torch.randn(1, 51), *weight, None)
        with pytest.raises(ValueError, match=r"weight\.scale is torch\.float64"):
            torch.ops.hf_sparse.int8_linear.default(
                torch.randn(1, 50), weight.rows, weight.scale.double(), None
            )
