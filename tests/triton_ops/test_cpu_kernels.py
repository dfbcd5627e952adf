"""The two CPU paths, compiled and pure PyTorch, against the reference in float64."""

from __future__ import annotations

import contextvars
import math
import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import triton_ops
from support.activations import GATED_OR_PLAIN
from support.compiler import CPP, needs_compiler
from support.kernel_blocks import assert_as_exact_as_dense, make_block
from support.pairs import pairs
from triton_ops import ACTIVATIONS, reference
from triton_ops.activations import TABLE

PATHS = [
    "torch",
    CPP,
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# tokens, hidden, neurons: ones, primes, tails of every vector width, more than one block and group of neurons
SHAPES = [
    (1, 1, 1),
    (1, 7, 5),
    (2, 63, 7),
    (1, 64, 172),
    (3, 172, 63),
    (5, 33, 129),
    (8, 95, 1000),
    (9, 31, 300),
    (17, 65, 200),
    (33, 40, 1100),
    (1, 1000, 257),
]

# More tokens, columns and neurons than the kernel's matrix product takes at once, and just as many.
MANY = [(32, 512, 256), (33, 300, 1001), (200, 530, 130), (513, 40, 257)]


def _id(value: Any) -> str:
    if value in GATED_OR_PLAIN:
        return f"{value[0]}-{'gated' if value[1] else 'plain'}"
    return str(value).removeprefix("torch.").replace(", ", "x")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("dtype", "shape", "kind", "bias"),
    pairs(DTYPES, SHAPES, GATED_OR_PLAIN, [False, True]),
    ids=_id,
)
def test_mlp(path, dtype, shape, kind, bias):
    activation, gated = kind
    block = make_block(*shape, dtype, activation, gated=gated, bias=bias)
    with triton_ops.backend(path):
        assert_as_exact_as_dense(block.run(triton_ops), block)


@needs_compiler
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
@pytest.mark.parametrize("shape", MANY, ids=_id)
@pytest.mark.parametrize("shift", [-8.0, 0.0, 2.0])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_many_tokens(dtype, shape, shift, gated):
    block = make_block(*shape, dtype, "shifted_relu", gated=gated, bias=True)
    block.threshold = shift
    with triton_ops.backend("cpp"):
        assert_as_exact_as_dense(block.run(triton_ops), block)


@needs_compiler
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("dtype", "shape", "kind"),
    pairs(DTYPES, [(16, 65, 300), (65, 40, 129), (530, 33, 70)], GATED_OR_PLAIN),
    ids=_id,
)
def test_many_tokens_with_few_active_neurons_each(dtype, shape, kind):
    activation, gated = kind
    block = make_block(*shape, dtype, activation, gated=gated, bias=True)
    block.deciding_bias.sub_(2.0)
    block.deciding_bias[::7] += 2.0  # and blocks of neurons that are not all alike
    with triton_ops.backend("cpp"):
        assert_as_exact_as_dense(block.run(triton_ops), block)


@needs_compiler
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
@pytest.mark.parametrize("tokens", [9, 70])
@pytest.mark.parametrize("share", [0.2, 0.9, 1.0])
def test_many_tokens_that_need_the_same_few_neurons(dtype, tokens, share):
    h = torch.randn(tokens, 900).to(dtype)
    h[:, torch.rand(900) >= 0.1] = 0
    h[torch.rand(tokens, 900) >= share] = 0
    weight = triton_ops.neuron_major_((torch.randn(300, 900) * 0.1).to(dtype))
    weight[:, ~h.any(0)] = math.nan  # not read
    with triton_ops.backend("cpp"):
        y = triton_ops.sparse_linear(h, weight)
    weight.nan_to_num_(0.0)
    exact, dense = h.double() @ weight.double().t(), h @ weight.t()
    rounding = torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps
    allowed = 2 * (dense.double() - exact).abs().max() + rounding * exact.abs().max()
    assert (y.double() - exact).abs().max() <= allowed


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
@pytest.mark.parametrize("shape", SHAPES, ids=_id)
@pytest.mark.parametrize("biased", [False, True])
def test_sparse_linear(path, dtype, shape, biased):
    tokens, hidden, neurons = shape
    h = torch.relu(torch.randn(tokens, neurons) - 0.5).to(dtype)
    weight = triton_ops.neuron_major_((torch.randn(hidden, neurons) * neurons**-0.5).to(dtype))
    bias = torch.randn(hidden).to(dtype) if biased else None
    with triton_ops.backend(path):
        y = triton_ops.sparse_linear(h, weight, bias)
    exact = reference.sparse_linear(h.double(), weight.double(), None if bias is None else bias.double())
    dense = reference.sparse_linear(h, weight, bias)
    allowed = 2 * (dense.double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (y.double() - exact).abs().max() <= allowed


@needs_compiler
@settings(max_examples=settings.default.max_examples * 2, deadline=None)
@given(
    tokens=st.integers(0, 33) | st.integers(34, 300),
    hidden=st.integers(1, 140),
    neurons=st.integers(1, 700),
    activation=st.sampled_from(ACTIVATIONS),
    dtype=st.sampled_from(DTYPES),
    gated=st.booleans(),
    bias=st.booleans(),
    shift=st.sampled_from([0.0, -1.0, 1 / 3, 2.0]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_in_the_compiled_kernel(
    tokens, hidden, neurons, activation, dtype, gated, bias, shift, seed
):
    torch.manual_seed(seed)
    gated = gated or TABLE[activation].relu_up
    block = make_block(tokens, hidden, neurons, dtype, activation, gated=gated, bias=bias)
    if activation == "shifted_relu":
        block.threshold = shift  # half, most or few of the neurons are active: other ways through the kernel
    with triton_ops.backend("cpp"):
        assert_as_exact_as_dense(block.run(triton_ops), block)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_all_silent_gives_the_bias_and_all_active_the_dense_result(path, dtype):
    silent, active = (make_block(2, 40, 300, dtype, bias=True) for _ in range(2))
    silent.gate_bias, active.gate_bias = (
        torch.full((2, 300), -100.0).to(dtype).add_(torch.tensor([[0], [200]]))
    )
    with triton_ops.backend(path):
        assert torch.equal(silent.run(triton_ops), silent.down_bias.expand(2, -1))
        assert_as_exact_as_dense(active.run(triton_ops), active)
        silent.down_bias = None
        assert torch.equal(silent.run(triton_ops), torch.zeros(2, 40, dtype=dtype))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(40,), (0, 40), (2, 0, 40), (1, 1, 40), (2, 3, 40)], ids=_id)
def test_leading_dimensions(path, shape):
    block = make_block(1, 40, 50, torch.float32)
    block.x = torch.randn(shape)
    with triton_ops.backend(path):
        assert_as_exact_as_dense(block.run(triton_ops), block)
        h = torch.relu(torch.randn(*shape[:-1], 50))
        y = triton_ops.sparse_linear(h, block.down)
    torch.testing.assert_close(y, reference.sparse_linear(h, block.down))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
def test_strided_arguments(path, dtype):
    block = make_block(3, 40, 50, dtype, bias=True)
    block.x = torch.randn(40, 6).to(dtype).t()[::2]
    block.gate = torch.randn(40, 50).to(dtype).t() * 40**-0.5
    block.up = torch.randn(50, 80).to(dtype)[:, :40] * 40**-0.5  # rows further apart than they are long
    block.up_bias = torch.randn(100).to(dtype)[::2]
    with triton_ops.backend(path):
        assert_as_exact_as_dense(block.run(triton_ops), block)


@needs_compiler
@settings(max_examples=settings.default.max_examples * 2 // 3, deadline=None)
@given(
    tokens=st.integers(0, 33) | st.integers(34, 300),
    hidden=st.integers(1, 140) | st.integers(141, 600),
    neurons=st.integers(1, 700),
    dtype=st.sampled_from(DTYPES),
    active=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_of_the_linear_in_the_compiled_kernel(tokens, hidden, neurons, dtype, active, seed):
    torch.manual_seed(seed)
    h = torch.randn(tokens, neurons).masked_fill(torch.rand(tokens, neurons) >= active, 0).to(dtype)
    weight = triton_ops.neuron_major_((torch.randn(hidden, neurons) * neurons**-0.5).to(dtype))
    with triton_ops.backend("cpp"):
        y = triton_ops.sparse_linear(h, weight)
    exact = h.double() @ weight.double().t()
    # The rounding of the result, and that of a float32 sum of these terms in any order.
    terms = h.double().abs() @ weight.double().abs().t()
    eps, eps32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    subnormal = eps * torch.finfo(dtype).smallest_normal  # the last place of the smallest numbers
    assert ((y.double() - exact).abs() <= eps * exact.abs() + neurons * eps32 * terms + subnormal).all()


@pytest.mark.parametrize("path", PATHS)
def test_down_as_a_linear_stores_it_is_still_right(path):
    block = make_block(2, 40, 50, torch.float32)
    block.down = block.down.contiguous()
    assert not triton_ops.is_neuron_major(block.down)
    with triton_ops.backend(path):
        assert torch.equal(block.run(triton_ops), block.run(reference))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tokens", [3, 35])
def test_nan_and_infinity_in_the_input_come_through(path, activation, bad, tokens):
    block = make_block(tokens, 40, 50, torch.float32, activation)
    block.x[1, 7] = bad
    with triton_ops.backend(path):
        y = block.run(triton_ops)
    expected = block.run(reference)
    assert not expected[1].isfinite().any()
    # Where dense is NaN through 0 * inf the skip path may be infinite, but never finite.
    assert not y[1].isfinite().any()
    assert torch.equal(y[1].isnan() & expected[1].isinf(), torch.zeros(40, dtype=torch.bool))
    others = [t for t in range(tokens) if t != 1]
    torch.testing.assert_close(y[others], expected[others])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
@pytest.mark.parametrize("tokens", [2, 9, 35])
@pytest.mark.parametrize("threshold", [0.0, 1.5])  # half of the neurons are silent, most
def test_weights_of_a_silent_neuron_are_not_read_even_if_they_are_nan(path, dtype, tokens, threshold):
    block = make_block(tokens, 41, 50, dtype, "shifted_relu")
    block.threshold = threshold
    block.gate[3] = 0  # its pre-activation is 0 …
    block.gate_bias = torch.zeros(50, dtype=dtype)
    block.gate_bias[3] = -1  # … and its bias below any threshold: silent for every input
    expected = block.run(reference)
    block.up[3] = math.nan
    block.down[:, 3] = math.inf
    with triton_ops.backend(path):
        y = block.run(triton_ops)
    rounding = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(y, expected, rtol=rounding, atol=rounding)
    assert block.run(reference).isnan().any()  # the dense computation reads them


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
@pytest.mark.parametrize("tokens", [4, 12, 40])
@pytest.mark.parametrize("active", [0.05, 0.9])
def test_an_infinite_weight_reaches_only_the_tokens_that_need_it(path, dtype, tokens, active):
    neurons, odd = 61, 7
    h = torch.randn(tokens, neurons).abs().masked_fill(torch.rand(tokens, neurons) >= active, 0).to(dtype)
    h[:, odd] = 0
    weight = triton_ops.neuron_major_((torch.randn(70, neurons) * neurons**-0.5).to(dtype))
    expected = reference.sparse_linear(h.double(), weight.double())
    h[1, odd], weight[2, odd] = 1, math.inf
    expected[1] += weight[:, odd].double()
    with triton_ops.backend(path):
        y = triton_ops.sparse_linear(h, weight)
    assert y[1, 2] == math.inf
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("path", PATHS)
def test_one_tokens_infinite_weight_does_not_reach_another_token(path):
    x = torch.tensor([[1.0], [-1.0]])
    gate, up, down = torch.ones(1, 1), torch.ones(1, 1), torch.full((1, 1), math.inf)
    with triton_ops.backend(path):
        y = triton_ops.gated_mlp(x, gate, up, down, activation="relu")
    assert y.tolist() == [[math.inf], [0.0]]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
@pytest.mark.parametrize("threshold", [0.0, 1.0, 2.0])  # half of the neurons are silent, more, most
def test_compiled_kernel_gives_the_same_bits_on_any_number_of_threads(dtype, threshold):
    block = make_block(33, 129, 3000, dtype, "fatrelu", bias=True)
    block.threshold = threshold
    block.down[5, 7] = math.inf  # its column is summed in another way
    before = torch.get_num_threads()
    try:
        with triton_ops.backend("cpp"):
            results = []
            for threads in (1, 2, 3, 4, 5, 6, 7, 8, 1):
                torch.set_num_threads(threads)
                results.append(block.run(triton_ops))
            assert results[0].isfinite().float().mean() > 0.9
            assert all(torch.equal(y, results[0]) for y in results)
            # Nor do the other tokens of a call change a token's bits, up to 7; from 8 on the down projection
            # may be one product over the neurons that any of them needs.
            tokens = 7
            options = {"activation": "fatrelu", "threshold": threshold}
            whole = triton_ops.gated_mlp(block.x[:tokens], *block.tensors()[1:], **options)
            for begin, end in ((0, 1), (5, 7), (1, 6), (3, 8), (1, 10), (2, 20)):
                x = block.x[begin : min(end, tokens)]
                some = triton_ops.gated_mlp(x, *block.tensors()[1:], **options)
                assert torch.equal(some, whole[begin:end])
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_calls_of_several_threads_at_once():
    """Each needs another amount of memory for intermediate values, of which one piece is kept."""
    blocks = [
        make_block(tokens, 64, neurons, torch.float32) for tokens in (1, 5, 40) for neurons in (300, 3000)
    ]
    wrong = []

    def run(block):
        for _ in range(30):
            if not torch.equal(block.run(triton_ops), expected[id(block)]):
                wrong.append(block)

    with torch.no_grad(), triton_ops.backend("cpp"):
        expected = {id(block): block.run(triton_ops) for block in blocks}
        # Threads start without the context of this one.
        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(torch.no_grad()(run), block))
            for block in blocks
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@needs_compiler
def test_a_busy_neighbour_changes_no_result():
    """While threads are kept waiting, calls do without them; every other one here, more or less."""
    blocks = [make_block(tokens, 64, 1500, torch.bfloat16) for tokens in (1, 7, 12, 100)]
    with torch.no_grad(), triton_ops.backend("cpp"):
        expected = [block.run(triton_ops) for block in blocks]
        spin = [sys.executable, "-c", "while True: pass"]
        neighbours = [subprocess.Popen(spin) for _ in range(os.cpu_count() or 1)]
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(max(2, before))
            for _ in range(20):
                assert all(torch.equal(b.run(triton_ops), y) for b, y in zip(blocks, expected, strict=True))
        finally:
            torch.set_num_threads(before)
            for neighbour in neighbours:
                neighbour.kill()
                neighbour.wait()


@needs_compiler
def test_more_intermediate_values_than_are_kept():
    small, large = (torch.randn(tokens, neurons) for tokens, neurons in ((40, 100), (512, 20000)))
    with torch.no_grad(), triton_ops.backend("cpp"):
        for h in (small, large, small, large):
            weight = triton_ops.neuron_major_(torch.randn(8, h.shape[1]))
            torch.testing.assert_close(
                triton_ops.sparse_linear(h, weight), h @ weight.t(), rtol=1e-3, atol=1e-3
            )
