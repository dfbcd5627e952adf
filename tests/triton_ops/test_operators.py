"""The operators as citizens of torch: schema, fake, autograd, compile, autocast, errors."""

from __future__ import annotations

import pytest
import torch
from kernel_blocks import make_block

import triton_ops
from triton_ops import ACTIVATIONS, reference

GATED = torch.ops.hf_sparse.gated_mlp.default
LINEAR = torch.ops.hf_sparse.sparse_linear.default


@pytest.mark.parametrize("backend", ["dense", "torch", "cpp"])
@pytest.mark.parametrize("grad", [False, True])
def test_gated_mlp_passes_opcheck(backend, grad):
    block = make_block(2, 8, 12, torch.float32, "fatrelu", bias=True)
    args = [t.requires_grad_(grad) for t in block.tensors()]
    with triton_ops.backend(backend):
        torch.library.opcheck(GATED, (*args, block.activation, block.threshold))
        torch.library.opcheck(GATED, (*args[:4], None, None, None, "relu", 0.0))


@pytest.mark.parametrize("backend", ["dense", "torch", "cpp"])
@pytest.mark.parametrize("grad", [False, True])
def test_sparse_linear_passes_opcheck(backend, grad):
    h = torch.relu(torch.randn(2, 3, 12)).requires_grad_(grad)
    weight = triton_ops.neuron_major_(torch.randn(8, 12)).requires_grad_(grad)
    with triton_ops.backend(backend):
        torch.library.opcheck(LINEAR, (h, weight, None))
        torch.library.opcheck(LINEAR, (h, weight, torch.randn(8, requires_grad=grad)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 2, 8), (0, 8)])
def test_gradients_are_those_of_the_reference(activation, shape):
    block = make_block(1, 8, 12, torch.float64, activation, bias=True)
    block.x = torch.randn(shape, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in block.tensors()]
    y, expected = block.run(triton_ops), block.run(reference)
    direction = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, inputs, direction),
        torch.autograd.grad(expected, inputs, direction),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_gated_mlp(activation):
    block = make_block(2, 4, 6, torch.float64, activation, bias=True)
    inputs = [t.requires_grad_() for t in block.tensors()]

    def call(*tensors):
        return triton_ops.gated_mlp(*tensors, activation=activation, threshold=block.threshold)

    assert torch.autograd.gradcheck(call, inputs)


def test_gradcheck_of_sparse_linear_and_second_derivatives():
    h = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(triton_ops.sparse_linear, (h, weight, bias))
    assert torch.autograd.gradgradcheck(triton_ops.sparse_linear, (h, weight, bias))


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_gradient_through_a_skipping_forward(backend):
    block = make_block(1, 16, 40, torch.float32)
    inputs = [t.requires_grad_() for t in block.tensors()[:4]]
    with triton_ops.backend(backend):
        grads = torch.autograd.grad(block.run(triton_ops).sum(), inputs)
    expected = torch.autograd.grad(block.run(reference).sum(), inputs)
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


class MLP(torch.nn.Module):
    """How a module uses the operator, as in hf_sparse."""

    def __init__(self, hidden: int, neurons: int) -> None:
        super().__init__()
        self.gate, self.up = torch.nn.Linear(hidden, neurons), torch.nn.Linear(hidden, neurons)
        self.down = torch.nn.Linear(neurons, hidden)
        triton_ops.neuron_major_(self.down.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers = (self.gate, self.up, self.down)
        args = (x, *(m.weight for m in layers), *(m.bias for m in layers))
        if triton_ops.wants_sparse(x.numel() // x.shape[-1], self.gate.weight, "gated"):
            return triton_ops.gated_mlp(*args, activation="relu") * 1.5
        return reference.gated_mlp(*args, activation="relu") * 1.5


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic):
    torch.compiler.reset()
    # Large enough that "auto" skips for one token and is dense for many.
    mlp = MLP(1024, 1024)
    compiled = torch.compile(mlp, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        assert triton_ops.wants_sparse(1, mlp.gate.weight, "gated")
        assert not triton_ops.wants_sparse(50, mlp.gate.weight, "gated")
        for tokens in (1, 50, 51):
            x = torch.randn(1, tokens, 1024)
            torch.testing.assert_close(compiled(x), mlp(x))


def test_compile_of_a_training_step():
    torch.compiler.reset()
    mlp = MLP(16, 24)
    x = torch.randn(3, 16)
    with triton_ops.backend("torch"):
        expected = torch.autograd.grad(mlp(x).sum(), list(mlp.parameters()))
        compiled = torch.compile(mlp, fullgraph=True)
        ours = torch.autograd.grad(compiled(x).sum(), list(mlp.parameters()))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_under_autocast_the_operator_computes_as_autocast_does():
    block = make_block(2, 16, 40, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), triton_ops.backend("cpp"):
        y = block.run(triton_ops)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, block.run(reference))
        h = torch.relu(block.x @ block.gate.t())
        assert triton_ops.sparse_linear(h, block.down).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": torch.zeros(12, 9)}, r"gate has shape \[12, 9\]; expected \[F, D\] = \[12, 8\]"),
        ({"up": torch.zeros(11, 8)}, r"up has shape \[11, 8\]; expected \[F, D\] = \[12, 8\]"),
        ({"down": torch.zeros(12, 8)}, r"down has shape \[12, 8\]; expected \[D, F\] = \[8, 12\]"),
        ({"gate": torch.zeros(12)}, r"gate has shape \[12\]; expected two dimensions"),
        ({"up_bias": torch.zeros(8)}, r"up_bias has shape \[8\]; expected \[F\] = \[12\]"),
        ({"x": torch.zeros(())}, "x has no dimension"),
        ({"x": torch.zeros(1, 8, dtype=torch.int64)}, "x is torch.int64; expected a floating dtype"),
        ({"up": torch.zeros(12, 8).half()}, "up is torch.float16 and the input is torch.float32"),
        ({"down": torch.zeros(8, 12, device="meta")}, "down is on meta and the input is on cpu"),
        ({"activation": "silu"}, "activation='silu' is not known"),
        ({"threshold": 0.5}, "threshold=0.5 has no meaning for activation='relu'"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "cpp"])
def test_errors_name_the_argument_the_value_and_what_was_expected(backend, change, message):
    block = make_block(1, 8, 12, torch.float32)
    for name, value in change.items():
        setattr(block, name, value)
    error = RuntimeError if "meta" in message else ValueError
    if "meta" in message:
        # torch itself sends a call with a meta tensor to the fake implementation.
        error, message = ValueError, "down is on meta"
    with triton_ops.backend(backend), pytest.raises(error, match=message):
        block.run(triton_ops)


@pytest.mark.parametrize(
    ("h", "weight", "bias", "message"),
    [
        (
            torch.zeros(1, 12),
            torch.zeros(8, 11),
            None,
            r"weight has shape \[8, 11\]; expected \[D, F\] = \[8, 12\]",
        ),
        (
            torch.zeros(1, 12),
            torch.zeros(8, 12),
            torch.zeros(12),
            r"bias has shape \[12\]; expected \[D\] = \[8\]",
        ),
        (torch.zeros(1, 12), torch.zeros(8, 12).double(), None, "weight is torch.float64"),
    ],
)
def test_errors_of_sparse_linear(h, weight, bias, message):
    with pytest.raises(ValueError, match=message):
        triton_ops.sparse_linear(h, weight, bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtypes_without_a_kernel_run_dense_in_auto_mode(dtype):
    block = make_block(1, 16, 40, dtype)
    assert torch.equal(block.run(triton_ops), block.run(reference))


def test_meta_tensors_give_a_shape():
    block = make_block(2, 16, 40, torch.float32)
    meta = [t if t is None else t.to("meta") for t in block.tensors()]
    y = triton_ops.gated_mlp(*meta, activation="relu")
    assert (y.device.type, y.shape) == ("meta", (2, 16))
