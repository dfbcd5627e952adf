"""The Triton kernels: on the GPU where there is one, else in the interpreter (see test_interpreter.py)."""

from __future__ import annotations

import math
import os

import pytest
import torch
from kernel_blocks import DEVICE, assert_as_exact_as_dense, make_block

import triton_ops
from triton_ops import ACTIVATIONS, reference

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="no GPU; test_interpreter.py runs this file in the interpreter",
)

# The interpreter takes about a second for the larger ones.
SHAPES = [(1, 1, 1), (1, 7, 5), (2, 63, 7), (1, 64, 172), (3, 172, 63), (9, 17, 300)]


@pytest.fixture(autouse=True)
def _triton():
    with triton_ops.backend("triton"):
        yield


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_mlp_shapes(dtype, shape):
    block = make_block(*shape, dtype, bias=True, device=DEVICE)
    assert_as_exact_as_dense(block.run(triton_ops), block)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_mlp_activations(activation, dtype):
    block = make_block(2, 33, 70, dtype, activation, device=DEVICE)
    assert_as_exact_as_dense(block.run(triton_ops), block)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 7, 5), (3, 40, 300)])
def test_sparse_linear(dtype, shape):
    tokens, hidden, neurons = shape
    h = torch.relu(torch.randn(tokens, neurons)).to(DEVICE, dtype)
    weight = triton_ops.neuron_major_((torch.randn(hidden, neurons) * neurons**-0.5).to(DEVICE, dtype))
    for bias in (None, torch.randn(hidden).to(DEVICE, dtype)):
        y = triton_ops.sparse_linear(h, weight, bias)
        torch.testing.assert_close(y, reference.sparse_linear(h, weight, bias))


def test_all_silent_gives_the_bias():
    block = make_block(2, 40, 50, torch.float32, bias=True, device=DEVICE)
    block.gate_bias = torch.full_like(block.gate_bias, -100.0)
    assert torch.equal(block.run(triton_ops), block.down_bias.expand(2, -1))


def test_strided_arguments():
    block = make_block(3, 40, 50, torch.float32, bias=True, device=DEVICE)
    block.x = torch.randn(40, 6, device=DEVICE).t()[::2]
    block.gate = torch.randn(40, 50, device=DEVICE).t() * 40**-0.5
    block.up = torch.randn(50, 80, device=DEVICE)[:, :40] * 40**-0.5
    block.up_bias = torch.randn(100, device=DEVICE)[::2]
    assert_as_exact_as_dense(block.run(triton_ops), block)


@pytest.mark.parametrize("activation", ["relu", "fatrelu", "drelu"])
def test_nan_in_the_input_comes_through_for_its_token_alone(activation):
    block = make_block(3, 40, 50, torch.float32, activation, device=DEVICE)
    block.x[1, 7] = math.nan
    y, expected = block.run(triton_ops), block.run(reference)
    assert y[1].isnan().all()
    torch.testing.assert_close(y[[0, 2]], expected[[0, 2]])


def test_weights_of_a_silent_neuron_are_not_read_even_if_they_are_nan():
    block = make_block(2, 40, 50, torch.float32, device=DEVICE)
    block.gate[3] = 0
    expected = block.run(reference)
    block.up[3] = math.nan
    block.down[:, 3] = math.inf
    torch.testing.assert_close(block.run(triton_ops), expected)


def test_one_tokens_infinite_weight_does_not_reach_another_token():
    x = torch.tensor([[1.0], [-1.0]], device=DEVICE)
    one = torch.ones(1, 1, device=DEVICE)
    y = triton_ops.gated_mlp(x, one, one, one * math.inf, activation="relu")
    assert y.tolist() == [[math.inf], [0.0]]


def test_same_bits_every_time():
    block = make_block(2, 40, 300, torch.float32, device=DEVICE)
    assert torch.equal(block.run(triton_ops), block.run(triton_ops))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_replay_of_a_cuda_graph_sees_new_inputs():
    block = make_block(1, 512, 1024, torch.bfloat16, device=DEVICE)
    block.run(triton_ops)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = block.run(triton_ops)
    block.x.copy_(torch.randn(1, 512))
    graph.replay()
    assert_as_exact_as_dense(y, block)


def test_kernel_and_package_number_the_activations_alike():
    from triton_ops import decode

    assert decode.ACTIVATIONS == ACTIVATIONS
    assert [decode.RELU2, decode.JSRELU, decode.SHIFTED, decode.FAT, decode.DRELU] == [1, 2, 3, 4, 5]
