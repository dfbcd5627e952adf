"""Certified skip in the Triton kernel: the same bits with and without, and rows that are really not read."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import triton_ops
from support.activations import GATED_OR_PLAIN, PARAMETRISED
from support.kernel_blocks import DEVICE, Block, make_block
from triton_ops import certify, neuron_major_, reference

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _triton():
    with triton_ops.backend("triton"):
        yield


def run(block: Block, *, certified: bool) -> Tensor:
    block.certified = certified
    return block.run(triton_ops)


def assert_same_bits(block: Block) -> None:
    plain, certified = run(block, certified=False), run(block, certified=True)
    integers = {2: torch.int16, 4: torch.int32}[plain.element_size()]
    assert torch.equal(plain.view(integers), certified.view(integers))


def silent_for_sure(block: Block) -> Tensor:
    """In float64, with room to spare: the neurons ``[F]`` whose certificate must say that they are silent."""
    w, x = block.deciding.double(), block.x[0].double()
    rows, bounds = certify(block.deciding)
    s, r, m = bounds.double().unbind(1)
    bound = s * (rows.double() @ x) + (r + 1e-3 * m) * x.norm()
    bias = block.up_bias if block.gate is None else block.gate_bias
    if bias is not None:
        bound += bias
    assert (w @ x <= s * (rows.double() @ x) + r * x.norm()).all()
    return bound < block.threshold - 0.01 * bound.abs() - 1e-6


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (172, 19)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits(dtype, shape, gated):
    assert_same_bits(make_block(1, *shape, dtype, gated=gated, bias=True, device=DEVICE))


@pytest.mark.parametrize(("activation", "gated"), GATED_OR_PLAIN)
def test_same_bits_for_every_activation(activation, gated):
    assert_same_bits(make_block(1, 40, 16, torch.bfloat16, activation, gated=gated, device=DEVICE))


@pytest.mark.parametrize(("activation", "gated"), PARAMETRISED)
def test_same_bits_with_a_parameter_for_each_neuron(activation, gated):
    block = make_block(1, 40, 16, torch.bfloat16, activation, gated=gated, device=DEVICE)
    block.threshold = torch.nn.functional.linear(block.x, block.deciding)[0].abs()
    assert_same_bits(block)


def test_same_bits_for_several_tokens():
    assert_same_bits(make_block(3, 40, 16, torch.float32, device=DEVICE))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_certified_silent_are_not_read(dtype, gated, bias):
    block = make_block(1, 64, 32, dtype, "shifted_relu", gated=gated, bias=bias, device=DEVICE)
    certificate = certify(block.deciding)
    silent = silent_for_sure(block)
    assert silent.float().mean() > 0.3
    expected = run(block, certified=False)
    block.deciding[silent] = math.nan
    operator = triton_ops.gated_mlp if gated else triton_ops.plain_mlp
    options = {"activation": block.activation, "threshold": block.threshold}
    assert torch.equal(operator(*block.tensors(), **options, certificate=certificate), expected)
    # Read without the certificate, they would show.
    assert operator(*block.tensors(), **options).isnan().all()


def pre_activation(w: Tensor, x: Tensor) -> float:
    """``w · x`` of two vectors as the kernel computes and rounds it: asked for the relu of both signs."""
    one = torch.ones(w.numel(), 1, dtype=w.dtype, device=DEVICE)
    above, below = (triton_ops.plain_mlp(x[None], v[None], one, activation="relu")[0, 0] for v in (w, -w))
    return (above - below).item()


def adjacent(value: float, toward: float, dtype: torch.dtype) -> float:
    return torch.nextafter(torch.tensor(value, dtype=dtype), torch.tensor(toward, dtype=dtype)).item()


@pytest.mark.parametrize("kind", ["random", "residual", "tiny", "row", "quantised", "outlier"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_thresholds_next_to_the_pre_activation(dtype, kind):
    # The neuron is active by the least amount there is, or silent at equality: an upper bound that is too
    # small by that much would lose it. Aligned with the residual, the bound of Cauchy and Schwarz is
    # attained.
    for seed in range(2):
        torch.manual_seed(seed)
        w = torch.randn(100).to(DEVICE, dtype)
        rows, bounds = certify(w[None])
        near = bounds[0, 0] * rows[0].float()
        x = {
            "random": torch.randn(100, device=DEVICE),
            "residual": w.float() - near,
            "tiny": (w.float() - near) * 1e-25,  # its squares underflow
            "row": w.float(),
            "quantised": near,
            "outlier": torch.where(torch.arange(100, device=DEVICE) == seed, 1000.0, w.float()),
        }[kind].to(dtype)
        p = pre_activation(w, x)
        one = torch.ones(100, 1, dtype=dtype, device=DEVICE)
        block = Block(x[None], None, w[None], one, None, None, None, "shifted_relu", p)
        assert not run(block, certified=True).any()
        block.threshold = adjacent(p, -math.inf, dtype)
        assert run(block, certified=False).all()
        assert_same_bits(block)
        if p > 0:
            block.activation, block.threshold = "fatrelu", p
            assert run(block, certified=False).all()
            assert_same_bits(block)
            block.threshold = adjacent(p, math.inf, dtype)
            assert not run(block, certified=True).any()


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-20, 1e-15, 1e15, 1e18, 1e30, 3e38])
def test_inputs_of_any_size(scale, gated):
    for dtype in (torch.float32, torch.bfloat16):
        block = make_block(1, 40, 8, dtype, gated=gated, device=DEVICE)
        block.x = (block.x.double() / block.x.double().abs().max() * scale).to(dtype)
        assert_same_bits(block)


@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-38, 1e-30, 1e18, 1e30, 3e38])
def test_rows_of_any_size(scale):
    for dtype in (torch.float32, torch.bfloat16):
        block = make_block(1, 40, 8, dtype, bias=True, device=DEVICE)
        block.gate = (block.gate.double() / block.gate.double().abs().max() * scale).to(dtype)
        assert_same_bits(block)


def test_products_that_overflow_on_the_way_are_not_certified():
    # 1e24 * 4e14 is infinite in float32; the sum in real numbers is -2e38, and so is that of the certificate.
    x = torch.tensor([[4e14, 3e14, 3e14]], device=DEVICE)
    w = torch.tensor([[1e24, -1e24, -1e24]], device=DEVICE)
    one = torch.ones(3, 1, device=DEVICE)
    block = Block(x, None, w, one, None, None, None, "relu", 0.0)
    assert run(block, certified=False).isinf().all()
    assert_same_bits(block)


def test_the_bound_covers_the_rounding_of_both_products():
    # The certificate of these rows has no residual: it differs from the row by the order of summation alone.
    neurons = 48
    w = torch.randint(-127, 128, (neurons, neurons), device=DEVICE).float()
    w[:, 0] = 127.0
    assert (certify(w).bounds[:, 1] < 1e-30).all()
    x, eye = torch.randn(1, neurons, device=DEVICE), neuron_major_(torch.eye(neurons, device=DEVICE))
    p = sum(sign * triton_ops.plain_mlp(x, sign * w, eye, activation="relu")[0] for sign in (1, -1))
    # Each neuron is active by the least amount there is.
    bias = -torch.nextafter(p, torch.full_like(p, -math.inf))
    block = Block(x, None, w, eye, None, bias, None, "relu", 0.0)
    assert (run(block, certified=False) > 0).all()
    assert_same_bits(block)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "row", "bias"])
def test_what_is_not_finite_certifies_nothing(where, bad):
    block = make_block(1, 40, 16, torch.float32, bias=True, device=DEVICE)
    place = {"x": block.x[0], "row": block.gate[4], "bias": block.gate_bias}[where]
    place[7] = bad
    if where == "bias":
        block.up_bias.abs_()
    assert_same_bits(block)
    if where == "row":
        # The row meets 0 alone, which makes NaN of infinity.
        block.x[0, 7] = 0.0
        assert run(block, certified=True).isnan().all()


def test_subnormal_elements_count():
    # Flushed to zero or not, the kernel and its bound must agree on who is silent.
    w = torch.full((1, 64), 1e-39, device=DEVICE)
    x = torch.full((1, 64), 1.0, device=DEVICE)
    for sign in (1.0, -1.0):
        block = Block(x * sign, None, w, torch.ones(64, 1, device=DEVICE), None, None, None, "relu", 0.0)
        assert_same_bits(block)


def test_a_certificate_changes_nothing_against_dense():
    block = make_block(1, 64, 32, torch.float32, bias=True, device=DEVICE)
    torch.testing.assert_close(run(block, certified=True), block.run(reference))
