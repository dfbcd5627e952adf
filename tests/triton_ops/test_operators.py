"""The operators as citizens of torch: schema, fake, autograd, compile, autocast, errors."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import triton_ops
from support.activations import GATED_OR_PLAIN, PARAMETRISED
from support.backends import change_backend
from support.compiler import CPP, needs_compiler
from support.kernel_blocks import make_block
from support.pairs import pairs
from triton_ops import AUTO, DENSE, reference
from triton_ops.certificate import weight_stamp

GATED = torch.ops.hf_sparse.gated_mlp.default
PLAIN = torch.ops.hf_sparse.plain_mlp.default
LINEAR = torch.ops.hf_sparse.sparse_linear.default


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "grad", "gated"), pairs(["dense", "torch", CPP], [False, True], [False, True])
)
def test_mlps_pass_opcheck(backend, grad, gated):
    block = make_block(1, 8, 12, torch.float32, "fatrelu", gated=gated, bias=True)
    args = [t.requires_grad_(grad) for t in block.tensors()]
    without = args[: 4 if gated else 3] + [None] * (3 if gated else 2)
    certificate = triton_ops.certify(block.deciding)
    operator, options = (GATED if gated else PLAIN), (block.activation, block.threshold, AUTO)
    with triton_ops.backend(backend):
        torch.library.opcheck(operator, (*args, None, None, None, None, *options))
        torch.library.opcheck(operator, (*args, None, None, torch.rand(12), None, *options))
        torch.library.opcheck(operator, (*without, None, None, None, None, "relu", 0.0, AUTO))
        stamp = list(weight_stamp(block.deciding))
        torch.library.opcheck(operator, (*args, *certificate, None, None, *options))
        torch.library.opcheck(operator, (*args, *certificate, None, stamp, *options))
        if not grad:
            packet = operator.overloadpacket
            torch.library.opcheck(packet.inference, (*args, *certificate, None, stamp, *options))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["dense", "torch", CPP])
@pytest.mark.parametrize("grad", [False, True])
def test_sparse_linear_passes_opcheck(backend, grad):
    h = torch.relu(torch.randn(2, 3, 12)).requires_grad_(grad)
    weight = triton_ops.neuron_major_(torch.randn(8, 12)).requires_grad_(grad)
    with triton_ops.backend(backend):
        torch.library.opcheck(LINEAR, (h, weight, None, AUTO))
        torch.library.opcheck(LINEAR, (h, weight, torch.randn(8, requires_grad=grad), AUTO))
        if not grad:
            torch.library.opcheck(LINEAR.overloadpacket.inference, (h, weight, torch.randn(8), AUTO))


@pytest.mark.parametrize(("activation", "gated"), GATED_OR_PLAIN)
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 2, 8), (0, 8)])
def test_gradients_are_those_of_the_reference(activation, gated, shape):
    block = make_block(1, 8, 12, torch.float64, activation, gated=gated, bias=True)
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


@pytest.mark.parametrize(("activation", "gated"), GATED_OR_PLAIN)
def test_gradcheck_of_the_mlps(activation, gated):
    block = make_block(2, 4, 6, torch.float64, activation, gated=gated, bias=True)
    inputs = [t.requires_grad_() for t in block.tensors()]
    operator = triton_ops.gated_mlp if gated else triton_ops.plain_mlp

    def call(*tensors):
        return operator(*tensors, activation=activation, threshold=block.threshold)

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize(("activation", "gated"), PARAMETRISED)
def test_a_parameter_for_each_neuron_compiles_and_has_gradients_around_it(activation, gated):
    torch.compiler.reset()
    block = make_block(2, 8, 12, torch.float64, activation, gated=gated, bias=True)
    block.threshold = torch.rand(12, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in block.tensors()]
    expected = torch.autograd.grad(block.run(reference).sum(), inputs)
    for run in (block.run, torch.compile(block.run, fullgraph=True, backend="aot_eager")):
        ours = torch.autograd.grad(run(triton_ops).sum(), inputs)
        torch.testing.assert_close(ours, expected)


def test_gradcheck_of_sparse_linear_and_second_derivatives():
    h = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(triton_ops.sparse_linear, (h, weight, bias))
    assert torch.autograd.gradgradcheck(triton_ops.sparse_linear, (h, weight, bias))


@pytest.mark.parametrize("backend", ["torch", CPP])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("certified", [False, True])
def test_gradient_through_a_skipping_forward(backend, gated, certified):
    block = make_block(1, 16, 40, torch.float32, gated=gated, certified=certified)
    inputs = [t.requires_grad_() for t in block.tensors() if t is not None]
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
        backend = triton_ops.plan(self.gate.weight, "gated").backend(x.numel() // x.shape[-1])
        if backend != DENSE:
            return triton_ops.gated_mlp(*args, activation="relu", backend=backend) * 1.5
        return reference.gated_mlp(*args, activation="relu") * 1.5


@pytest.fixture
def slow_products(monkeypatch):
    """As on a CPU where torch's products of many tokens are faster than the kernel's."""
    change_backend(monkeypatch, "cpp", multiplies=lambda dtype: False)
    yield
    monkeypatch.undo()
    triton_ops.forget()


@pytest.mark.slow
@pytest.mark.usefixtures("slow_products")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic):
    torch.compiler.reset()
    # "auto" skips for one token and is dense for many.
    mlp = MLP(1024, 1024)
    compiled = torch.compile(mlp, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        assert triton_ops.plan(mlp.gate.weight, "gated").backend(1) != DENSE
        assert triton_ops.plan(mlp.gate.weight, "gated").backend(50) == DENSE
        for tokens in (1, 50, 51):
            x = torch.randn(1, tokens, 1024)
            torch.testing.assert_close(compiled(x), mlp(x))


@pytest.mark.slow
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


@needs_compiler
@pytest.mark.parametrize("gated", [True, False])
def test_under_autocast_the_operator_computes_as_autocast_does(gated):
    block = make_block(1, 16, 40, torch.float32, gated=gated, certified=True)
    with torch.autocast("cpu", torch.bfloat16), triton_ops.backend("cpp"):
        y = block.run(triton_ops)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, block.run(reference))
        h = torch.relu(block.x @ block.deciding.t())
        assert triton_ops.sparse_linear(h, block.down).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["dense", "torch", CPP])
@pytest.mark.parametrize("gated", [True, False])
def test_strided_inputs_weights_and_biases(backend, gated):
    block = make_block(3, 16, 40, torch.float32, gated=gated, bias=True)

    def strided(t):
        if t is None or t is block.down:
            return t
        return t.repeat_interleave(2, -1)[..., ::2] if t.ndim == 1 else t.t().contiguous().t()

    expected = block.run(reference)
    for name in ("x", "gate", "up", "gate_bias", "up_bias", "down_bias"):
        setattr(block, name, strided(getattr(block, name)))
    assert not block.x.is_contiguous()
    with triton_ops.backend(backend):
        y = block.run(triton_ops)
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("backend", ["dense", "torch", CPP])
@pytest.mark.parametrize("gated", [True, False])
def test_no_tokens_give_no_rows(backend, gated):
    block = make_block(0, 16, 40, torch.float32, gated=gated, certified=True)
    with triton_ops.backend(backend):
        assert block.run(triton_ops).shape == (0, 16)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("compiled", [None, "aot_eager", "inductor"])
def test_a_certificate_out_of_date_is_ignored(gated, compiled):
    block = make_block(1, 16, 40, torch.float32, gated=gated)
    operator = triton_ops.gated_mlp if gated else triton_ops.plain_mlp
    weights = block.tensors()
    certificate = triton_ops.certify(-block.x.expand_as(block.deciding))  # that every neuron is silent

    def call(stamp):
        return operator(*weights, activation="relu", certificate=certificate, stamp=stamp)

    if compiled:
        torch.compiler.reset()
        call = torch.compile(call, fullgraph=True, backend=compiled)
    with triton_ops.backend("cpp"), torch.no_grad():
        expected = block.run(triton_ops)
        assert expected.any()
        stamp = weight_stamp(block.deciding)
        assert not call(stamp).any()  # so it would be, if it were not noticed
        block.deciding.mul_(1)
        assert torch.equal(call(stamp), expected)
        stamp = weight_stamp(block.deciding)
        block.deciding.data = block.deciding.data.clone()
        assert torch.equal(call(stamp), expected)


def own_thresholds(each: torch.Tensor) -> dict[str, object]:
    return {"activation": "fatrelu", "threshold": each}


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
        ({"threshold": torch.zeros(12)}, "threshold=tensor has no meaning for activation='relu'"),
        (own_thresholds(torch.zeros(8)), r"threshold has shape \[8\]; expected \[F\] = \[12\]"),
        (own_thresholds(torch.zeros(())), r"threshold has shape \[\]; expected \[F\] = \[12\]"),
        (own_thresholds(torch.zeros(12).half()), "threshold is torch.float16 and the input is torch.float32"),
        (own_thresholds(torch.zeros(12, requires_grad=True)), r"pass threshold.detach\(\)"),
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
    ("change", "message"),
    [
        ({"up": torch.zeros(12, 9)}, r"up has shape \[12, 9\]; expected \[F, D\] = \[12, 8\]"),
        ({"down": torch.zeros(12, 8)}, r"down has shape \[12, 8\]; expected \[D, F\] = \[8, 12\]"),
        ({"up_bias": torch.zeros(8)}, r"up_bias has shape \[8\]; expected \[F\] = \[12\]"),
        ({"down_bias": torch.zeros(8).half()}, "down_bias is torch.float16 and the input is torch.float32"),
        ({"activation": "drelu"}, "activation='drelu' needs a gate"),
        ({"threshold": 0.5}, "threshold=0.5 has no meaning for activation='relu'"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "cpp"])
def test_errors_of_plain_mlp(backend, change, message):
    block = make_block(1, 8, 12, torch.float32, gated=False)
    for name, value in change.items():
        setattr(block, name, value)
    with triton_ops.backend(backend), pytest.raises(ValueError, match=message):
        block.run(triton_ops)


@pytest.mark.parametrize(
    ("rows", "bounds", "message"),
    [
        (torch.zeros(12, 8), None, "certificate.rows is torch.float32; expected torch.int8"),
        (torch.zeros(11, 8, dtype=torch.int8), None, r"certificate.rows has shape \[11, 8\]"),
        (None, torch.zeros(12, 2), r"certificate.bounds has shape \[12, 2\]; expected \[F, 3\]"),
        (None, torch.zeros(12, 3).double(), "certificate.bounds is torch.float64; expected torch.float32"),
        (torch.zeros(12, 8, dtype=torch.int8, device="meta"), None, "certificate.rows is on meta"),
    ],
)
@pytest.mark.parametrize("gated", [True, False])
def test_errors_of_a_certificate(gated, rows, bounds, message):
    block = make_block(1, 8, 12, torch.float32, gated=gated)
    right = triton_ops.certify(block.deciding)
    wrong = triton_ops.Certificate(
        right.rows if rows is None else rows, right.bounds if bounds is None else bounds
    )
    operator = triton_ops.gated_mlp if gated else triton_ops.plain_mlp
    with pytest.raises(ValueError, match=message):
        operator(*block.tensors(), activation="relu", certificate=wrong)


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


def test_a_dtype_without_a_kernel_runs_dense_in_auto_mode():
    block = make_block(1, 1024, 2048, torch.float64)
    assert torch.equal(block.run(triton_ops), block.run(reference))


@pytest.mark.parametrize("gated", [True, False])
def test_meta_tensors_give_a_shape(gated):
    block = make_block(2, 16, 40, torch.float32, gated=gated)
    meta = [t if t is None else t.to("meta") for t in block.tensors()]
    operator = triton_ops.gated_mlp if gated else triton_ops.plain_mlp
    y = operator(*meta, activation="relu", certificate=triton_ops.certify(meta[1]))
    assert (y.device.type, y.shape) == ("meta", (2, 16))


@pytest.mark.parametrize("backend", [DENSE, CPP])
@pytest.mark.parametrize("operator", ["gated", "plain", "linear", "routed"])
def test_forward_mode_derivatives_are_those_of_torch(backend, operator):
    block = make_block(
        2, 8, 12, torch.float64 if backend == DENSE else torch.float32, gated=operator == "gated"
    )
    x, experts = block.x, torch.zeros(2, 1, dtype=torch.int64)
    weights = torch.ones_like(experts, dtype=x.dtype)
    first, down = (t.unsqueeze(0) for t in (block.up, block.down))

    def call(module, x):
        if operator == "linear":
            return module.sparse_linear(x, block.up)
        if operator == "routed":
            return module.routed_mlp(x, experts, weights, first, None, down, activation="jsrelu")
        tensors = block.tensors()[1:]
        return getattr(module, f"{operator}_mlp")(x, *tensors, activation="jsrelu")

    tangents = []
    for module in (triton_ops, reference):
        with triton_ops.backend(backend), forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            tangents.append(forward_ad.unpack_dual(call(module, dual)).tangent)
    assert torch.equal(*tangents)
    assert tangents[0].any()
