"""Certificates: bounds hold, results are the same bits, certified rows are not read (the CPU kernel)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import triton_ops
from support.compiler import CPP, needs_compiler
from support.kernel_blocks import make_block
from triton_ops import ACTIVATIONS, Certificate, certify
from triton_ops.activations import TABLE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def residual(weight: Tensor) -> Tensor:
    q, bounds = certify(weight)
    return weight.double() - bounds[:, :1].double() * q.double()


@pytest.fixture(params=["dense", CPP])
def _maker(request):
    """Who makes certificates: torch, or the compiled kernels."""
    with triton_ops.backend(request.param):
        yield


made = pytest.mark.usefixtures("_maker")


@made
@pytest.mark.parametrize("width", [1, 70, 1000])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_bounds_are_no_smaller_than_the_norms_and_tight(dtype, width):
    weight = (torch.randn(50, width) * torch.logspace(-4, 3, 50)[:, None]).to(dtype)
    weight[7] = 0
    if dtype != torch.float16:
        weight[8:12] *= torch.tensor([1e-30, 1e-36, 1e-38, 1e30], dtype=dtype)[:, None]
    q, bounds = certify(weight)
    _, r, m = bounds.double().unbind(1)
    assert q.dtype == torch.int8
    assert q.shape == weight.shape
    assert q.abs().max() == 127
    norms = weight.double().norm(dim=1)
    for bound, exact in ((r, residual(weight).norm(dim=1)), (m, norms)):
        assert (bound >= exact).all()
        assert (bound <= exact * (1 + 1e-4) + norms * 1e-6 + 1e-36).all()
    # A row of normal numbers keeps all but about one part in a hundred.
    assert (r[m > 1e-3] / m[m > 1e-3]).max() < 0.02


@made
def test_a_certificate_costs_one_byte_per_weight_and_twelve_per_row():
    q, bounds = certify(torch.randn(300, 40))
    assert q.nbytes == 300 * 40
    assert bounds.nbytes == 300 * 12


@made
def test_rows_that_are_not_finite_are_never_certified():
    weight = torch.randn(4, 9)
    weight[1, 3], weight[2, 0], weight[3, 8] = math.nan, math.inf, -math.inf
    _, bounds = certify(weight)
    assert bounds[:, 1:].isinf().all(1).tolist() == [False, True, True, True]
    assert not bounds.isnan().any()


def test_chunks_of_a_large_weight_give_what_the_whole_gives(monkeypatch):
    weight = torch.randn(100, 33, dtype=torch.float64)
    whole = certify(weight)
    monkeypatch.setattr("triton_ops.certificate.CHUNK_ELEMENTS", 300)
    assert all(torch.equal(a, b) for a, b in zip(certify(weight), whole, strict=True))


@made
@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (1, 1)])
def test_empty_and_smallest_weights(shape):
    q, bounds = certify(torch.randn(shape))
    assert q.shape == shape
    assert bounds.shape == (shape[0], 3)
    assert not bounds.isnan().any()


@made
def test_memory_of_another_certificate_is_written_anew():
    other = certify(torch.randn(20, 30))
    weight = torch.randn(40, 30)[::2]  # rows that lie apart
    made = certify(weight, into=other)
    assert made.rows is other.rows
    assert made.bounds is other.bounds
    assert all(torch.equal(a, b) for a, b in zip(made, certify(weight), strict=True))
    with pytest.raises(ValueError, match=r"into is the certificate of a weight of shape \[20, 30\]"):
        certify(torch.randn(20, 31), into=other)
    for rows, bounds in (
        (other.rows.float(), other.bounds),
        (other.rows, other.bounds[:, :2]),
        (other.rows.t().contiguous().t(), other.bounds),
    ):
        with pytest.raises(ValueError, match="into is not as"):
            certify(weight, into=Certificate(rows, bounds))


def test_tensors_without_plain_memory_are_for_torch():
    weight = torch.randn(30, 40)
    with triton_ops.backend("auto"):
        lazily = torch._neg_view(weight)
        found, expected = certify(lazily), certify(lazily.resolve_neg())
        assert torch.equal(found.rows, expected.rows)
        assert (found.bounds >= expected.bounds * (1 - 1e-3)).all()
        with FakeTensorMode():
            assert certify(torch.randn(30, 40)).rows.shape == (30, 40)


@pytest.mark.parametrize("weight", [torch.zeros(3), torch.zeros(2, 3, dtype=torch.int8)])
def test_what_is_no_projection_is_an_error(weight):
    with pytest.raises(ValueError, match="expected floating"):
        certify(weight)


def both(block) -> tuple[Tensor, Tensor]:
    """The results without and with a certificate."""
    with triton_ops.backend("cpp"):
        block.certified = False
        plain = block.run(triton_ops)
        block.certified = True
        return plain, block.run(triton_ops)


def assert_same_bits(block) -> None:
    plain, certified = both(block)
    assert torch.equal(plain.view(torch.uint8), certified.view(torch.uint8))


@needs_compiler
@settings(deadline=None)
@given(
    hidden=st.integers(1, 300),
    neurons=st.integers(1, 700),
    activation=st.sampled_from(ACTIVATIONS),
    dtype=st.sampled_from(DTYPES),
    gated=st.booleans(),
    bias=st.booleans(),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 100.0]),
    outlier=st.sampled_from([1.0, 1000.0]),
    seed=st.integers(0, 2**31),
)
def test_the_result_is_the_same_bits(hidden, neurons, activation, dtype, gated, bias, scale, outlier, seed):
    gated = gated or TABLE[activation].relu_up
    torch.manual_seed(seed)
    block = make_block(1, hidden, neurons, dtype, activation, gated=gated, bias=bias)
    block.x = (block.x.float() * scale).to(dtype)
    block.x[0, 0] *= outlier  # the large channel that real inputs of an MLP have
    assert_same_bits(block)


def poisoned(block) -> int:
    """Replaces by NaN the deciding rows that the kernel does not read; returns how many there are.

    The certificate is made before, so that a row that is read makes the output NaN.
    """
    certificate = certify(block.deciding)
    call = {"activation": block.activation, "threshold": block.threshold, "certificate": certificate}
    operator = triton_ops.plain_mlp if block.gate is None else triton_ops.gated_mlp
    with triton_ops.backend("cpp"):
        y = operator(*block.tensors(), **call)
        unread = 0
        for f in range(block.deciding.shape[0]):
            row = block.deciding[f].clone()
            block.deciding[f] = math.nan
            if torch.equal(operator(*block.tensors(), **call), y):
                unread += 1
            else:
                block.deciding[f] = row
    return unread


@needs_compiler
@pytest.mark.parametrize("gated", [True, False])
def test_certified_rows_are_not_read(gated):
    block = make_block(1, 512, 200, torch.bfloat16, "shifted_relu", gated=gated)
    block.threshold = 1.3  # silences nine in ten of the pre-activations, whose deviation is 1
    p = block.x.double() @ block.deciding.double().t()
    silent = int((p <= 1.3).sum())
    unread = poisoned(block)
    assert silent * 0.9 < unread <= silent


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_input_along_the_residual_is_not_certified_wrongly(dtype):
    # Orthogonal to what int8 has kept, so that all of the pre-activation is what it has lost.
    block = make_block(1, 256, 64, dtype)
    kept, lost = certify(block.gate).rows.double(), residual(block.gate)
    along = lost - (lost * kept).sum(1, keepdim=True) / kept.square().sum(1, keepdim=True) * kept
    for f in range(64):
        block.x = (along[f : f + 1] * 100).to(dtype)
        assert block.x.double() @ block.gate[f].double() > 0
        assert_same_bits(block)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["shifted_relu", "fatrelu"])
def test_a_threshold_at_the_very_pre_activation(dtype, activation):
    block = make_block(1, 200, 40, dtype, activation)
    p = torch.nn.functional.linear(block.x, block.gate).float().abs()[0]
    for value in p.tolist():
        block.threshold = value
        assert_same_bits(block)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(100),
        torch.full((100,), 1e-45),
        torch.full((100,), 1e-39),
        torch.randn(100) * 1e18,
        torch.randn(100) * 1e30,
        torch.full((100,), 3e38),
        torch.cat([torch.full((1,), 3e38), torch.randn(99) * 1e-38]),
        torch.cat([torch.full((1,), math.inf), torch.randn(99)]),
        torch.cat([torch.full((1,), -math.inf), torch.randn(99)]),
        torch.cat([torch.full((1,), math.nan), torch.randn(99)]),
    ],
    ids=["zero", "denormal", "small", "1e18", "1e30", "largest", "mixed", "inf", "-inf", "nan"],
)
@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 1e20, 1e37])
@pytest.mark.parametrize("activation", ["relu", "fatrelu"])
def test_extreme_inputs_and_weights(dtype, x, scale, activation):
    block = make_block(1, 100, 60, dtype, activation)
    block.x = x[None].to(dtype)
    block.gate = (block.gate.float() * scale).to(dtype)
    block.gate[3], block.gate[4, 5], block.gate[5, 6] = 0, math.inf, math.nan
    block.up[::2] = 1e-3
    plain, certified = both(block)
    assert torch.equal(plain.isnan(), certified.isnan())
    assert torch.equal(plain.nan_to_num(7), certified.nan_to_num(7))


@needs_compiler
def test_a_certificate_may_have_any_strides():
    block = make_block(1, 64, 200, torch.float32)
    rows, bounds = certify(block.gate)
    with triton_ops.backend("cpp"):
        expected = block.run(triton_ops)
        strided = triton_ops.Certificate(rows.repeat_interleave(2, 0)[::2], bounds.t().contiguous().t())
        assert not any(part.is_contiguous() for part in strided)
        y = triton_ops.gated_mlp(*block.tensors(), activation="relu", certificate=strided)
    assert torch.equal(y, expected)


@needs_compiler
def test_more_than_one_token_ignores_the_certificate():
    block = make_block(3, 64, 50, torch.float32)
    assert_same_bits(block)


@needs_compiler
def test_the_sums_of_integers_do_not_overflow():
    # Every product is the largest there is, over more elements than one int32 could sum.
    hidden = 20_000
    block = make_block(1, hidden, 3, torch.float32)
    block.x = torch.ones(1, hidden)
    block.gate = torch.tensor([[1.0], [-1.0], [0.5]]).expand(3, hidden).contiguous()
    assert_same_bits(block)
    block.x = -block.x
    assert_same_bits(block)
    assert both(block)[0].abs().sum() > 0
