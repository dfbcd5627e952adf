"""What only a GPU can show of the Triton kernels: graphs, compilation, real shapes, offsets beyond 2³¹."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import triton_ops
from support.kernel_blocks import DEVICE, assert_as_exact_as_dense, make_block
from triton_ops import Certificate, certify

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _triton():
    with triton_ops.backend("triton"):
        yield


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 8, 32, 100])
def test_real_shapes(tokens, dtype, gated):
    block = make_block(tokens, 2048, 5632, dtype, gated=gated, bias=True, device=DEVICE)
    assert_as_exact_as_dense(block.run(triton_ops), block)
    assert torch.equal(block.run(triton_ops), block.run(triton_ops))


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("hidden", [4096, 4095, 4104])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_with_a_certificate(dtype, hidden, gated):
    block = make_block(1, hidden, 3000, dtype, "shifted_relu", gated=gated, bias=True, device=DEVICE)
    for threshold in (-1.0, 0.0, 0.5, 1.0, 1.3):
        block.threshold = threshold
        block.certified = False
        expected = block.run(triton_ops)
        block.certified = True
        assert torch.equal(block.run(triton_ops), expected)


@pytest.mark.parametrize("certified", [False, True], ids=["exact", "certified"])
@pytest.mark.parametrize("tokens", [1, 8])
def test_replay_of_a_cuda_graph_sees_new_inputs(tokens, certified):
    block = make_block(tokens, 512, 1024, torch.bfloat16, device=DEVICE)
    certificate = certify(block.gate) if certified else None

    def run() -> Tensor:
        return triton_ops.gated_mlp(*block.tensors(), activation="relu", certificate=certificate)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for _ in range(3):
        block.x.copy_(torch.randn(tokens, 512))
        graph.replay()
        assert torch.equal(y, run())
        assert_as_exact_as_dense(y, block)


@pytest.mark.parametrize("tokens", [1, 8])
def test_offsets_beyond_two_to_the_31(tokens):
    hidden, neurons = 65536, 32800
    if torch.cuda.mem_get_info()[0] < 18 << 30:
        pytest.skip("needs 18 GiB of GPU memory")
    gate = torch.zeros(neurons, hidden, dtype=torch.bfloat16, device=DEVICE)
    up, down = torch.zeros_like(gate), torch.zeros_like(gate).t()
    assert (neurons - 1) * hidden > 2**31
    gate[-1, -1], up[-1, 0], down[-1, -1], down[0, -1] = 1.0, 2.0, 3.0, 4.0
    x = torch.ones(tokens, hidden, dtype=torch.bfloat16, device=DEVICE)
    expected = torch.zeros_like(x)
    expected[:, -1], expected[:, 0] = 6.0, 8.0
    certificates: list[Certificate | None] = [None, certify(gate)]
    for certificate in certificates:
        y = triton_ops.gated_mlp(x, gate, up, down, activation="relu", certificate=certificate)
        assert torch.equal(y, expected)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        block = make_block(1, 256, 700, torch.bfloat16, bias=True, device=DEVICE)
        for name in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias"):
            self.register_buffer(name, getattr(block, name))

    def forward(self, x: Tensor) -> Tensor:
        y = triton_ops.gated_mlp(
            x, self.gate, self.up, self.down, self.gate_bias, self.up_bias, self.down_bias, activation="relu"
        )
        return x + y


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("tokens", [1, 8])
def test_compiled_without_a_graph_break(tokens, mode):
    module = Block()
    x = torch.randn(tokens, 256, device=DEVICE).bfloat16()
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, mode=mode)
        for _ in range(3):
            torch.testing.assert_close(compiled(x), module(x))


def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    block = make_block(1, 64, 100, torch.float32, device="cuda:1")
    assert_as_exact_as_dense(block.run(triton_ops), block)
