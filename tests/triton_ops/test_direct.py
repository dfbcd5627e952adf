"""Calls around torch's dispatcher: only where nothing would notice, and with the same result."""

from __future__ import annotations

import pytest
import torch
from compiler import CPP
from kernel_blocks import make_block
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import triton_ops
from triton_ops.direct import unobserved

OPERATOR = torch.ops.hf_sparse.gated_mlp.default


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class FunctionRecorder(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@pytest.fixture
def block():
    return make_block(3, 16, 40, torch.float32, gated=True)


def test_plain_inference_is_unobserved(block):
    weight = torch.nn.Parameter(torch.empty(2, dtype=torch.bfloat16))
    assert not unobserved(block.x)  # gradients are recorded
    with torch.no_grad():
        assert unobserved(block.x, weight, None)
    with torch.inference_mode():
        assert unobserved(block.x, weight, torch.empty(2))


@torch.no_grad()
def test_tensors_that_are_more_than_they_seem(block):
    assert not unobserved(block.x.as_subclass(Subclass))
    assert not unobserved(block.x.to("meta"))
    assert not unobserved(block.x.to_sparse())
    assert not unobserved(torch.randn(3, dtype=torch.complex64).conj().imag)


@torch.no_grad()
def test_a_lazily_negated_input_is_negated(block):
    x = torch.complex(torch.zeros_like(block.x), -block.x).conj().imag
    assert x.is_neg()
    assert torch.equal(x, block.x)
    y = triton_ops.gated_mlp(x, block.deciding, block.up, block.down, activation=block.activation)
    torch.testing.assert_close(y, block.run(triton_ops))


@torch.no_grad()
def test_the_profiler_sees_the_operator(block):
    with torch.profiler.profile() as profile:
        block.run(triton_ops)
    assert any(event.key == "hf_sparse::gated_mlp" for event in profile.key_averages())


@torch.no_grad()
def test_modes_see_the_operator(block):
    with Recorder() as dispatched:
        block.run(triton_ops)
    with FunctionRecorder() as called:
        block.run(triton_ops)
    assert OPERATOR in dispatched.seen
    assert OPERATOR in called.seen


@torch.no_grad()
def test_tracers_record_the_operator(block):
    def run(x):
        return triton_ops.gated_mlp(x, block.deciding, block.up, block.down, activation=block.activation)

    graph = make_fx(run)(block.x)
    assert any(node.target is OPERATOR for node in graph.graph.nodes)
    traced = torch.jit.trace(run, block.x)
    assert "hf_sparse::gated_mlp" in str(traced.graph)


@torch.no_grad()
def test_vmap_over_tokens_is_the_call_with_all_tokens(block):
    def run(x):
        return triton_ops.gated_mlp(x, block.deciding, block.up, block.down, activation=block.activation)

    torch.testing.assert_close(torch.vmap(run)(block.x), run(block.x))


@pytest.mark.parametrize("backend", ["dense", "torch", CPP])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("certified", [False, True])
def test_both_ways_give_the_same_bits(backend, gated, certified):
    block = make_block(1, 64, 200, torch.float32, gated=gated, bias=True, certified=certified)
    with torch.no_grad(), triton_ops.backend(backend):
        direct = block.run(triton_ops)
        with Recorder():
            dispatched = block.run(triton_ops)
    assert torch.equal(direct, dispatched)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["torch", CPP])
def test_a_default_device_is_that_of_new_tensors_only(backend, block):
    expected = block.run(triton_ops)
    with torch.device("meta"), triton_ops.backend(backend):
        y = block.run(triton_ops)
    torch.testing.assert_close(y, expected)
