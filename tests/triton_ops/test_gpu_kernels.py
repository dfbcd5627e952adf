"""The Triton kernels: on the GPU where there is one, else in the interpreter (see conftest.py)."""

from __future__ import annotations

import math

import pytest
import torch

import triton_ops
from support.activations import GATED_OR_PLAIN, ON_GPU, PARAMETRISED, assert_bits_of_the_reference
from support.kernel_blocks import DEVICE, assert_as_exact_as_dense, make_block
from triton_ops import ACTIVATIONS, reference

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Tokens, hidden size, neurons. The interpreter takes about a second for the larger ones.
SHAPES = [(1, 1, 1), (1, 7, 5), (1, 172, 21), (2, 1, 1), (2, 63, 7), (3, 172, 63), (9, 17, 150)]
SHAPES_LINEAR = [(1, 7, 5), (1, 40, 300), (3, 40, 300), (17, 130, 33)]
SEVERAL = [1, 3]  # one token and several have kernels of their own


@pytest.fixture(autouse=True)
def _triton():
    with triton_ops.backend("triton"):
        yield


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, dtype, gated):
    block = make_block(*shape, dtype, gated=gated, bias=True, device=DEVICE)
    assert_as_exact_as_dense(block.run(triton_ops), block)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("tokens", [0, 1, 2, 15, 16, 17, 31, 32, 33])
def test_tokens(tokens):
    block = make_block(tokens, 24, 20, torch.bfloat16, device=DEVICE)
    assert_as_exact_as_dense(block.run(triton_ops), block)


@pytest.mark.parametrize(("activation", "gated"), GATED_OR_PLAIN)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", SEVERAL)
def test_activations(tokens, dtype, activation, gated):
    block = make_block(tokens, 33, 15, dtype, activation, gated=gated, bias=True, device=DEVICE)
    assert_as_exact_as_dense(block.run(triton_ops), block)


@pytest.mark.parametrize("tokens", SEVERAL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_negative_threshold(dtype, tokens):
    block = make_block(tokens, 33, 21, dtype, "shifted_relu", device=DEVICE)
    block.threshold = -0.3
    assert_as_exact_as_dense(block.run(triton_ops), block)


@pytest.mark.parametrize("tokens", SEVERAL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_threshold_counts_in_the_dtype_of_the_model(dtype, tokens):
    # The pre-activation is the threshold as dtype rounds it, so it is not below the threshold: active.
    threshold = torch.tensor(1 / 3, dtype=dtype, device=DEVICE)
    one = torch.ones(1, 1, dtype=dtype, device=DEVICE)
    x = threshold.expand(tokens, 1)
    y = triton_ops.gated_mlp(x, one, one, one, activation="fatrelu", threshold=1 / 3)
    torch.testing.assert_close(y, x * x)
    assert not triton_ops.gated_mlp(x, one, one, one, activation="shifted_relu", threshold=1 / 3).any()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES_LINEAR)
def test_sparse_linear(dtype, shape):
    tokens, hidden, neurons = shape
    h = torch.relu(torch.randn(tokens, neurons)).to(DEVICE, dtype)
    weight = triton_ops.neuron_major_((torch.randn(hidden, neurons) * neurons**-0.5).to(DEVICE, dtype))
    for bias in (None, torch.randn(hidden).to(DEVICE, dtype)):
        y = triton_ops.sparse_linear(h, weight, bias)
        torch.testing.assert_close(y, reference.sparse_linear(h, weight, bias))


def test_many_splits_of_the_neurons():
    # More spans of neurons than the sum takes at once, some of them without an active one.
    h = torch.zeros(1, 34 * 128, device=DEVICE)
    h[0, ::1000] = 1.0
    h[0, -1] = 2.0
    weight = triton_ops.neuron_major_(torch.randn(3, 34 * 128, device=DEVICE))
    torch.testing.assert_close(triton_ops.sparse_linear(h, weight), h @ weight.t())


@pytest.mark.parametrize("tokens", SEVERAL)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_all_silent_gives_the_bias(gated, tokens):
    block = make_block(tokens, 40, 50, torch.float32, gated=gated, bias=True, device=DEVICE)
    (block.gate_bias if gated else block.up_bias).fill_(-100.0)
    assert torch.equal(block.run(triton_ops), block.down_bias.expand(tokens, -1))


@pytest.mark.parametrize("tokens", SEVERAL)
def test_all_active(tokens):
    block = make_block(tokens, 40, 140 if tokens > 1 else 20, torch.float32, bias=True, device=DEVICE)
    block.gate_bias.fill_(100.0)
    assert_as_exact_as_dense(block.run(triton_ops), block)


@pytest.mark.parametrize("tokens", SEVERAL)
def test_strided_arguments(tokens):
    block = make_block(tokens, 40, 50, torch.float32, bias=True, device=DEVICE)
    block.x = torch.randn(40, 2 * tokens, device=DEVICE).t()[::2]
    block.gate = torch.randn(40, 50, device=DEVICE).t() * 40**-0.5
    block.up = torch.randn(50, 80, device=DEVICE)[:, :40] * 40**-0.5
    block.up_bias = torch.randn(100, device=DEVICE)[::2]
    block.down_bias = torch.randn(80, device=DEVICE)[::2]
    assert_as_exact_as_dense(block.run(triton_ops), block)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("tokens", SEVERAL)
def test_nan_and_infinity_in_the_input_stay_with_their_token(tokens, bad, activation):
    block = make_block(tokens, 40, 20, torch.float32, activation, device=DEVICE)
    block.x[tokens // 2, 7] = bad
    y, expected = block.run(triton_ops), block.run(reference)
    # A silent neuron of the spoilt token contributes nothing here, and 0 * infinity in the dense product.
    assert not y[tokens // 2].isfinite().any()
    others = [t for t in range(tokens) if t != tokens // 2]
    torch.testing.assert_close(y[others], expected[others])


@pytest.mark.parametrize("tokens", SEVERAL)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_weights_of_a_silent_neuron_do_not_count_even_if_they_are_nan(gated, tokens):
    block = make_block(tokens, 40, 50, torch.float32, gated=gated, device=DEVICE)
    block.deciding[3] = 0
    expected = block.run(reference)
    if gated:
        block.up[3] = math.nan
    block.down[:, 3] = math.inf
    torch.testing.assert_close(block.run(triton_ops), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("others", [1, 16])
def test_one_tokens_infinite_weight_does_not_reach_another_token(others, bad, dtype):
    # Only the first token wants neuron 0, whose weight in column 1 is not finite; neuron 1 is for all.
    x = torch.tensor([[1.0, 1.0]] + [[-1.0, 1.0]] * others, dtype=dtype, device=DEVICE)
    eye = torch.eye(2, dtype=dtype, device=DEVICE)
    down = torch.tensor([[2.0, 3.0], [bad, 5.0]], dtype=dtype, device=DEVICE)
    y = triton_ops.gated_mlp(x, eye, eye.abs(), triton_ops.neuron_major_(down), activation="relu")
    assert y[0, 0] == 5
    assert y[0, 1].isnan() if math.isnan(bad) else y[0, 1] == bad
    assert y[1:].tolist() == [[3.0, 5.0]] * others


@pytest.mark.parametrize("tokens", SEVERAL)
def test_an_infinite_up_weight_of_an_active_neuron_counts(tokens):
    block = make_block(tokens, 4, 2, torch.float32, device=DEVICE)
    block.gate[:] = torch.tensor([[1.0], [-1.0]])
    block.x.abs_()
    block.up[0] = math.inf
    assert not block.run(triton_ops).isfinite().any()


@pytest.mark.parametrize("tokens", SEVERAL)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_same_bits_every_time(gated, tokens):
    block = make_block(tokens, 40, 60, torch.float32, gated=gated, device=DEVICE)
    assert torch.equal(block.run(triton_ops), block.run(triton_ops))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("activation", "gated"), GATED_OR_PLAIN)
def test_activations_have_the_bits_of_the_formula(activation, gated, dtype):
    assert_bits_of_the_reference(activation, gated, dtype, regimes=ON_GPU, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("activation", "gated"), PARAMETRISED)
def test_a_neuron_may_have_a_parameter_of_its_own(activation, gated, dtype):
    assert_bits_of_the_reference(activation, gated, dtype, regimes=ON_GPU, each=True, device=DEVICE)
