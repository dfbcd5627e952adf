"""Calls around torch's dispatcher: only where nothing would notice, and with the same result."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import triton_ops
from support.compiler import CPP
from support.kernel_blocks import make_block
from support.recorders import FunctionRecorder, Recorder
from triton_ops.unobserved import unobserved

OPERATORS = ("gated_mlp", "plain_mlp", "sparse_linear", "linear")


class Subclass(torch.Tensor):
    pass


class Operator:
    """One of the operators as a function of its input."""

    def __init__(self, name: str):
        self.name = name
        self.overload = getattr(torch.ops.hf_sparse, name).default
        self.block = make_block(3, 16, 40, torch.float32, gated=name == "gated_mlp", bias=True)
        self.x = torch.randn(3, 40).relu() if name.endswith("linear") else self.block.x

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.name.endswith("linear"):
            return getattr(triton_ops, self.name)(x, self.block.down, self.block.down_bias)
        return replace(self.block, x=x).run(triton_ops)


@pytest.fixture(params=OPERATORS)
def operator(request):
    return Operator(request.param)


def test_plain_inference_is_unobserved():
    x = torch.empty(3)
    weight = torch.nn.Parameter(torch.empty(2, dtype=torch.bfloat16))
    assert not unobserved(x)  # gradients are recorded
    with torch.no_grad():
        assert unobserved(x, weight, None)
    with torch.inference_mode():
        assert unobserved(x, weight, torch.empty(2))


@torch.no_grad()
def test_tensors_that_are_more_than_they_seem():
    x = torch.empty(3)
    assert not unobserved(x, x.as_subclass(Subclass))
    assert not unobserved(x.to("meta"))
    assert not unobserved(x.to_sparse())
    assert not unobserved(torch.randn(3, dtype=torch.complex64).conj().imag)


@torch.no_grad()
def test_a_lazily_negated_input_is_negated(operator):
    x = torch.complex(torch.zeros_like(operator.x), -operator.x).conj().imag
    assert x.is_neg()
    assert torch.equal(x, operator.x)
    torch.testing.assert_close(operator(x), operator(operator.x))


@torch.no_grad()
def test_the_profiler_sees_the_operator(operator):
    with torch.profiler.profile() as profile:
        operator(operator.x)
    assert any(event.key == f"hf_sparse::{operator.name}" for event in profile.key_averages())


@torch.no_grad()
def test_modes_see_the_operator(operator):
    with Recorder() as dispatched:
        operator(operator.x)
    with FunctionRecorder() as called:
        operator(operator.x)
    assert operator.overload in dispatched.seen
    assert operator.overload in called.seen


@torch.no_grad()
def test_tracers_record_the_operator(operator):
    graph = make_fx(operator)(operator.x)
    assert any(node.target is operator.overload for node in graph.graph.nodes)
    traced = torch.jit.trace(lambda x: operator(x), operator.x)
    assert f"hf_sparse::{operator.name}" in str(traced.graph)


@torch.no_grad()
def test_vmap_over_tokens_is_the_call_with_all_tokens(operator):
    torch.testing.assert_close(torch.vmap(operator)(operator.x), operator(operator.x))


@torch.no_grad()
@pytest.mark.parametrize("backend", ["dense", "torch", CPP])
def test_both_ways_give_the_same_bits(backend, operator):
    with triton_ops.backend(backend):
        direct = operator(operator.x)
        with Recorder():
            assert torch.equal(operator(operator.x), direct)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["dense", "torch", CPP])
def test_both_ways_give_the_same_bits_with_a_certificate(backend):
    block = make_block(1, 64, 200, torch.float32, certified=True)
    with triton_ops.backend(backend):
        direct = block.run(triton_ops)
        with Recorder():
            assert torch.equal(block.run(triton_ops), direct)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["torch", CPP])
def test_a_default_device_is_that_of_new_tensors_only(backend, operator):
    expected = operator(operator.x)
    with torch.device("meta"), triton_ops.backend(backend):
        y = operator(operator.x)
    torch.testing.assert_close(y, expected)
